"""Can L1000 carry the prediction of unseen compounds? Noise ceiling and learning curve (LINCS, A375 and consensus).

Panels of compounds: "24h", LJP005 and LJP009 at their three highest doses; "6h", CPC006, one well a compound;
"consensus", one signature a DrugBank compound over all cell lines and doses. Changes are from half of the vehicle wells
of the plate in training and from the other half in the truth, so that their noise is not scored as agreement.

1. Ceiling: correlation of wells of one compound on a plate and across plates, against wells of different compounds;
   by Spearman-Brown, that of the mean of all its wells, and the best that any prediction could reach.
2. Learning curve: Pearson correlation of predicted and true change of held-out compounds against the number of training
   compounds, for the training mean, ridge on fingerprints, the nearest compound and models of the suite, and for the
   best-fitting training compound chosen with the answer at hand. "recentred" models are given the training mean, and
   only what they say beyond their own mean over the training compounds is theirs. "specific" is the same correlation
   after the common change is taken away, from the truth the mean of the plate's held-out compounds and from the
   prediction that of the training compounds: the training mean knows nothing of it.

Responding compounds are those whose wells, minus the mean of their plate's compounds, agree with each other better than
95 % of pairs of wells of different compounds do. Doses of a compound lie in neighbouring wells and share a position:
agreement on a plate is an upper bound, agreement across plates is not.
Needs PYRO_SCM_DATA with l1000_a375/ and l1000_consensus/.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.launch import UNSEEN_ENVIRONMENT_MODELS, Results, data_folder, launch
from pyro_scm import evaluation, infer, recipes
from pyro_scm.baselines import NearestEnvironment, Ridge, TrainingMean
from pyro_scm.data import chemistry, l1000
from pyro_scm.data.dataset import EnvironmentDataset

FloatArray: TypeAlias = NDArray[np.float64]

CONTROL = "control"
_HIGH = 1.0  # uM
_BOUND = 10.0  # of consensus signatures, as LINCS clips z-scores
_DRAWS = 2000  # of a bootstrap
_ENOUGH = 5  # compounds with replicates
_SAME = 0.95  # share of pairs of different compounds that a responding compound's wells beat


@dataclass(frozen=True)
class Ceiling:
    """Sizes.

    Args:
        sizes: training compounds.
        splits: random splits into held-out and training compounds.
        held_out: share of the compounds.
        models: of the suite, trained in the first `model_splits` splits.
        model_splits: see `models`; 0 for none of them.
        model_sizes: training compounds for them.
        epochs: of the models.
        latent: of the models.
        hidden: of the models.
        bits: of the fingerprints.
        panels: see above.
    """

    sizes: tuple[int, ...] = (10, 20, 40, 80, 160, 280, 480)
    splits: int = 10
    held_out: float = 0.2
    models: tuple[str, ...] = ("conditional_vae", "environment_vae", "translation_vae")
    model_splits: int = 2
    model_sizes: tuple[int, ...] = (20, 480)
    epochs: int = 60
    latent: int = 20
    hidden: int = 100
    bits: int = 1024
    panels: tuple[str, ...] = ("24h", "6h", "consensus")

    @classmethod
    def preset(cls, name: str) -> "Ceiling":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return Ceiling(sizes=(10, 40), splits=2, model_splits=0, bits=128, panels=("24h",))
        return Ceiling() if name == "paper" else Ceiling(splits=3, sizes=(20, 80, 280), model_splits=0)


@dataclass(frozen=True, eq=False)
class Panel:
    """Wells of compounds and of controls; rows agree in all three.

    Args:
        cells: changes as training sees them, the vehicle wells of its half among them.
        truth: ``[n, G]`` changes from the other half.
        plate: ``[n]``.
    """

    cells: EnvironmentDataset
    truth: FloatArray
    plate: NDArray[Any]

    @property
    def compound(self) -> NDArray[Any]:
        """``[n]`` name of each well's compound."""
        return self.cells.environments["perturbation"].astype(str).to_numpy()[self.cells.env]

    @property
    def compounds(self) -> list[str]:
        """Names, without the control."""
        return sorted(set(self.compound) - {CONTROL})


# ---------------------------------------------------------------------- data
def compound_key(smiles: object, name: str) -> str:
    """One name for all names, salts and stereochemistries that the parent's SMILES does not tell apart."""
    return chemistry.canonical(chemistry.parent(str(smiles), name=name), name=name)


def panel(adata: Any, bits: int) -> Panel:
    """Level 3 plates as a panel.

    Args:
        adata: wells with obs columns plate, control, dose, smiles and perturbation; without a structure: left out.
        bits: of the fingerprints.
    """
    plate = adata.obs["plate"].astype(str).to_numpy()
    control = adata.obs["control"].to_numpy(bool)
    rank = adata.obs.assign(p=plate, c=control).groupby(["p", "c"]).cumcount().to_numpy()
    centred = []
    for half in (0, 1):
        adata.obs["half"] = control & (rank % 2 == half)
        centred.append(np.asarray(l1000.centre_on_vehicle(adata, control="half", statistic="mean").X, np.float64))
    known = adata.obs["smiles"].notna().to_numpy() & ~control
    keep = known | (control & (rank % 2 == 0))
    wells = adata[keep].copy()
    wells.X = centred[0][keep].astype(np.float32)
    is_control = control[keep]
    names = [
        CONTROL if c else compound_key(s, str(n))
        for c, s, n in zip(is_control, wells.obs["smiles"], wells.obs["perturbation"], strict=True)
    ]
    wells.obs = pd.DataFrame(
        {"drug": names, "smiles": [None if c else n for c, n in zip(is_control, names, strict=True)]},
        index=wells.obs_names,
    )
    cells = EnvironmentDataset.from_anndata(
        wells, environment="drug", control=CONTROL, smiles="smiles", representation="morgan", bits=bits, counts=False
    )
    return Panel(cells, centred[1][keep], plate[keep])


def read(name: str, config: Ceiling) -> Panel:
    """A panel by name."""
    if name == "consensus":
        return _consensus(config)
    folder = data_folder("l1000_a375")
    files = {
        "24h": ["LJP005_A375_24H_X1_level3.gct", "LJP009_A375_24H_X1_level3_qnorm.gct"],
        "6h": ["CPC006_A375_6H_X1_level3.gctx"],
    }[name]
    adata = l1000.load_plates([folder / f for f in files], obs=pd.read_csv(folder / "obs.csv.gz"))
    if name == "24h":
        adata = adata[adata.obs["control"].to_numpy(bool) | (adata.obs["dose"].to_numpy(float) > _HIGH)].copy()
    return panel(adata, config.bits)


def _consensus(config: Ceiling) -> Panel:
    """One signature a compound, a change already: its control is no change at all."""
    from anndata import AnnData

    folder = data_folder("l1000_consensus")
    table = pd.read_csv(folder / "consensi-drugbank.tsv.gz", sep="\t", index_col=0)
    smiles = pd.read_csv(folder / "drugbank_smiles.csv.gz").set_index("drugbank_id")["smiles"].reindex(table.index)
    table, smiles = table[smiles.notna().to_numpy()], smiles.dropna()
    x = np.vstack([np.clip(table.to_numpy(float), -_BOUND, _BOUND), np.zeros((2, table.shape[1]))])
    keys = [compound_key(s, str(n)) for n, s in smiles.items()]
    obs = pd.DataFrame(
        {"drug": [*keys, CONTROL, CONTROL], "smiles": [*keys, None, None]},
        index=[*table.index.astype(str), "no change 1", "no change 2"],
    )
    adata = AnnData(X=x.astype(np.float32), obs=obs, var=pd.DataFrame(index=table.columns.astype(str)))
    cells = EnvironmentDataset.from_anndata(
        adata, environment="drug", control=CONTROL, smiles="smiles", representation="morgan", bits=config.bits
    )
    return Panel(cells, x, np.full(len(x), "consensus"))


# ---------------------------------------------------------------------- noise ceiling
def spearman_brown(r: float, k: float) -> float:
    """Reliability of the mean of k parallel measurements whose correlation is r; 0 where r is negative."""
    r = max(r, 0.0)
    return k * r / (1 + (k - 1) * r)


def replicates(data: Panel, centred: bool) -> tuple[pd.DataFrame, float]:
    """Agreement of each compound's wells on a plate, and the 95 % quantile of wells of different compounds.

    Args:
        data: a panel.
        centred: whether the mean change of the plate's compounds is taken from every well.

    Returns:
        rows (plate, compound) with wells, r (mean correlation of pairs), reliability of their mean, ceiling (its square
        root: the correlation with the observed mean that knowing the true mean would reach) and responds; the quantile.
    """
    rows, different = [], []
    for plate in sorted(set(data.plate)):
        own = (data.plate == plate) & (data.compound != CONTROL)
        x = data.truth[own] - (data.truth[own].mean(0) if centred else 0.0)
        name = data.compound[own]
        if len(name) < 2:
            continue
        r = np.corrcoef(x)
        same = name[:, None] == name[None]
        different.append(r[~same])
        for compound in sorted(set(name)):
            i = np.flatnonzero(name == compound)
            if len(i) > 1:
                found = float(r[np.ix_(i, i)][np.triu_indices(len(i), 1)].mean())
                rows.append({"plate": plate, "compound": compound, "wells": len(i), "r": found})
    table = pd.DataFrame(rows, columns=["plate", "compound", "wells", "r"])
    threshold = float(np.quantile(np.concatenate(different), _SAME)) if different else math.nan
    pairs = zip(table["r"], table["wells"], strict=True)
    table["reliability"] = np.array([spearman_brown(r, k) for r, k in pairs], float)
    table["ceiling"] = np.sqrt(table["reliability"])
    table["responds"] = table["r"] > threshold
    return table, threshold


def across_plates(data: Panel, centred: bool) -> pd.DataFrame:
    """Correlation of the mean changes of a compound that is on two plates, and of different compounds on them."""
    means: dict[tuple[str, str], FloatArray] = {}
    for plate in sorted(set(data.plate)):
        own = (data.plate == plate) & (data.compound != CONTROL)
        common = data.truth[own].mean(0) if centred else 0.0
        for compound in sorted(set(data.compound[own])):
            means[plate, compound] = data.truth[own & (data.compound == compound)].mean(0) - common
    plates = sorted({p for p, _ in means})
    rows = []
    for i, first in enumerate(plates):
        for second in plates[i + 1 :]:
            shared = [c for p, c in means if p == first and (second, c) in means]
            for a in shared:
                for b in shared:
                    r = float(np.corrcoef(means[first, a], means[second, b])[0, 1])
                    rows.append({"plates": f"{first}, {second}", "first": a, "second": b, "same": a == b, "r": r})
    return pd.DataFrame(rows, columns=["plates", "first", "second", "same", "r"])


# ---------------------------------------------------------------------- learning curve
def learning_curve(name: str, data: Panel, config: Ceiling) -> pd.DataFrame:
    """Scores of every held-out compound: columns panel, split, size, predictor, compound, delta, specific."""
    rows: list[dict[str, Any]] = []
    drugs = np.array(data.compounds)
    for split in range(config.splits):
        order = np.random.default_rng(split).permutation(drugs)
        held = round(config.held_out * len(drugs))
        test, rest = sorted(order[:held]), order[held:]
        sizes = sorted({min(n, len(rest)) for n in config.sizes})
        wanted = {min(n, len(rest)) for n in config.model_sizes} if split < config.model_splits else set()
        for size in sorted({*sizes, *wanted}):
            chosen = set(rest[:size]) | {CONTROL}
            train = np.isin(data.compound, list(chosen))
            models = config.models if size in wanted else ()
            near = similarity(data.cells, sorted(chosen - {CONTROL}), test)
            for predictor, found in predictions(data.cells.subset(train), test, models, config, split).items():
                scored = score(data, train, test, found, near)
                rows += [{"panel": name, "split": split, "size": size, "predictor": predictor, **s} for s in scored]
            scored = best_match(data, train, test)
            rows += [{"panel": name, "split": split, "size": size, "predictor": "best match", **s} for s in scored]
        print(name, "split", split, flush=True)
    return pd.DataFrame(rows)


def predictions(
    train: EnvironmentDataset, test: Sequence[str], models: Sequence[str], config: Ceiling, seed: int
) -> dict[str, FloatArray]:
    """Predicted change ``[len(test), G]`` by predictor; of a model, also recentred on the training compounds."""
    names = _environments(train, test)
    found = {
        "training mean": TrainingMean().fit(train).predict(names),
        "ridge": Ridge().fit(train).predict(names),
        "nearest": NearestEnvironment().fit(train).predict(names),
    }
    control = train.subset(train.reference[train.env]).x
    found = {key: value - np.asarray(control, np.float64).mean(0) for key, value in found.items()}
    for model in models:
        options: dict[str, Any] = {"latent": config.latent, "hidden": (config.hidden,)}
        options |= {"guide_hidden": (config.hidden,), **UNSEEN_ENVIRONMENT_MODELS[model]}
        parts = recipes.make(model, train.schema, **options)
        run = infer.fit(
            *parts, train, seeds=(seed,), epochs=config.epochs, batch_size=64, schedule="cosine", progress=False
        )
        own = [str(train.environments.index[e]) for e in train.present if not train.reference[e]]
        change = evaluation.predict_means(run, train, [*names, *own])[0] - np.asarray(control, np.float64).mean(0)
        asked, seen = change[: len(names)], change[len(names) :]
        found[model] = asked
        found[f"{model}, recentred"] = found["training mean"] + asked - seen.mean(0)
    return found


def _environments(cells: EnvironmentDataset, compounds: Sequence[str]) -> list[str]:
    table = cells.environments
    by = dict(zip(table["perturbation"].astype(str), table.index.astype(str), strict=True))
    return [by[str(c)] for c in compounds]


def specific(data: Panel, compounds: Sequence[str]) -> FloatArray:
    """Truth of every well minus the mean of the named compounds' wells on its plate (of all, where it has none).

    Held-out compounds are compared with their own mean, not with that of training: the noise of the training wells
    would be in the truth and in every prediction that is measured from their mean, and score as agreement.
    """
    result = data.truth.copy()
    named = np.isin(data.compound, list(compounds))
    for plate in set(data.plate):
        own = named & (data.plate == plate)
        result[data.plate == plate] -= data.truth[own if own.any() else named].mean(0)
    return result


def similarity(cells: EnvironmentDataset, train: Sequence[str], test: Sequence[str]) -> FloatArray:
    """``[len(test)]`` Tanimoto similarity of each held-out compound to the nearest training compound."""
    row = {name: i for i, name in enumerate(cells.environments["perturbation"].astype(str))}
    prints = cells.representation
    seen, asked = (prints[[row[str(n)] for n in names]] for names in (train, test))
    nearest: FloatArray = chemistry.tanimoto(asked, seen).max(1)
    return nearest


def score(
    data: Panel, train: NDArray[np.bool_], test: Sequence[str], found: FloatArray, near: FloatArray
) -> list[dict[str, Any]]:
    """Correlation of change and of what is specific, one row a held-out compound."""
    own = specific(data, test)
    treated = train & (data.compound != CONTROL)
    x = np.asarray(data.cells.x, np.float64)
    names = sorted(set(data.compound[treated]))
    typical = np.mean([x[treated & (data.compound == n)].mean(0) for n in names], axis=0)
    rows = []
    for compound, prediction, close in zip(test, found, near, strict=True):
        wells = data.compound == compound
        rows.append(
            {
                "compound": compound,
                "nearest similarity": close,
                "delta": correlation(prediction, data.truth[wells].mean(0)),
                "specific": correlation(prediction - typical, own[wells].mean(0)),
            }
        )
    return rows


def best_match(data: Panel, train: NDArray[np.bool_], test: Sequence[str]) -> list[dict[str, Any]]:
    """The training compound that correlates best with the answer: no prediction, but what copying could reach."""
    names = sorted(set(data.compound[train]) - {CONTROL})
    rows = []
    tables = {}
    both = {"delta": (data.truth, data.truth), "specific": (specific(data, names), specific(data, test))}
    for key, (known, sought) in both.items():
        seen = np.array([known[data.compound == n].mean(0) for n in names])
        asked = np.array([sought[data.compound == n].mean(0) for n in test])
        tables[key] = np.corrcoef(asked, seen)[: len(test), len(test) :].max(1)
    for i, compound in enumerate(test):
        rows.append({"compound": compound, **{key: float(values[i]) for key, values in tables.items()}})
    return rows


def correlation(a: FloatArray, b: FloatArray) -> float:
    """Pearson's; 0 where the prediction is constant up to float32's rounding: it knows nothing."""
    if np.std(a) <= 1e-5 * np.std(b) or np.std(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def interval(values: FloatArray, seed: int = 0) -> tuple[float, float, float]:
    """Mean over compounds and its 95 % bootstrap interval."""
    if not len(values):
        return (math.nan,) * 3
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (_DRAWS, len(values)))].mean(1)
    return float(values.mean()), *(float(q) for q in np.quantile(means, [0.025, 0.975]))


def curve_table(scores: pd.DataFrame, responding: dict[str, set[str]]) -> pd.DataFrame:
    """Mean over compounds (each its mean over splits) by panel, compounds, size and predictor."""
    rows = []
    for (name, size), part in scores.groupby(["panel", "size"], sort=True):
        for group, kept in _groups(part, responding.get(name)):
            for predictor, own in kept.groupby("predictor", sort=False):
                means = own.groupby("compound")[["delta", "specific"]].mean()
                rows.append(
                    {"panel": name, "compounds": group, "size": size, "predictor": predictor, "n": len(means)}
                    | {k: v for m in ("delta", "specific") for k, v in _shown(m, means[m].to_numpy()).items()}
                )
    return pd.DataFrame(rows)


def _groups(part: pd.DataFrame, responding: set[str] | None) -> list[tuple[str, pd.DataFrame]]:
    groups = [("all", part)]
    if responding:
        kept = part[part["compound"].isin(responding)]
        groups += [("responding", kept)] if len(kept) else []
    return groups


def _shown(metric: str, values: FloatArray) -> dict[str, float]:
    mean, low, high = interval(values)
    return {metric: mean, f"{metric} low": low, f"{metric} high": high}


def differences(scores: pd.DataFrame, responding: dict[str, set[str]]) -> pd.DataFrame:
    """Predictor minus training mean of the same compounds and splits: delta, with its interval."""
    keys = ["panel", "size", "split", "compound"]
    base = scores[scores["predictor"] == "training mean"].set_index(keys)["delta"]
    rows = []
    others = scores[~scores["predictor"].isin(["training mean", "best match"])]
    for (name, size, predictor), part in others.groupby(["panel", "size", "predictor"], sort=True):
        for group, kept in _groups(part, responding.get(name)):
            paired = kept.set_index(keys)["delta"]
            gain = (paired - base.reindex(paired.index)).groupby("compound").mean().to_numpy()
            rows.append(
                {"panel": name, "compounds": group, "size": size, "predictor": predictor, "n": len(gain)}
                | _shown("gain", gain)
            )
    return pd.DataFrame(rows)


def by_similarity(scores: pd.DataFrame) -> pd.DataFrame:
    """Ridge at the largest training size, by the similarity of a compound to the nearest training compound."""
    rows = []
    for name, part in scores[scores["predictor"] == "ridge"].groupby("panel", sort=False):
        part = part[part["size"] == part["size"].max()]
        band = pd.cut(part["nearest similarity"], [0, 0.3, 0.4, 0.6, 1], include_lowest=True).astype(str)
        for key, own in part.groupby(band):
            means = own.groupby("compound")[["delta", "specific"]].mean()
            rows.append(
                {"panel": name, "similarity": key, "n": len(means)} | _shown("specific", means["specific"].to_numpy())
            )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- the experiment
def main(config: Ceiling) -> Results:
    ceilings, shared, scores = [], [], []
    responding: dict[str, set[str]] = {}
    panels = {name: read(name, config) for name in config.panels}
    for name, data in panels.items():
        for centred in (False, True):
            table, threshold = replicates(data, centred)
            found = across_plates(data, centred)
            if len(found):
                shared.append(found.assign(panel=name, centred=centred))
            if len(table) >= _ENOUGH:
                if centred:
                    responding[name] = set(table.loc[table["responds"], "compound"])
                for group, kept in (("all", table), ("responding", table[table["responds"]])):
                    ceilings.append(
                        {"panel": name, "plate-centred": centred, "compounds": group, "n": len(kept)}
                        | kept[["r", "reliability", "ceiling"]].median().to_dict()
                        | {"mean ceiling": kept["ceiling"].mean(), "different, 95 %": threshold}
                    )
        scores.append(learning_curve(name, data, config))
    every = pd.concat(scores, ignore_index=True)
    curve, gains = curve_table(every, responding), differences(every, responding)
    tables = {"ceiling": pd.DataFrame(ceilings), "curve": curve, "gain_over_training_mean": gains, "scores": every}
    tables["by_similarity"] = by_similarity(every)
    if shared:
        tables["across_plates"] = (
            pd.concat(shared)
            .groupby(["panel", "plates", "centred", "same"])["r"]
            .agg(["count", "median", "min", "max"])
            .reset_index()
        )
    text = "; ".join(
        f"{name}: {len(d.compounds)} compounds, {len(d.truth)} wells, "
        f"{len(responding.get(name, ()))} compounds respond" + (" (no replicates)" if name not in responding else "")
        for name, d in panels.items()
    )
    return Results(tables=tables, figures={"learning_curve": figure(curve, pd.DataFrame(ceilings))}, text=text)


def figure(curve: pd.DataFrame, ceilings: pd.DataFrame) -> Any:
    """One pane a panel and group: correlation against training compounds; the dotted line is the median ceiling."""
    from matplotlib.figure import Figure

    panes = list(curve[["panel", "compounds"]].drop_duplicates().itertuples(index=False, name=None))
    drawn = Figure(figsize=(3.6 * len(panes), 6))
    grid = drawn.subplots(2, len(panes), squeeze=False, sharey="row")
    for column, (name, group) in enumerate(panes):
        own = curve[(curve["panel"] == name) & (curve["compounds"] == group)]
        for row, metric in enumerate(("delta", "specific")):
            axes = grid[row, column]
            for predictor, line in own.groupby("predictor", sort=False):
                axes.fill_between(line["size"], line[f"{metric} low"], line[f"{metric} high"], alpha=0.15)
                axes.plot(line["size"], line[metric], marker=".", label=str(predictor))
            axes.set_xscale("log")
            axes.axhline(0, color="0.7", lw=1)
            if len(ceilings):
                mark = ceilings[(ceilings["panel"] == name) & (ceilings["compounds"] == group)]
                for value in mark.loc[mark["plate-centred"] == bool(row), "ceiling"]:
                    axes.axhline(value, color="k", ls=":", lw=1)
        grid[0, column].set_title(f"{name}, {group}", fontsize=9)
        grid[1, column].set_xlabel("training compounds")
    grid[0, 0].set_ylabel("correlation of change")
    grid[1, 0].set_ylabel("the same, specific")
    grid[0, -1].legend(fontsize=6)
    drawn.tight_layout()
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Ceiling, main))
