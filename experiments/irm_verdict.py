"""Does invariant risk minimisation (IRM, seed section 4.7) help on environments whose spurious relations are reversed?

Two settings, each with relations that hold everywhere and relations that change from one training environment to the
next and are reversed in the environments that are held out (OOD).

Regression, the setting that IRM is made for: target genes are predicted from their regulators (the same law
everywhere) and from genes that they act on (strength a_e, -1 in OOD environments). The penalty's factor w is one for
all target genes, or one a gene.

Screens: an autoencoder of a synthetic latent SCM, in which a block of genes is spurious: ``loading``, s = a_e B c +
noise, or ``intercept``, s = a_e B shift_e + noise: a batch effect that goes with the perturbation. All genes are given
to the encoder and all are scored.

A weight of the penalty is chosen by the loss of validation environments, which are drawn like the training ones and
not trained on. Beside it stands the weight that is best on the OOD environments themselves: no procedure may use it,
and none can do better. What is asked: is the gap, OOD loss minus loss of unseen cells of training environments,
smaller by 30 %? A model that predicts nothing has hardly a gap, so the losses stand beside those of knowing nothing (a
Normal for each gene) and of knowing which relations hold (regulators alone; an autoencoder of the stable genes).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from anndata import AnnData
from matplotlib.figure import Figure
from torch import nn

import pyro_scm as ps
from experiments.launch import Results, launch
from pyro_scm import recipes
from pyro_scm.batch import Batch
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.distributions import normal
from pyro_scm.objectives import IRM, Objective, World
from pyro_scm.run import Run

TARGETS = (1, 4)  # target genes of the regressions; as many regulators and spurious genes
SITE = "y"
STABLE = "of stable genes"
AIM = 0.3
PARTICLES = 4
BEFORE = ["setting", "model", "screen"]


@dataclass(frozen=True)
class IrmVerdict:
    """Sizes.

    Args:
        screens: data sets of each setting, each with relations of its own.
        members: fits of each model to each; their mean is one result.
        cells: in each environment.
        epochs: of one step each, because a penalty of squared means is that of the environments only in large batches;
            seven times as many in the regressions, whose steps are cheap and which need them.
        weights: of the penalty, in regressions times 100, for they have 4 genes; 0 is the model without it.
        latent: of the screens, and as many of the model.
        kinds: of spurious relation in the screens.
        models: of the screens.
    """

    screens: int = 3
    members: int = 2
    cells: int = 100
    epochs: int = 200
    weights: tuple[float, ...] = (0.0, 0.1, 1.0, 10.0)
    latent: int = 4
    kinds: tuple[str, ...] = ("loading",)
    models: tuple[str, ...] = ("vae", "environment_vae")

    @classmethod
    def preset(cls, name: str) -> "IrmVerdict":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(screens=1, members=1, cells=60, epochs=70, weights=(0.0, 10.0), models=("vae",))
        if name == "paper":
            return cls(screens=10)
        return cls()


@dataclass(frozen=True)
class Parts:
    """Cells of one setting: to train on, of the same environments but unseen, and of two sets of other environments."""

    train: EnvironmentDataset
    inside: EnvironmentDataset
    validation: EnvironmentDataset
    ood: EnvironmentDataset
    spurious: np.ndarray[Any, Any]
    """``[G]`` which genes are."""

    def of(self, genes: np.ndarray[Any, Any]) -> "Parts":
        """The same cells with these genes only."""
        fewer = {
            name: replace(cells, x=np.asarray(cells.x)[:, genes], var=cells.var[genes])
            for name in ("train", "inside", "validation", "ood")
            for cells in (getattr(self, name),)
        }
        return Parts(**fewer, spurious=self.spurious[genes])


# ---------------------------------------------------------------------- data
def strengths(environments: int, trained: int, validated: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """a_e ``[E]``: between 0.2 and 1.8 in training and validation environments, -1 in those after them."""
    a = rng.uniform(0.2, 1.8, environments)
    a[trained + validated :] = -1.0
    return a


def parted(adata: AnnData, representation: Any, trained: int, validated: int, spurious: np.ndarray[Any, Any]) -> Parts:
    """The first environments are trained on (three cells of four), then come validation, then OOD environments."""
    cells = EnvironmentDataset.from_anndata(
        adata, environment="perturbation", control=synthetic.CONTROL, representation=representation, counts=False
    )
    order = list(cells.environments["perturbation"].astype(str))
    names = list(adata.obs["perturbation"].cat.categories)
    number = np.array([names.index(n) for n in order])[cells.env]
    kept = np.arange(len(cells)) % 4 != 0

    def some(chosen: np.ndarray[Any, Any]) -> EnvironmentDataset:
        return cells.subset(np.flatnonzero(chosen))

    return Parts(
        train=some((number < trained) & kept),
        inside=some((number < trained) & ~kept),
        validation=some((number >= trained) & (number < trained + validated)),
        ood=some(number >= trained + validated),
        spurious=spurious,
    )


def regression_cells(screen: int, cells: int, targets: int) -> Parts:
    """Regulators u, targets y = W u + noise, spurious genes s = a_e y + noise; 6 + 2 + 2 environments."""
    rng = np.random.default_rng([screen, 0, targets])
    trained, validated, environments = 6, 2, 10
    a = strengths(environments, trained, validated, rng)
    env = np.repeat(np.arange(environments), cells)
    u = rng.normal(size=(len(env), targets))
    w = rng.choice([-1.0, 1.0], (targets, targets)) / targets**0.5
    y = u @ w + rng.normal(size=(len(env), targets))
    s = a[env, None] * y + 0.7 * rng.normal(size=y.shape)
    names = [synthetic.CONTROL, *(f"env_{e}" for e in range(1, environments))]
    adata = AnnData(
        np.concatenate([u, s, y], 1).astype(np.float32),
        obs=pd.DataFrame(
            {"perturbation": pd.Categorical(np.array(names)[env], categories=names)},
            index=[f"cell_{i}" for i in range(len(env))],
        ),
    )
    return parted(adata, "one-hot", trained, validated, np.repeat([False, True, False], targets))


def screen_cells(screen: int, cells: int, latent: int, kind: str) -> Parts:
    """A synthetic screen, two genes of three stable; each latent is moved in 3 environments: 6/12 + 2/12 + 4/12.

    Args:
        screen: seed.
        cells: in each environment.
        latent: d.
        kind: ``"loading"`` or ``"intercept"``.
    """
    rng = np.random.default_rng([screen, 1])
    environments, ood = 3 * latent + 1, latent
    validated = max(1, latent // 2)
    trained = environments - ood - validated
    adata = synthetic.simulate(
        latent=latent, genes=4 * latent, environments=environments, cells=cells, graph="empty", decoder="linear",
        noise=0.5, strength=3.0, constant=True, descriptors=2 * latent, seed=screen,
    )  # fmt: skip
    env = adata.obs["perturbation"].cat.codes.to_numpy()
    a = strengths(environments, trained, validated, rng)
    b = rng.normal(size=(latent, 2 * latent))
    cause = adata.obsm["c"] if kind == "loading" else adata.uns["truth"]["shift"][env]
    s = a[env, None] * (cause @ b) + 0.5 * rng.normal(size=(len(env), 2 * latent))
    names = [*adata.var_names, *(f"spurious_{i}" for i in range(2 * latent))]
    whole = AnnData(np.concatenate([adata.X, s], 1).astype(np.float32), obs=adata.obs, var=pd.DataFrame(index=names))
    spurious = np.arange(len(names)) >= adata.n_vars
    return parted(whole, adata.uns["descriptors"], trained, validated, spurious)


# ---------------------------------------------------------------------- the regression as a Pyro program
class Regression(nn.Module):
    """y | u, s ~ N(W (u, s), sigma^2), where x = (u, s, y) is given.

    Args:
        targets: length of u, s and y.
    """

    def __init__(self, targets: int) -> None:
        super().__init__()
        self.targets = targets
        self.net = nn.Linear(2 * targets, targets, bias=False)
        self.raw_scale = nn.Parameter(torch.zeros(targets))

    def reset_parameters(self) -> None:
        """Scale 1."""
        with torch.no_grad():
            self.raw_scale.zero_()

    def forward(self, batch: Batch) -> None:
        """Site ``y``."""
        assert batch.x is not None
        given, y = batch.x[:, : 2 * self.targets], batch.x[:, 2 * self.targets :]
        with batch.plate():
            pyro.sample(SITE, normal(self.net(given), self.raw_scale.clamp(-4, 4).exp()), obs=y)


class Nothing(nn.Module):
    """The guide of a model without latent sites."""

    def forward(self, batch: Batch) -> None:
        """No site."""


# ---------------------------------------------------------------------- references
def marginal(parts: Parts, columns: np.ndarray[Any, Any]) -> dict[str, float]:
    """Loss of a Normal for each of these genes by itself, fitted to all training cells: what knowing nothing costs."""
    x = np.asarray(parts.train.x, np.float64)[:, columns]
    mean, variance = x.mean(0), x.var(0)
    row = {}
    for name in ("inside", "validation", "ood"):
        cells = getattr(parts, name)
        each = np.log(2 * np.pi * variance) + (np.asarray(cells.x, np.float64)[:, columns] - mean) ** 2 / variance
        by_cell = 0.5 * each.sum(1)
        row[name] = float(np.mean([by_cell[cells.env == e].mean() for e in cells.present]))
    return row


def least_squares(parts: Parts, used: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> dict[str, float]:
    """Loss of the targets' regression on some genes alone."""
    x = np.asarray(parts.train.x, np.float64)
    weight, *_ = np.linalg.lstsq(x[:, used], x[:, targets], rcond=None)
    variance = (x[:, targets] - x[:, used] @ weight).var(0)
    row = {}
    for name in ("inside", "validation", "ood"):
        cells = getattr(parts, name)
        values = np.asarray(cells.x, np.float64)
        squares = (values[:, targets] - values[:, used] @ weight) ** 2 / variance
        row[name] = float(0.5 * (np.log(2 * np.pi * variance) + squares).sum(1).mean())
    return row


# ---------------------------------------------------------------------- fits and losses
class Weighted(IRM):
    """The penalty with a weight of each member's own, so that all weights are trained in one ensemble.

    Args:
        weights: W; the members with seeds s, W + s, 2 W + s, ... have the weight of position s.
        **options: of `IRM`.
    """

    def __init__(self, weights: Sequence[float], **options: Any) -> None:
        super().__init__(warmup=0.3, **options)
        self.weights = tuple(weights)
        self.own = nn.Parameter(torch.ones(()))  # a parameter, for members to have their own; it has no gradient

    def reset_parameters(self) -> None:
        """The weight that belongs to the seed in use."""
        with torch.no_grad():
            self.own.fill_(self.weights[torch.initial_seed() % len(self.weights)])

    def penalty(self, world: World) -> torch.Tensor:
        """Weighted already."""
        return (self.own.detach() + 0 * self.own) * super().penalty(world)


def of_weight(run: Run, weights: Sequence[float], position: int) -> list[tuple[nn.Module, nn.Module]]:
    """Model and guide of the members with the weight of this position."""
    return [run.member(k) for k, seed in enumerate(run.seeds) if seed % len(weights) == position]


def losses(
    fitted: Sequence[tuple[nn.Module, nn.Module]],
    cells: EnvironmentDataset,
    spurious: np.ndarray[Any, Any],
    site: str = "x",
) -> dict[str, float]:
    """-ELBO in nats per cell, and -log p of stable and of spurious genes, means over environments and members."""
    rows = []
    columns = {"spurious": spurious, "stable": ~spurious} if site == "x" else {}
    for model, guide in fitted:
        for e in cells.present:
            batch = cells.subset(np.flatnonzero(cells.env == e)).batch()
            torch.manual_seed(0)
            with torch.no_grad():
                worlds = [Objective().world(model, guide, batch) for _ in range(PARTICLES)]
                found = {"loss": float(np.mean([Objective().terms(w).loss() for w in worlds])) / len(batch)}
                for name, chosen in columns.items():
                    each = [w.model[site]["fn"].base_dist.log_prob(w.model[site]["value"]) for w in worlds]
                    found[name] = -float(torch.stack(each).mean((0, 1))[torch.as_tensor(chosen)].sum())
            rows.append(found)
    means: dict[str, float] = pd.DataFrame(rows).mean().to_dict()
    return means


def scored(fitted: Sequence[tuple[nn.Module, nn.Module]], parts: Parts, site: str = "x") -> dict[str, float]:
    """Losses inside, on validation environments and OOD."""
    row = {}
    for name in ("inside", "validation", "ood"):
        found = losses(fitted, getattr(parts, name), parts.spurious, site)
        row |= {name if what == "loss" else f"{name} {what}": value for what, value in found.items()}
    return row


def regressions(config: IrmVerdict, screen: int, targets: int) -> list[dict[str, Any]]:
    """Every weight, with one factor w for all target genes and one for each; and what is known without the penalty."""
    parts, rows = regression_cells(screen, 3 * config.cells, targets), []
    label = {"setting": f"regression, {targets} gene{'s'[: targets > 1]}", "screen": screen}
    weights = [100 * w for w in config.weights]
    for name, each in (("one w", False), ("a w each gene", True))[:targets]:
        run = ps.fit(
            Regression(targets), Nothing(), parts.train, seeds=range(len(weights) * config.members),
            epochs=7 * config.epochs, batch_size=len(parts.train), lr=2e-2, progress=False,
            objective=Objective(penalties={"irm": Weighted(weights, site=SITE, each=each)}),
        )  # fmt: skip
        for position, weight in enumerate(weights):
            fitted = of_weight(run, weights, position)
            net = torch.stack(
                [p.detach().abs() for model, _ in fitted for n, p in model.named_parameters() if "net" in n]
            )
            share = float(net[..., targets:].sum() / net.sum())
            found = scored(fitted, parts, SITE)
            rows.append({**label, "model": name, "weight": weight, **found, "share on spurious": share})
    kind = np.repeat(["regulator", "spurious", "target"], targets)
    known = {
        "regulators alone": least_squares(parts, kind == "regulator", kind == "target"),
        "least squares": least_squares(parts, kind != "target", kind == "target"),
        "nothing": marginal(parts, kind == "target"),
    }
    return rows + [{**label, "model": name, **found} for name, found in known.items()]


def autoencoders(config: IrmVerdict, screen: int, kind: str) -> list[dict[str, Any]]:
    """Every weight and model on one screen."""
    parts, rows = screen_cells(screen, config.cells, config.latent, kind), []
    rows.append({"setting": kind, "model": "nothing", "screen": screen, **marginal(parts, parts.spurious | True)})
    for name in config.models:
        run = _autoencoder(config, name, parts, config.weights)
        for position, weight in enumerate(config.weights):
            found = scored(of_weight(run, config.weights, position), parts)
            rows.append({"setting": kind, "model": name, "screen": screen, "weight": weight, **found})
        rows += of_stable_genes(config, name, parts, {"setting": kind, "screen": screen})
    return rows


def of_stable_genes(config: IrmVerdict, name: str, parts: Parts, label: dict[str, Any]) -> list[dict[str, Any]]:
    """The same model of stable genes alone, with every weight too; of the spurious ones it knows nothing.

    Without the penalty it is what should be learnt; with it there is nothing to be won.
    """
    stable, unknown = parts.of(~parts.spurious), marginal(parts, parts.spurious)
    run, rows = _autoencoder(config, name, stable, config.weights), []
    for position, weight in enumerate(config.weights):
        found = scored(of_weight(run, config.weights, position), stable)
        sums = {n: found[n] + unknown[n] for n in unknown}
        rows.append({**label, "model": f"{name} {STABLE}", "weight": weight, **sums})
    return rows


def _autoencoder(config: IrmVerdict, name: str, parts: Parts, weights: Sequence[float]) -> Run:
    own: dict[str, Any] = {"environment_hidden": ()} if name == "environment_vae" else {}
    model, guide = recipes.make(name, parts.train.schema, latent=config.latent, hidden=(), guide_hidden=(32,), **own)
    return ps.fit(
        model, guide, parts.train, seeds=range(len(weights) * config.members), epochs=config.epochs,
        batch_size=len(parts.train), lr=2e-2, objective=Objective(penalties={"irm": Weighted(weights)}), progress=False,
    )  # fmt: skip


# ---------------------------------------------------------------------- the verdict
def chosen(scores: pd.DataFrame, by: str) -> pd.DataFrame:
    """The weight above 0 with the lowest loss `by`, of each data set and model."""
    tried = scores[scores["weight"] > 0]
    return tried.loc[tried.groupby(BEFORE)[by].idxmin()]


def cuts(scores: pd.DataFrame) -> pd.DataFrame:
    """Of each data set and model: gap without the penalty, and what is left with it, weights by validation and by OOD.

    ``free`` may also choose weight 0: what somebody would get who uses IRM only where validation says that it helps.
    """
    scores = scores.assign(gap=scores["ood"] - scores["inside"])
    without = scores[scores["weight"] == 0].set_index(BEFORE)
    free = scores.loc[scores.groupby(BEFORE)["validation"].idxmin()]
    picks = {"validation": chosen(scores, "validation"), "free": free, "best on OOD": chosen(scores, "ood")}
    tables = []
    for name, table in picks.items():
        own = table.set_index(BEFORE)
        tables.append(
            pd.DataFrame(
                {
                    "choice": name,
                    "weight": own["weight"],
                    "gap without": without["gap"],
                    "gap": own["gap"],
                    "cut": 1 - own["gap"] / without["gap"],
                    "ood": own["ood"],
                    "ood change": own["ood"] - without["ood"],
                    "inside change": own["inside"] - without["inside"],
                }
            ).reset_index()
        )
    return pd.concat(tables, ignore_index=True)


def interval(gap: np.ndarray[Any, Any], without: np.ndarray[Any, Any]) -> tuple[float, float]:
    """95 % of 1 - mean gap / mean gap without, when data sets are drawn with replacement; NaN for a single one."""
    if len(gap) < 2:
        return float("nan"), float("nan")
    rows = np.random.default_rng(0).integers(len(gap), size=(5000, len(gap)))
    low, high = np.quantile(1 - gap[rows].mean(1) / without[rows].mean(1), [0.025, 0.975])
    return float(low), float(high)


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Means over data sets, with the standard deviation of the cut and an interval of the mean cut of the gap.

    The mean cut is 1 - mean gap / mean gap without: a ratio of means, which single small gaps do not rule.
    """
    rows = []
    for (setting, model, choice), own in table.groupby(["setting", "model", "choice"], sort=False):
        base = own["gap without"].mean()
        low, high = interval(own["gap"].to_numpy(), own["gap without"].to_numpy())
        rows.append(
            {
                "setting": setting,
                "model": model,
                "choice": choice,
                "data sets": len(own),
                "median weight": own["weight"].median(),
                "gap without": base,
                "gap": own["gap"].mean(),
                "cut": 1 - own["gap"].mean() / base,
                "cut low": low,
                "cut high": high,
                "cut sd": own["cut"].std(),
                "ood": own["ood"].mean(),
                "ood change": own["ood change"].mean(),
                "inside change": own["inside change"].mean(),
                "cut by 30 %": bool(1 - own["gap"].mean() / base >= AIM),
                "surely": bool(low >= AIM),
            }
        )
    return pd.DataFrame(rows).set_index(["setting", "model", "choice"])


def main(config: IrmVerdict) -> Results:
    rows: list[dict[str, Any]] = []
    for screen in range(config.screens):
        for targets in TARGETS:
            rows += regressions(config, screen, targets)
        for kind in config.kinds:
            rows += autoencoders(config, screen, kind)
        print(f"screen {screen + 1} of {config.screens}", flush=True)
    return told(pd.DataFrame(rows))


def told(scores: pd.DataFrame) -> Results:
    """Tables, figure and sentences of all fits."""
    fitted = scores[scores["weight"].notna() & ~scores["model"].str.endswith(STABLE)]
    each = cuts(fitted)
    summary = verdicts(each)
    by = ["setting", "model", "weight"]
    weights = scores.assign(gap=scores["ood"] - scores["inside"]).groupby(by, sort=False, dropna=False)
    means = weights[["inside", "validation", "ood", "gap", "ood stable", "ood spurious", "share on spurious"]].mean()
    return Results(
        tables={"verdict": summary, "weights": means, "cuts": each, "scores": scores},
        figures={"gap": figure(fitted)},
        text=sentence(summary, scores[scores["model"] == "nothing"].groupby("setting")["ood"].mean()),
    )


def sentence(summary: pd.DataFrame, nothing: "pd.Series[float]") -> str:
    """One line for each setting and model.

    Args:
        summary: of `verdicts`.
        nothing: setting -> OOD loss of knowing nothing.
    """
    lines = []
    for (setting, model), own in summary.sort_index().groupby(level=[0, 1]):
        row, free, best = (own.xs(c, level=2).iloc[0] for c in ("validation", "free", "best on OOD"))
        lines.append(
            f"{setting}, {model}: gap {row['gap without']:.2f} -> {row['gap']:.2f} nats per cell, cut by "
            f"{row['cut']:.0%} [{row['cut low']:.0%}, {row['cut high']:.0%}] ({free['cut']:.0%} where validation may "
            f"choose no penalty, {best['cut']:.0%} with the weight best on OOD). OOD loss {row['ood']:.2f}, at best "
            f"{best['ood']:.2f}; of a model that knows nothing {nothing[setting]:.2f}."
        )
    return "\n".join(lines)


def figure(scores: pd.DataFrame) -> Figure:
    """Gap against weight, a line a data set."""
    panels = list(scores.groupby(["setting", "model"], sort=False))
    drawn = Figure(figsize=(2.8 * len(panels), 3), layout="constrained")
    for axis, ((setting, model), part) in zip(np.ravel(drawn.subplots(1, len(panels))), panels, strict=True):
        weights: Sequence[float] = sorted(part["weight"].unique())
        for _, line in part.groupby("screen"):
            own = line.sort_values("weight")
            axis.plot(range(len(weights)), own["ood"] - own["inside"], color="0.6", lw=0.8)
        mean = (part["ood"] - part["inside"]).groupby(part["weight"]).mean()
        axis.plot(range(len(weights)), mean.loc[list(weights)], color="C0", marker="o")
        axis.set_xticks(range(len(weights)), [f"{w:g}" for w in weights])
        axis.set(title=f"{setting}\n{model}", xlabel="weight of the penalty")
    drawn.axes[0].set_ylabel("OOD - inside, nats per cell")
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, IrmVerdict, main))
