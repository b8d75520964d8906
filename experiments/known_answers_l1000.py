"""Sparse latents on L1000 wells whose answer is known in part (LINCS; A375 compounds, PC3 shRNA).

l1000: do MEK and BRAF inhibitors share a latent in A375, a BRAF V600E line, and are compounds of one mechanism nearer
each other by their effects in sparse coordinates than by raw signatures, PCA or dense effects? Panels: 24h (LJP005 and
LJP009, doses above 1 uM) and 6h (CPC006, one well a compound). For every compound with a partner of its mechanism the
others are ranked by cosine: AUROC of the partners, and whether the first is one.

shrna: hairpins on two plates. Is a hairpin's effect on one plate nearest to its own on the other? It lies in the same
well of both, so that position adds to agreement; how much, the control wells tell.

Turning latents changes no cosine: what sparse coordinates can add is to leave out, latent by latent, what their
inclusion probability says is none ("included").
Needs PYRO_SCM_DATA with l1000_a375/, l1000_shrna_pc3/ and compounds/, unless --data simulated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import pyro_scm as ps
from experiments.known_answers_crispr import (
    View,
    by_name,
    components,
    dataset,
    fitted,
    heat_map,
    settled,
    sparse_run,
    views,
)  # fmt: skip
from experiments.launch import Results, briefly, data_folder, launch
from pyro_scm.data import gct, l1000
from pyro_scm.effect_spectrum import pseudobulk
from pyro_scm.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

FloatArray: TypeAlias = NDArray[np.float64]

CONTROL = "control"
MEK = ("PD-0325901", "PD-184352", "trametinib", "AZD-8330")
BRAF = ("vemurafenib", "PLX-4720", "dabrafenib", "GDC-0879")
_HIGH = 1.0  # uM
_BOUND = 10.0  # of z-scores, as LINCS clips them
_DRAWS = 2000
_SHRNA_CONTROLS = ("EMPTY", "GFP", "LUCIFERASE", "lacZ", "RFP", "pgw")


@dataclass(frozen=True)
class L1000:
    """Sizes.

    Args:
        parts: l1000, shrna.
        panels: of l1000: 24h, 6h.
        data: real, or simulated: compounds of classes that share a latent, and hairpins on two plates.
        seeds: of each model's members.
        latent: of the models.
        hidden: units of their one hidden layer.
        steps: of training.
        lr: of training.
        draws: split halves (or halves of wells and genes) that decide the number of latents.
    """

    parts: tuple[str, ...] = ("l1000", "shrna")
    panels: tuple[str, ...] = ("24h", "6h")
    data: str = "real"
    seeds: tuple[int, ...] = tuple(range(5))
    latent: int = 20
    hidden: int = 64
    steps: int = 1500
    lr: float = 1e-2
    draws: int = 20

    @classmethod
    def preset(cls, name: str) -> "L1000":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(
                data="simulated", panels=("24h",), seeds=(0, 1), steps=200, lr=0.03, draws=4, latent=5, hidden=16
            )
        return cls() if name == "paper" else cls(panels=("24h",), seeds=(0, 1), steps=500, draws=10)


# ---------------------------------------------------------------------- how many latents, without replicates
def held_out_rank(values: FloatArray, draws: int, largest: int) -> int:
    """Components that predict a held-out block of a matrix best from the other three blocks.

    Owen and Perry, "Bi-cross-validation of the SVD and the nonnegative matrix factorization", Ann. Appl. Stat. 2009.

    Args:
        values: ``[E, G]``, one row an environment, when there is one well of each.
        draws: random halves of rows and columns.
        largest: number that is tried.
    """
    rng = np.random.default_rng(0)
    errors = np.zeros(largest + 1)
    for _ in range(draws):
        rows, columns = (rng.permutation(n) < n // 2 for n in values.shape)
        a, b = values[rows][:, columns], values[rows][:, ~columns]
        c, d = values[~rows][:, columns], values[~rows][:, ~columns]
        left, singular, right = np.linalg.svd(d, full_matrices=False)
        for r in range(min(largest, len(singular)) + 1):
            inverse = (right[:r].T / singular[:r]) @ left[:, :r].T
            errors[r] += np.square(a - b @ inverse @ c).sum() / np.square(a).sum()
    return max(int(errors.argmin()), 1)


# ---------------------------------------------------------------------- representations of effects
def representations(
    adata: "AnnData", config: L1000, replicated: bool
) -> tuple[dict[str, list[pd.DataFrame]], dict[str, list[View]], int]:
    """Vectors of every environment by way, one table a seed (one alone where nothing is random); views; rank.

    The first of the sparse views is that of the member with the lowest loss.
    """
    cells = dataset(adata, control=CONTROL)
    x, rows = np.asarray(cells.x, np.float64), by_name(cells)
    names = [str(n) for n in cells.environments.index[rows]]
    change, count = pseudobulk(x / np.maximum(x.std(0), 1e-9), cells.env, rows)
    if replicated:
        rank = ps.effect_rank(cells, largest=config.latent, draws=config.draws)
    else:
        rank = held_out_rank(change, config.draws, config.latent)
    print(f"{len(cells)} wells, {len(names)} environments, effects of rank {rank}", flush=True)
    dense = fitted(cells, config)
    sparse = sparse_run(dense, cells, rank)
    refined = ps.refine(sparse, cells, prior="student-t", offset=True, **briefly(sparse), device="cpu", progress=False)
    turned = View.of(components(change, count, rank, "PCA turned"), names)
    runs = {"dense": (dense, None), "sparse": (sparse, rank), "refined": (refined, rank)}
    found = {way: views(settled(run, cells), most) for way, (run, most) in runs.items()}
    made = {
        "raw": [pd.DataFrame(change, names)],
        "PCA": [pd.DataFrame(components(change, count, rank, "PCA"), names)],
        "PCA turned, included": [included(turned)],
    }
    for way, several in found.items():
        made[way] = [v.effects for v in several]
        made[f"{way}, included"] = [included(v) for v in several]
    first = sorted(range(len(sparse)), key=lambda k: k != sparse.best)
    return made, {**found, "sparse": [found["sparse"][k] for k in first], "PCA turned": [turned]}, rank


def included(view: View) -> pd.DataFrame:
    """Effects times their inclusion probabilities."""
    return view.effects * view.inclusion


def cosines(a: FloatArray, b: FloatArray) -> FloatArray:
    """``[n, m]``; 0 where one is zero."""
    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-9) for v in (a, b)]
    result: FloatArray = unit[0] @ unit[1].T
    return result


def auroc(positive: FloatArray, negative: FloatArray) -> float:
    """P(a positive is above a negative), ties half."""
    difference = np.asarray(positive)[:, None] - np.asarray(negative)[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


# ---------------------------------------------------------------------- mechanisms of action
def mechanisms(obs: pd.DataFrame, tables: Sequence[pd.DataFrame]) -> dict[str, set[str]]:
    """Compound -> mechanisms, by the first 13 characters of pert_id (the structure's), else by name.

    Args:
        obs: with columns target, pert_id.
        tables: with columns pert_id, pert_iname, MOA (several parted by semicolons).
    """
    known: dict[str, set[str]] = {}
    for table in tables:
        for i, name, text in zip(table["pert_id"], table["pert_iname"], table["MOA"], strict=True):
            if isinstance(text, str):
                classes = {c.strip().lower() for c in text.split(";") if c.strip()}
                for key in (str(i)[:13], str(name).lower()):
                    known.setdefault(key, classes)
    out = {}
    for name, i in zip(obs["target"].astype(str), obs["pert_id"].astype(str), strict=True):
        classes_ = known.get(i[:13], known.get(name.lower(), set()))
        if classes_ and name != CONTROL:
            out[name] = classes_
    return out


def mechanism_scores(vectors: pd.DataFrame, classes: Mapping[str, set[str]]) -> pd.DataFrame:
    """Of every compound that shares a mechanism with another: AUROC of partners among the rest, and the nearest's."""
    names = [str(n) for n in vectors.index if n in classes]
    near = cosines(vectors.loc[names].to_numpy(), vectors.loc[names].to_numpy())
    rows = {}
    for i, name in enumerate(names):
        rest = [j for j in range(len(names)) if j != i]
        partner = np.array([bool(classes[name] & classes[names[j]]) for j in rest])
        if partner.any() and not partner.all():
            value = near[i, rest]
            tied = np.flatnonzero(value == value.max())
            rows[name] = {"AUROC": auroc(value[partner], value[~partner]), "nearest": float(partner[tied].mean())}
    return pd.DataFrame.from_dict(rows, orient="index")


def bootstrapped(table: pd.DataFrame, against: pd.DataFrame | None = None) -> dict[str, float]:
    """Mean of each column with a 95 % interval over rows (compounds); also of the difference to another table."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(table), (_DRAWS, len(table)))
    out = {}
    for column in table:
        values = table[column].to_numpy(float)
        low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
        out |= {column: float(values.mean()), f"{column} low": float(low), f"{column} high": float(high)}
        if against is not None:
            gap = values - against.loc[table.index, column].to_numpy(float)
            low, high = np.quantile(gap[picks].mean(1), [0.025, 0.975])
            out |= {
                f"{column} - raw": float(gap.mean()),
                f"{column} - raw low": float(low),
                f"{column} - raw high": float(high),
            }
    return out


def summary(made: Mapping[str, Sequence[pd.DataFrame]], score: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
    """One row a way: scores averaged over seeds for each compound, interval over compounds, spread over seeds."""
    rows, raw = {}, score(made["raw"][0])
    for way, several in made.items():
        each = [score(v) for v in several]
        mean = sum(each[1:], each[0]) / len(each)
        row = bootstrapped(mean, raw)
        for column in mean:
            row[f"{column} sd of seeds"] = float(np.std([e[column].mean() for e in each]))
        rows[way] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("way")


def shared_latent(vectors: pd.DataFrame, coordinates: bool) -> dict[str, float]:
    """Do BRAF inhibitors move what MEK inhibitors move? The latent is chosen by MEK inhibitors alone.

    Args:
        vectors: environments by latents.
        coordinates: whether a single latent counts; else the whole direction of the MEK inhibitors' mean.
    """
    mek, braf = ([n for n in names if n in vectors.index] for names in (MEK, BRAF))
    others = [n for n in vectors.index if n not in (*mek, *braf)]
    mean = vectors.loc[mek].mean()
    if coordinates:
        j = mean.abs().idxmax()
        value = vectors[j] * np.sign(mean[j])
        share = vectors.abs().div(np.maximum(vectors.abs().sum(axis=1), 1e-9), axis=0)[j]
    else:
        value = pd.Series(cosines(vectors.to_numpy(), mean.to_numpy()[None])[:, 0], vectors.index)
        share = value
    return {
        "AUROC of BRAF": auroc(value[braf].to_numpy(), value[others].to_numpy()),
        "on it: MEK": float(share[mek].mean()),
        "on it: BRAF": float(share[braf].mean()),
        "on it: others": float(share[others].mean()),
        "cosine MEK, BRAF": float(cosines(vectors.loc[mek].to_numpy(), vectors.loc[braf].to_numpy()).mean()),
    }


def shared_table(made: Mapping[str, Sequence[pd.DataFrame]]) -> pd.DataFrame:
    """`shared_latent` of every way, mean and standard deviation over seeds."""
    rows = []
    for way, several in made.items():
        found = pd.DataFrame([shared_latent(v, way != "raw") for v in several])
        spread = found.std(ddof=0).add_suffix(" sd")
        rows.append({"way": way, **found.mean().to_dict(), **spread.to_dict()})
    return pd.DataFrame(rows).set_index("way")


def joint_table(found: Mapping[str, Sequence[View]]) -> pd.DataFrame:
    """How many inhibitors of each kind are included in the latent that MEK inhibitors are included in most.

    Mean and standard deviation over seeds.
    """
    rows = []
    for way, several in found.items():
        counts = []
        for view in several:
            mek, braf = ([n for n in names if n in view.inclusion.index] for names in (MEK, BRAF))
            on = view.included[view.inclusion.loc[mek].sum().idxmax()]
            number = {"latents": view.inclusion.shape[1], "MEK": on[mek].sum(), "BRAF": on[braf].sum()}
            counts.append({**number, "others": on.sum() - on[[*mek, *braf]].sum()})
        table = pd.DataFrame(counts).astype(float)
        rows.append({"way": way, **table.mean().to_dict(), **table.std(ddof=0).add_suffix(" sd").to_dict()})
    return pd.DataFrame(rows).set_index("way")


def compounds(panel: str, config: L1000) -> tuple["AnnData", dict[str, set[str]]]:
    """Wells centred on their plate's vehicle, and the mechanisms of their compounds."""
    if config.data == "simulated":
        return simulated_compounds()
    folder = data_folder("l1000_a375")
    files = {
        "24h": ["LJP005_A375_24H_X1_level3.gct", "LJP009_A375_24H_X1_level3_qnorm.gct"],
        "6h": ["CPC006_A375_6H_X1_level3.gctx"],
    }
    if panel not in files:
        raise DataError(f"no panel {panel!r}: use some of {', '.join(files)}")
    adata = l1000.load_plates([folder / f for f in files[panel]], obs=pd.read_csv(folder / "obs.csv.gz"))
    adata = l1000.centre_on_vehicle(adata)
    control = adata.obs["control"].to_numpy(bool)
    adata = adata[control | (adata.obs["dose"].to_numpy(float) > _HIGH)].copy()
    control = adata.obs["control"].to_numpy(bool)
    adata.obs["target"] = np.where(control, CONTROL, adata.obs["perturbation"].astype(str))
    tables = [
        pd.read_csv(data_folder("compounds") / name, sep="\t")
        for name in ("lincs_pert_info2_2020.tsv.gz", "lincs_pert_info_gse92742_moa.tsv.gz")
    ]
    return adata, mechanisms(adata.obs, tables)


def l1000_part(config: L1000) -> Results:
    """Mechanisms, and MEK with BRAF inhibitors."""
    tables: dict[str, pd.DataFrame] = {}
    figures: dict[str, Any] = {}
    texts = []
    for panel in config.panels:
        adata, classes = compounds(panel, config)
        made, views_, rank = representations(adata, config, replicated=panel == "24h")
        found = summary(made, lambda v, classes=classes: mechanism_scores(v, classes))  # type: ignore[misc]
        scored = mechanism_scores(made["raw"][0], classes)
        tables[f"{panel}_mechanisms"] = found
        if all(set(names) & set(made["raw"][0].index) for names in (MEK, BRAF)):
            tables[f"{panel}_shared"] = shared_table(made)
            tables[f"{panel}_joint"] = joint_table(views_)
            both = [n for n in (*MEK, *BRAF) if n in made["raw"][0].index]
            shown = {w: views_[w][0].inclusion.loc[both] for w in ("sparse", "PCA turned")}
            tables[f"{panel}_inclusion"] = pd.concat(shown, names=["way"])
        figures[f"{panel}_effects"] = heat_map(views_["sparse"][0])
        texts.append(f"{panel}: {len(scored)} compounds share a mechanism with another; effects of rank {rank}.")
    return Results(tables, figures, "\n".join(texts))


# ---------------------------------------------------------------------- shRNA on two plates
def hairpins(config: L1000) -> "AnnData":
    """Wells of both plates, obs target (hairpin@plate), plate and well, centred on their plate's controls."""
    from anndata import AnnData

    if config.data == "simulated":
        return simulated_hairpins()
    folder = data_folder("l1000_shrna_pc3")
    adata = gct.read(folder / "LITMUS001_PC3_96H_X2_X5_zscore_n757x978.gctx")
    obs = pd.read_csv(folder / "litmus001_obs.csv.gz").set_index("id").loc[adata.obs_names]
    x = np.clip(np.asarray(adata.X, np.float64), -_BOUND, _BOUND)
    control = obs["pert_desc"].isin(_SHRNA_CONTROLS).to_numpy()
    plate = obs["rna_plate"].to_numpy()
    for name in sorted(set(plate)):
        x[plate == name] -= np.median(x[(plate == name) & control], axis=0)
    target = np.where(control, CONTROL, obs["pert_id"] + "@" + obs["rna_plate"])
    kept = pd.DataFrame({"target": target, "plate": plate, "well": obs["rna_well"].to_numpy()}, obs.index)
    return AnnData(X=x.astype(np.float32), obs=kept, var=pd.DataFrame(index=adata.var_names))


def across(vectors: pd.DataFrame) -> pd.DataFrame:
    """Of every hairpin on both plates: is its own effect on the other plate the nearest? Both ways round, averaged.

    Columns: correlation with its own (less that with others), rank of its own as a share of the others (0: first).
    """
    parts = pd.Series(vectors.index).str.split("@", expand=True)
    plates = sorted(parts[1].unique())
    place = {(n, p): i for i, (n, p) in enumerate(zip(parts[0], parts[1], strict=True))}
    both = sorted(n for n in parts[0].unique() if all((n, p) in place for p in plates))
    values = vectors.to_numpy()
    one, two = (values[[place[n, p] for n in both]] for p in plates)
    near = cosines(one, two)
    own = np.diag(near)
    n = len(both)
    others = (near.sum(1) + near.sum(0) - 2 * own) / (2 * (n - 1))
    rank = (
        sum(((s > own[:, None]).sum(1) + 0.5 * ((s == own[:, None]).sum(1) - 1)) / (n - 1) for s in (near, near.T)) / 2
    )
    first = sum((s.argmax(1) == np.arange(n)).astype(float) for s in (near, near.T)) / 2
    return pd.DataFrame({"cosine": own, "cosine - others": own - others, "rank": rank, "first": first}, both)


def position(adata: "AnnData") -> pd.DataFrame:
    """Correlation across plates of control wells in the same and in different wells: what position alone gives."""
    control = adata[adata.obs["target"] == CONTROL]
    plates = sorted(control.obs["plate"].unique())
    one, two = (control[control.obs["plate"] == p] for p in plates)
    r = cosines(np.asarray(one.X, np.float64), np.asarray(two.X, np.float64))
    same = one.obs["well"].to_numpy()[:, None] == two.obs["well"].to_numpy()[None]
    rows = {"same well": r[same], "different wells": r[~same]}
    return pd.DataFrame({k: {"cosine": v.mean(), "pairs": len(v)} for k, v in rows.items()}).T.rename_axis("controls")


def shrna_part(config: L1000) -> Results:
    """Agreement of two plates."""
    adata = hairpins(config)
    made, found, rank = representations(adata, config, replicated=False)
    table = summary(made, across)
    text = f"shRNA: {len(across(made['raw'][0]))} hairpins on both plates; effects of rank {rank}."
    return Results(
        {"shrna_across": table, "shrna_position": position(adata)},
        {"shrna_effects": heat_map(found["sparse"][0])},
        text,
    )


# ---------------------------------------------------------------------- simulated
def _wells(moves: pd.DataFrame, label: Sequence[str], genes: int, rng: np.random.Generator) -> FloatArray:
    z = 0.5 * rng.normal(size=(len(label), moves.shape[1])) + moves.loc[list(label)].to_numpy()
    return z @ rng.normal(size=(moves.shape[1], genes)) + rng.normal(size=(len(label), genes))


def simulated_compounds(seed: int = 0) -> tuple["AnnData", dict[str, set[str]]]:
    """MEK and BRAF inhibitors on latent 0, three classes on others, and compounds that do nothing; three wells each."""
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    classes = {n: {"mek"} for n in MEK} | {n: {"braf"} for n in BRAF}
    classes |= {f"{c}{i}": {c} for c in ("a", "b", "c") for i in range(5)}
    names = [*classes, *(f"none{i}" for i in range(15)), CONTROL]
    moves = pd.DataFrame(0.0, names, range(4))
    for j, members in enumerate([{"mek", "braf"}, {"a"}, {"b"}, {"c"}]):
        moves.loc[[n for n, c in classes.items() if c & members], j] = 3.0
    label = [n for n in names for _ in range(30 if n == CONTROL else 6)]
    obs = pd.DataFrame({"target": label}, [f"w{i}" for i in range(len(label))])
    x = _wells(moves, label, 50, rng)
    return AnnData(X=x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(50)])), classes


def simulated_hairpins(seed: int = 0) -> "AnnData":
    """Forty hairpins, half of which move a latent of four, one well each on two plates, and controls."""
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    names = [f"h{i}" for i in range(40)]
    moves = pd.DataFrame(0.0, [*names, CONTROL], range(4))
    for i, n in enumerate(names[:20]):
        moves.loc[n, i % 4] = rng.choice([-1.0, 1.0]) * rng.uniform(2, 4)
    label = [*names, *[CONTROL] * 20] * 2
    plate = np.repeat(["p1", "p2"], 60)
    well = [f"{i}" for i in range(60)] * 2
    target = [n if n == CONTROL else f"{n}@{p}" for n, p in zip(label, plate, strict=True)]
    obs = pd.DataFrame({"target": target, "plate": plate, "well": well}, [f"w{i}" for i in range(120)])
    x = _wells(moves, label, 50, rng)
    return AnnData(X=x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(50)]))


PARTS: dict[str, Callable[[L1000], Results]] = {"l1000": l1000_part, "shrna": shrna_part}


def main(config: L1000) -> Results:
    unknown = [p for p in config.parts if p not in PARTS]
    if unknown:
        raise DataError(f"no part {unknown[0]!r}: use some of {', '.join(PARTS)}")
    parts = [PARTS[p](config) for p in config.parts]
    tables = {n: t for r in parts for n, t in r.tables.items()}
    figures = {n: f for r in parts for n, f in r.figures.items()}
    return Results(tables, figures, "\n".join(r.text for r in parts))


if __name__ == "__main__":
    raise SystemExit(launch(__file__, L1000, main))
