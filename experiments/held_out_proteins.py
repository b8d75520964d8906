"""Surface proteins of cells of which only RNA is shown (MultiCPA; ECCITE-seq and CITE-seq of blood cells).

Cells are split into folds. A fold's cells are either shown whole, or with their RNA alone, and their proteins are
predicted: by MultiCPA whose guide reads both modalities side by side (concatenation) or as a product of experts,
trained on whole cells; on these and copies of them without proteins; or on these and the RNA of the cells asked about;
and by what is simpler: the mean of the condition, nearest neighbours, ridge regression on log-normalised RNA, and on
principal components of the RNA of all cells. Then control cells of the fold are put into the other condition, and
compared with the cells of that condition, whose proteins no model has seen.

Needs PYRO_SCM_DATA with eccite_pbmc/ and citeseq_pbmc/, unless --data simulated.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

import pyro_scm as ps
from experiments.launch import Results, data_folder, launch
from pyro_scm import metrics, recipes
from pyro_scm.chance import forked
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.single_cell import highly_variable
from pyro_scm.evaluation import predict_means
from pyro_scm.query import isolated, transport
from pyro_scm.run import Run, members
from pyro_scm.sites import Y

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

FloatArray: TypeAlias = NDArray[np.float64]

CONTROL, OTHER = "control", "ctcl"
FAMILIES = {"concatenation": "normal", "product of experts": "product"}
TRAINED = ("whole cells", "also without proteins", "also the RNA asked about")
MEAN = ", mean of members"
_NEIGHBOURS, _COMPONENTS = 15, 20
_DRAWS = 40
_BATCH = 64  # of one to six hundred cells: several steps an epoch, or backgrounds are still far from the counts


@dataclass(frozen=True)
class HeldOutProteins:
    """Sizes.

    Args:
        data: of ``"eccite"``, ``"citeseq"`` and ``"simulated"``.
        folds: of the cells.
        run_folds: how many of them are run.
        seeds: members of each model.
        genes: kept, the most variable ones of the training cells.
        latent: of the models.
        hidden: units of their one hidden layer.
        epochs: of training. None is chosen by its loss: RNA, most of it, is fitted before proteins are.
        lr: of training.
    """

    data: tuple[str, ...] = ("eccite", "citeseq")
    folds: int = 3
    run_folds: int = 1
    seeds: int = 2
    genes: int = 300
    latent: int = 10
    hidden: int = 64
    epochs: int = 60
    lr: float = 2e-2

    @classmethod
    def preset(cls, name: str) -> "HeldOutProteins":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(data=("simulated",), folds=2, seeds=2, latent=4, hidden=16, epochs=25)
        if name == "paper":
            return cls(run_folds=3, seeds=5, epochs=120)
        return cls()


# ---------------------------------------------------------------------- data
def read(name: str) -> EnvironmentDataset:
    """Cells with RNA counts and proteins, in the conditions that there are."""
    import anndata

    if name == "simulated":
        adata = simulated()
    elif name == "eccite":
        adata = anndata.read_h5ad(data_folder("eccite_pbmc") / "eccite_pbmc_control_vs_ctcl_counts.h5ad")
    else:
        adata = anndata.read_h5ad(data_folder("citeseq_pbmc") / "pbmc_10k_protein_200cells.h5ad")
        adata.obs["condition"] = CONTROL
    return EnvironmentDataset.from_anndata(
        adata, environment="condition", control=CONTROL, proteins="protein_expression"
    )


def simulated(seed: int = 0, cells: int = 240) -> "AnnData":
    """Counts of 40 genes and 8 proteins that read the same three latents; a condition moves the first by 2."""
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    other = np.arange(cells) % 2 == 1
    z = rng.normal(size=(cells, 3)) + 2.0 * np.outer(other, [1, 0, 0])
    x = rng.poisson(np.exp(1.5 + 0.5 * z @ rng.normal(size=(3, 40))))
    y = rng.poisson(np.exp(2.5 + 0.7 * z @ rng.normal(size=(3, 8))))
    obs = pd.DataFrame({"condition": np.where(other, OTHER, CONTROL)}, [f"c{i}" for i in range(cells)])
    adata = AnnData(X=x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(40)]))
    adata.obsm["protein_expression"] = y.astype(np.float32)
    return adata


def folds(cells: EnvironmentDataset, number: int, seed: int = 0) -> NDArray[np.int64]:
    """``[n]`` fold of each cell, every condition spread over all of them."""
    order = np.lexsort((np.random.default_rng(seed).random(len(cells)), cells.env))
    fold = np.empty(len(cells), np.int64)
    fold[order] = np.arange(len(cells)) % number
    return fold


def without_proteins(cells: EnvironmentDataset) -> EnvironmentDataset:
    """The same cells, their proteins not measured."""
    assert cells.y is not None
    return replace(cells, y=np.full_like(cells.y, np.nan))


def training_cells(cells: EnvironmentDataset, known: NDArray[np.bool_], trained: str) -> EnvironmentDataset:
    """What a model is trained on: the proteins of known cells, and no other protein.

    With copies of known cells without their proteins the bound holds for both, as in Wu and Goodman; with the RNA of
    the cells asked about, the guide has seen what it is to read.

    Args:
        cells: known ones and those asked about.
        known: ``[n]`` whose proteins are known.
        trained: of `TRAINED`.
    """
    parts = [np.flatnonzero(known)]
    if trained != TRAINED[0]:
        parts.append(parts[0])
    if trained == TRAINED[2]:
        parts.append(np.flatnonzero(~known))
    taken, whole = cells.subset(np.concatenate(parts)), len(parts[0])
    assert taken.y is not None
    y = taken.y.copy()
    y[whole:] = np.nan
    obs = taken.obs.set_axis([*taken.cells[:whole], *(f"{c}, RNA" for c in taken.cells[whole:])])
    return replace(taken, y=y, obs=obs)


def logarithm(values: Any) -> FloatArray:
    """log(1 + count)."""
    return np.log1p(np.asarray(values, np.float64))


# ---------------------------------------------------------------------- what is simpler
def simple(train: EnvironmentDataset, test: EnvironmentDataset) -> dict[str, FloatArray]:
    """log(1 + count) of the proteins of cells whose RNA is known, by method."""
    x, new = (np.asarray(_dense(part.normalised(train.schema.summary.depth)), np.float64) for part in (train, test))
    y = logarithm(train.y)
    mean, spread = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1.0)
    x, new = (x - mean) / spread, (new - mean) / spread
    by_condition = np.stack(
        [y[train.env == e].mean(0) if e in train.present else y.mean(0) for e in range(len(train.environments))]
    )
    own, asked = np.eye(len(train.environments))[train.env], np.eye(len(train.environments))[test.env]
    basis = np.linalg.svd(x, full_matrices=False)[2][:_COMPONENTS].T
    common = np.linalg.svd(np.vstack([x, new]), full_matrices=False)[2][:_COMPONENTS].T
    distance = ((new @ basis)[:, None] - (x @ basis)[None]) ** 2
    near = np.argsort(distance.sum(-1), axis=1)[:, :_NEIGHBOURS]
    return {
        "mean of all": np.broadcast_to(y.mean(0), (len(test), y.shape[1])),
        "mean of the condition": by_condition[test.env],
        "nearest neighbours": y[near].mean(1),
        "ridge": ridge(np.hstack([x, own]), y, np.hstack([new, asked])),
        "ridge, components of all RNA": ridge(np.hstack([x @ common, own]), y, np.hstack([new @ common, asked])),
    }


def ridge(x: FloatArray, y: FloatArray, new: FloatArray) -> FloatArray:
    """Ridge regression whose penalty has the least error of leaving one cell out, for each protein by itself."""
    mean, middle = x.mean(0), y.mean(0)
    u, s, v = np.linalg.svd(x - mean, full_matrices=False)
    best = np.full(y.shape[1], np.inf)
    result = np.zeros((len(new), y.shape[1]))
    for penalty in 10.0 ** np.arange(0, 7, 0.5):
        shrunk = s**2 / (s**2 + penalty)
        left = (y - middle - (u * shrunk) @ (u.T @ (y - middle))) / (1 - 1 / len(x) - ((u**2) * shrunk).sum(1)[:, None])
        error = (left**2).sum(0)
        guess = middle + (new - mean) @ (v.T * (shrunk / np.maximum(s, 1e-12))) @ (u.T @ (y - middle))
        result[:, error < best] = guess[:, error < best]
        best = np.minimum(error, best)
    return result


def _dense(values: Any) -> Any:
    return values if isinstance(values, np.ndarray) else values.toarray()


# ---------------------------------------------------------------------- MultiCPA
def fitted(cells: EnvironmentDataset, family: str, config: HeldOutProteins) -> Run:
    """All seeds together."""
    model, guide = recipes.make(
        "multicpa", cells.schema, latent=config.latent, hidden=(config.hidden,), protein_hidden=(config.hidden,),
        guide_hidden=(config.hidden,), family=FAMILIES[family],
    )  # fmt: skip
    return ps.fit(
        model, guide, cells, seeds=range(config.seeds), epochs=config.epochs, batch_size=_BATCH, lr=config.lr,
        schedule="cosine", device="cpu", progress=False,
    )  # fmt: skip


def drawn(run: Run, cells: EnvironmentDataset, environment: str | None = None) -> tuple[FloatArray, FloatArray]:
    """log(1 + y) of cells as they are and in another environment, ``[K, S, n, P]``: draws of the posterior predictive.

    Args:
        run: of MultiCPA.
        cells: whose proteins may be missing.
        environment: name; None to stay where they are.
    """
    several = []
    for k, (model, guide) in enumerate(members(run)):
        places = [] if environment is None else [lambda b: run.environments.place(b, environment)]
        with isolated(), forked():
            torch.manual_seed(k)
            traces = transport(model, guide, cells.batch(), places, _DRAWS)
            several.append([trace.nodes[Y]["fn"].sample().log1p().double().numpy() for trace in traces])
    return np.stack([own[0] for own in several]), np.stack([own[-1] for own in several])


def predicted(run: Run, cells: EnvironmentDataset) -> FloatArray:
    """``[K, n, P]`` E[log(1 + y)] under the posterior predictive of each cell."""
    return drawn(run, cells)[0].mean(1)


# ---------------------------------------------------------------------- scores
def protein_scores(truth: FloatArray, guess: FloatArray, env: NDArray[Any], centre: FloatArray) -> pd.DataFrame:
    """One row a protein: R2 against its training mean, correlation over cells, and that within conditions.

    Args:
        truth: ``[n, P]``.
        guess: ``[n, P]``.
        env: ``[n]`` condition.
        centre: ``[n, P]`` mean of all training cells of each cell's fold.
    """
    r2 = 1 - ((truth - guess) ** 2).sum(0) / np.maximum(((truth - centre) ** 2).sum(0), 1e-12)
    inside, found = truth.copy(), guess.copy()
    for e in np.unique(env):
        inside[env == e] -= truth[env == e].mean(0)
        found[env == e] -= guess[env == e].mean(0)
    return pd.DataFrame(
        {"r2": r2, "correlation": correlations(truth, guess), "correlation within": correlations(inside, found)}
    )


def correlations(a: FloatArray, b: FloatArray) -> FloatArray:
    """Pearson correlation of each column; 0 where one is constant: a constant guess says nothing."""
    a, b = a - a.mean(0), b - b.mean(0)
    scale = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(scale > 1e-9, (a * b).sum(0) / np.maximum(scale, 1e-9), 0.0)


def worlds_scores(
    train: EnvironmentDataset, test: EnvironmentDataset, runs: dict[str, Run]
) -> Iterator[dict[str, Any]]:
    """Control cells of a fold put into the other condition, against the cells of it in the same fold."""
    controls, others = test.of(CONTROL), test.of(OTHER)
    truth = {"proteins": logarithm(others.y), "RNA": _rna(others, train)}
    start = {"proteins": logarithm(controls.y), "RNA": _rna(controls, train)}
    seen = {
        "proteins": (logarithm(train.of(CONTROL).y), logarithm(train.of(OTHER).y)),
        "RNA": (_rna(train.of(CONTROL), train), _rna(train.of(OTHER), train)),
    }
    for kind, was in start.items():
        true = truth[kind].mean(0) - was.mean(0)
        spread = np.where(seen[kind][0].std(0) > 0, seen[kind][0].std(0), 1.0)
        shift = seen[kind][1].mean(0) - seen[kind][0].mean(0)

        def row(
            method: str, seed: int, change: FloatArray, cells: FloatArray | None, *, kind: str = kind,
            true: FloatArray = true, spread: FloatArray = spread,
        ) -> dict[str, Any]:  # fmt: skip
            zero = np.zeros_like(true)
            distance = np.nan
            if cells is not None:
                distance = metrics.energy_distance(cells / spread, truth[kind] / spread, unbiased=True)
            moved = change.std() > 1e-9
            return {
                "what": kind, "method": method, "seed": seed,
                "delta pearson": metrics.delta_pearson(true, change, zero) if moved else np.nan,
                "delta r2": metrics.delta_r2(true, change, zero), "energy distance": distance,
            }  # fmt: skip

        yield row("no change", -1, np.zeros_like(true), was)
        yield row("mean shift", -1, shift, was + shift)
        yield row("training cells of the condition", -1, seen[kind][1].mean(0) - was.mean(0), seen[kind][1])
        for name, run in runs.items():
            if kind == "RNA":
                if name.endswith(TRAINED[2]):
                    continue  # it has been trained on the RNA that would be the truth here
                changes = predict_means(run, controls, [OTHER])[:, 0] - _rna(controls, controls).mean(0)
                drawn_cells: list[FloatArray | None] = [None] * len(changes)
            else:
                before, after = drawn(run, controls, OTHER)
                changes, drawn_cells = (after - before).mean((1, 2)), list(after[:, 0])
            for k, (change, moved) in enumerate(zip(changes, drawn_cells, strict=True)):
                yield row(name, k, change, moved)
            yield row(f"{name}{MEAN}", -1, changes.mean(0), None)


def _rna(cells: EnvironmentDataset, train: EnvironmentDataset) -> FloatArray:
    return np.asarray(_dense(cells.normalised(train.schema.summary.depth)), np.float64)


# ---------------------------------------------------------------------- the experiment
@dataclass
class _Guesses:
    """Predictions of the cells of all folds that were run, by what is shown, method and seed."""

    truth: list[FloatArray]
    env: list[NDArray[Any]]
    centre: list[FloatArray]
    guesses: dict[tuple[str, str, int], list[FloatArray]]

    def add(self, shown: str, method: str, several: FloatArray, first: int = 0) -> None:
        for k, guess in enumerate(several):
            self.guesses.setdefault((shown, method, first + k), []).append(guess)


def main(config: HeldOutProteins) -> Results:
    each, worlds = [], []
    for name in config.data:
        cells = read(name)
        fold = folds(cells, config.folds)
        kept = _Guesses([], [], [], {})
        for number in range(config.run_folds):
            known, own = fold != number, cells
            if len(cells.genes) > config.genes:
                own = highly_variable(cells, config.genes, chosen_on=cells.subset(known))
            train, test = own.subset(known), own.subset(~known)
            runs = {
                f"{family}, {trained}": fitted(training_cells(own, known, trained), family, config)
                for family in FAMILIES
                for trained in TRAINED
            }
            _predict(kept, train, test, runs)
            if len(cells.present) > 1:
                worlds += [{"data": name, "fold": number, **r} for r in worlds_scores(train, test, runs)]
            print(f"{name}, fold {number + 1} of {config.run_folds}", flush=True)
        each.append(_scored(kept, name, cells.proteins))
    proteins = pd.concat(each, ignore_index=True)
    tables = {"summary": summary(proteins), "differences": differences(proteins)}
    if worlds:
        found = pd.DataFrame(worlds)
        tables["counterfactual"] = spread(found, ["data", "what", "method"])
        tables["counterfactual_scores"] = found
    text = (
        f"{config.seeds} members, {config.run_folds} of {config.folds} folds; medians over proteins, mean and standard "
        "deviation over members."
    )
    return Results({**tables, "proteins": proteins}, {"proteins": figure(proteins)}, text)


def _predict(kept: _Guesses, train: EnvironmentDataset, test: EnvironmentDataset, runs: dict[str, Run]) -> None:
    kept.truth.append(logarithm(test.y))
    kept.env.append(test.env)
    guesses = simple(train, test)
    kept.centre.append(guesses["mean of all"])
    for method, guess in guesses.items():
        kept.add("RNA", method, guess[None], -1)
    for what, asked in (("RNA", without_proteins(test)), ("both", test)):
        for method, run in runs.items():
            guesses_of_members = predicted(run, asked)
            kept.add(what, method, guesses_of_members)
            kept.add(what, f"{method}{MEAN}", guesses_of_members.mean(0, keepdims=True), -1)


def _scored(kept: _Guesses, data: str, names: tuple[str, ...]) -> pd.DataFrame:
    truth, env, centre = np.concatenate(kept.truth), np.concatenate(kept.env), np.concatenate(kept.centre)
    parts = []
    for (shown, method, seed), several in kept.guesses.items():
        guess = np.concatenate(several)
        table = protein_scores(truth, guess, env, centre)
        # the number that was published: means of proteins, against the true ones
        means = [(truth[env == e].mean(0), guess[env == e].mean(0)) for e in np.unique(env)]
        table["r2 of means"] = np.mean([metrics.r2(a, b) for a, b in means])
        labels = {"data": data, "shown": shown, "method": method, "seed": seed, "protein": list(names)}
        parts.append(table.assign(**labels))
    return pd.concat(parts, ignore_index=True)


def summary(proteins: pd.DataFrame) -> pd.DataFrame:
    """Medians over proteins; mean and standard deviation over members."""
    keys = ["data", "shown", "method"]
    medians = proteins.drop(columns="protein").groupby([*keys, "seed"], sort=False).median()
    return spread(medians.reset_index(), keys)


def spread(scores: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Means over folds, then mean and standard deviation over members."""
    numbers = [c for c in scores.select_dtypes("number") if c not in ("seed", "fold")]
    members = scores.groupby([*keys, "seed"], sort=False)[numbers].mean()
    groups = members.groupby(keys, sort=False)
    table = groups.mean()
    for name in numbers:
        table[f"{name} sd"] = groups[name].std()
    return table[[c for name in numbers for c in (name, f"{name} sd")]]


def differences(proteins: pd.DataFrame) -> pd.DataFrame:
    """Product of experts less concatenation, in pairs over proteins: mean over members, with its interval."""
    rows = []
    means = proteins.groupby(["data", "shown", "method", "protein"])["r2"].mean()
    for data in proteins["data"].unique():
        for shown in proteins["shown"].unique():
            for trained in TRAINED:
                a, b = (means[data, shown, f"{family}, {trained}"] for family in reversed(FAMILIES))
                found = metrics.paired_difference(a.to_numpy(), b.reindex(a.index).to_numpy(), seed=0)
                of_medians = float(a.median() - b.median())
                rows.append([data, shown, trained, found.estimate, found.lower, found.upper, of_medians, len(a)])
    columns = ["data", "shown", "trained on", "difference", "lower", "upper", "of medians", "proteins"]
    return pd.DataFrame(rows, columns=columns).set_index(columns[:3])


def figure(proteins: pd.DataFrame) -> "Figure":
    """R2 of every protein, predicted from RNA."""
    from matplotlib.figure import Figure

    part = proteins[(proteins["shown"] == "RNA") & (proteins["method"] != "mean of all")]
    data = list(part["data"].unique())
    drawn = Figure(figsize=(5.5 * len(data), 4.2), layout="constrained")
    for axes, name in zip(drawn.subplots(1, len(data), squeeze=False)[0], data, strict=True):
        own = part[part["data"] == name].groupby(["method", "protein"], sort=False)["r2"].mean().unstack("method")
        methods = list(part["method"].unique())
        for i, method in enumerate(methods):
            values = own[method].clip(lower=-1).to_numpy()
            axes.plot(values, np.full(len(values), i), "o", ms=3, alpha=0.5, color="C0")
            axes.plot([np.median(values)] * 2, [i - 0.3, i + 0.3], color="k")
        axes.set(title=name, yticks=range(len(methods)), yticklabels=methods, xlabel="R2 of a protein (-1: or less)")
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, HeldOutProteins, main))
