"""Does CPA's adversary help? Held-out combinations of perturbation and cell type, and what basal states still tell.

CPA in two forms: variational with a guide that is told the perturbation (the default here), and as published, an
autoencoder whose encoder sees expression alone. Each with nothing beside its reconstruction; with adversaries that read
perturbation and cell type off the basal state; and with a penalty on the dependence of basal state and perturbation,
HSIC or MMD, in place of a second player. Scored are the change of mean expression in combinations that were not trained
on, beside the mean change of the other cell types; and probes, trained classifiers of perturbation and cell type, on
the basal states of cells kept aside (`ps.disentanglement`). By the argument for the adversary a basal state that tells
less should predict better.

Data: Kang et al. 2018 (blood cells, interferon beta; needs PYRO_SCM_DATA with kang_pbmc_ifnb/), and a simulated screen.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import pyro_scm as ps
from experiments.launch import Results, data_folder, launch
from pyro_scm import metrics, recipes
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.evaluation import predict_means
from pyro_scm.run import Run

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

FloatArray: TypeAlias = NDArray[np.float64]

CONTROL, TYPE = "control", "cell_type"
_BATCH = 512
FORMS: dict[str, dict[str, Any]] = {
    "variational": {},
    "published": {"prior": "flat", "family": "point", "inputs": ("x",)},
}
PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "adversary 1": {"adversary": 1.0},
    "adversary 10": {"adversary": 10.0},
    "HSIC": {"independence": 10.0, "measure": "hsic"},
    "MMD": {"independence": 10.0, "measure": "mmd"},
}


@dataclass(frozen=True)
class AdversaryHelps:
    """Sizes.

    Args:
        data: of ``"kang"`` and ``"simulated"``.
        penalties: of `PENALTIES`.
        combinations: held out, each in a training of its own.
        seeds: members of each model.
        genes: of Kang, those of largest variance in training.
        latent: of the models.
        hidden: units of their one hidden layer.
        steps: of training, of batches of 512 cells.
        lr: of training, falling to 0.
        permutations: of the probes' level of chance.
    """

    data: tuple[str, ...] = ("simulated",)
    penalties: tuple[str, ...] = tuple(PENALTIES)
    combinations: int = 1
    seeds: int = 2
    genes: int = 300
    latent: int = 10
    hidden: int = 64
    steps: int = 150
    lr: float = 1e-2
    permutations: int = 2

    @classmethod
    def preset(cls, name: str) -> "AdversaryHelps":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(penalties=("none", "adversary 1"), hidden=16, permutations=1, steps=100)
        if name == "paper":
            return cls(data=("simulated", "kang"), combinations=3, seeds=5, genes=500, steps=600)
        return cls()


# ---------------------------------------------------------------------- data
def read(name: str) -> EnvironmentDataset:
    """Cells with their perturbation and the covariate ``cell_type``."""
    adata = simulated() if name == "simulated" else _kang()
    return EnvironmentDataset.from_anndata(
        adata, environment="condition", control=CONTROL, covariates=[TYPE], representation="multi-hot", counts=False
    )


def _kang() -> "AnnData":
    import anndata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a file of an old AnnData
        adata = anndata.read_h5ad(data_folder("kang_pbmc_ifnb") / "kang_pbmc_ifnb_log1p.h5ad")
    return anndata.AnnData(X=adata.X, obs=adata.obs[["condition", TYPE]].copy(), var=adata.var[[]].copy())


def simulated(seed: int = 0, cells: int = 60) -> "AnnData":
    """Four cell types and five conditions that add in five latents; 50 genes are a network of them, with noise."""
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    conditions = [CONTROL, *(f"drug {i}" for i in range(4))]
    moves = np.vstack([np.zeros(5), 2.5 * np.eye(5)[:4]])
    own = rng.normal(size=(4, 5))
    condition, kind = (a.ravel() for a in np.meshgrid(np.arange(5), np.arange(4)))
    condition, kind = np.repeat(condition, cells), np.repeat(kind, cells)
    c = rng.normal(size=(len(kind), 5)) + moves[condition] + 1.5 * own[kind]
    hidden = np.tanh(c @ rng.normal(size=(5, 40)) / 2)
    x = hidden @ rng.normal(size=(40, 50)) / 3 + 0.3 * rng.normal(size=(len(kind), 50))
    obs = pd.DataFrame(
        {"condition": np.array(conditions)[condition], TYPE: [f"type {k}" for k in kind]},
        index=[f"c{i}" for i in range(len(kind))],
    )
    return AnnData(X=x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(50)]))


@dataclass(frozen=True, eq=False)
class Task:
    """A combination that is not trained on.

    Args:
        train: cells of all other combinations, without those of `aside`.
        aside: a fifth of the cells of these combinations, for the probes; their controls are scored against.
        held_out: cells of the combination.
        condition: its perturbation.
        kind: its cell type.
    """

    train: EnvironmentDataset
    aside: EnvironmentDataset
    held_out: EnvironmentDataset
    condition: str
    kind: str

    def controls(self, cells: EnvironmentDataset) -> EnvironmentDataset:
        """Unperturbed cells of the combination's type."""
        code = cells.categories[TYPE].index(self.kind)
        return cells.subset(cells.reference[cells.env] & (cells.covariates[TYPE] == code))


def tasks(cells: EnvironmentDataset, number: int, genes: int) -> Iterator[Task]:
    """Combinations in turn: the first perturbation with the first cell type, the second with the second, ..."""
    conditions = [str(n) for n, r in zip(cells.environments.index, cells.reference, strict=True) if not r]
    kinds = _largest_first(cells)
    for i in range(number):
        condition, kind = conditions[i % len(conditions)], kinds[i % len(kinds)]
        split = splits.by_combination(cells, covariate=TYPE, held_out=[(condition, kind)])
        aside = np.random.default_rng(i).random(len(split.train)) < 0.2
        train, rest, held_out = split.train.subset(~aside), split.train.subset(aside), split.test
        if len(cells.genes) > genes:
            spread = np.asarray(train.schema.summary.scale)
            keep = np.sort(np.argsort(-spread, kind="stable")[:genes])
            train, rest, held_out = (replace(p, x=p.x[:, keep], var=p.var.iloc[keep]) for p in (train, rest, held_out))
        yield Task(train, rest, held_out, condition, kind)


def _largest_first(cells: EnvironmentDataset) -> list[str]:
    """Cell types, those of most cells first."""
    counts = np.bincount(cells.covariates[TYPE], minlength=len(cells.categories[TYPE]))
    return [cells.categories[TYPE][i] for i in np.argsort(-counts, kind="stable")]


# ---------------------------------------------------------------------- models
def fitted(task: Task, form: str, penalty: str, config: AdversaryHelps) -> Run:
    """All seeds together."""
    model, guide = recipes.make(
        "cpa", task.train.schema, latent=config.latent, hidden=(config.hidden,), guide_hidden=(config.hidden,),
        covariates=(TYPE,), **FORMS[form],
    )  # fmt: skip
    objective = recipes.objective("cpa", model, task.train, **PENALTIES[penalty])
    return ps.fit(
        model, guide, task.train, seeds=range(config.seeds), objective=objective,
        critic_steps=recipes.RECIPES["cpa"].critic_steps, epochs=max(2, round(config.steps * _BATCH / len(task.train))),
        batch_size=_BATCH, lr=config.lr, schedule="cosine", device="cpu", progress=False,
    )  # fmt: skip


def others_change(task: Task) -> FloatArray:
    """Mean change of the perturbation in the cell types that training has it in."""
    x, train = _dense(task.train), task.train
    perturbed = train.env == train.environment_index(task.condition)[0]
    control = train.reference[train.env]
    kinds = train.covariates[TYPE]
    each = [
        x[perturbed & (kinds == k)].mean(0) - x[control & (kinds == k)].mean(0) for k in np.unique(kinds[perturbed])
    ]
    return np.asarray(np.mean(each, axis=0))


def _dense(cells: EnvironmentDataset) -> FloatArray:
    x: Any = cells.x[np.arange(len(cells))]
    return np.asarray(x if isinstance(x, np.ndarray) else x.toarray(), np.float64)


# ---------------------------------------------------------------------- scores
def scored(true: FloatArray, change: FloatArray) -> dict[str, float]:
    """Of a predicted change of mean expression."""
    zero = np.zeros_like(true)
    return {
        "delta pearson": metrics.delta_pearson(true, change, zero) if change.std() > 1e-9 else float("nan"),
        "delta r2": metrics.delta_r2(true, change, zero),
    }


def rows(task: Task, config: AdversaryHelps) -> Iterator[dict[str, Any]]:
    """One row for each baseline, and for each member of each model."""
    # the controls that are scored against are not those that are predicted from: their noise is no agreement
    true = _dense(task.held_out).mean(0) - _dense(task.controls(task.aside)).mean(0)
    about = {"held out": f"{task.condition}, {task.kind}"}
    yield about | {"form": "baseline", "penalty": "no change", "seed": -1} | scored(true, np.zeros_like(true))
    yield about | {"form": "baseline", "penalty": "other cell types", "seed": -1} | scored(true, others_change(task))
    start = task.controls(task.train)
    for form in FORMS:
        for penalty in config.penalties:
            run = fitted(task, form, penalty, config)
            changes = predict_means(run, start, [task.condition])[:, 0] - _dense(start).mean(0)
            probe = ps.disentanglement(run, task.aside, permutations=config.permutations)
            for k, change in enumerate(changes):
                own = probe[probe["seed"] == run.seeds[k]].set_index("label")
                row: dict[str, Any] = {"form": form, "penalty": penalty, "seed": run.seeds[k]}
                for label, name in (("environment", "perturbation"), (TYPE, "cell type")):
                    # 0 at chance, 1 where every cell is recognised
                    chance = float(own.loc[label, "chance"])  # type: ignore[arg-type]
                    row[f"told {name}"] = (float(own.loc[label, "accuracy"]) - chance) / (1 - chance)  # type: ignore[arg-type]
                yield about | row | scored(true, change)


def main(config: AdversaryHelps) -> Results:
    found: list[dict[str, Any]] = []
    for data in config.data:
        for task in tasks(read(data), config.combinations, config.genes):
            for row in rows(task, config):
                found.append({"data": data, **row})
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in found[-1].items()}, flush=True)
    scores = pd.DataFrame(found)
    text = f"{config.seeds} members, {config.combinations} held-out combinations; told: 0 is chance, 1 every cell."
    tables = {"summary": summary(scores), "differences": differences(scores, config.penalties), "scores": scores}
    return Results(tables, {"scores": figure(scores)}, text)


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over held-out combinations; then mean and standard deviation over members."""
    keys = ["data", "form", "penalty"]
    members = scores.drop(columns="held out").groupby([*keys, "seed"], sort=False).mean()
    groups = members.groupby(keys, sort=False)
    spread = groups[["delta pearson", "delta r2"]].std().add_suffix(" sd")
    return groups.mean().join(spread)


def differences(scores: pd.DataFrame, penalties: Sequence[str]) -> pd.DataFrame:
    """Each penalty less none, in pairs of the same data, combination and seed, with a bootstrap interval."""
    out = []
    for (data, form), own in scores[scores["form"] != "baseline"].groupby(["data", "form"], sort=False):
        for score in ("delta pearson", "delta r2", "told perturbation", "told cell type"):
            table = own.pivot(index=["held out", "seed"], columns="penalty", values=score)
            for penalty in penalties:
                if penalty == "none" or "none" not in table:
                    continue
                found = metrics.paired_difference(table[penalty].to_numpy(), table["none"].to_numpy(), seed=0)
                out.append([data, form, penalty, score, found.estimate, found.lower, found.upper, len(table)])
    columns = ["data", "form", "penalty", "score", "difference", "lower", "upper", "pairs"]
    return pd.DataFrame(out, columns=columns).set_index(columns[:4])


def figure(scores: pd.DataFrame) -> "Figure":
    """What is predicted against what the basal state tells."""
    from matplotlib.figure import Figure

    data = list(scores["data"].unique())
    drawn = Figure(figsize=(5 * len(data), 4), layout="constrained")
    for axes, name in zip(drawn.subplots(1, len(data), squeeze=False)[0], data, strict=True):
        own = scores[scores["data"] == name]
        for f, form in enumerate(FORMS):
            for p, penalty in enumerate(own[own["form"] == form]["penalty"].unique()):
                part = own[(own["form"] == form) & (own["penalty"] == penalty)]
                label = f"{form}, {penalty}"
                axes.plot(part["told perturbation"], part["delta pearson"], "os"[f], color=f"C{p}", ms=4, label=label)
        best = own[own["penalty"] == "other cell types"]["delta pearson"].mean()
        axes.axhline(best, color="#6e7781", lw=0.8, ls="--")
        axes.set(title=name, xlabel="perturbation told by the basal state (0: chance)", ylabel="delta pearson")
    axes.legend(fontsize=6)
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, AdversaryHelps, main))
