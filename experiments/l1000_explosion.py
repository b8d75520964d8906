"""Why losses on L1000 explode in unseen environments (figure 10 of the seed), and what keeps them from it.

Out-of-distribution reconstruction (mean squared error per gene of wells in environments that no model has seen) after
every epoch, of a variational autoencoder as published: sigma of the encoder an unbounded exponential, squared error
(sigma^2 = 1/2 of the likelihood), learning rate 1e-3, batches of 32, no clipping, expression as it is. Then each remedy
alone, all of them, all but one, and the suite's models with its default settings.

Two sources of data: "plates", LINCS L1000 A375 (compounds of LJP005 are trained on, other compounds of LJP009 are
unseen; an environment is a compound at its dose; z-scores against the vehicle wells, clipped at 10), which needs
PYRO_SCM_DATA with l1000_a375/; and "stand-in", synthetic signatures of the seed's shape, stronger in unseen
environments.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor, nn

from experiments.l1000_unseen_drugs import wells
from experiments.launch import UNSEEN_ENVIRONMENT_MODELS, Results, launch
from guides import AmortisedGuide, amortise
from guides.encoders import GaussianEncoder
from pyro_scm import infer, recipes
from pyro_scm.batch import Batch, Schema, Statistics
from pyro_scm.chance import forked
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.distributions import normal
from pyro_scm.ensemble import System
from pyro_scm.errors import DataError, TrainingError
from pyro_scm.model import LatentModel
from pyro_scm.objectives import Objective
from pyro_scm.query import abduct, isolated
from pyro_scm.run import Settings
from pyro_scm.sites import X, Z
from pyro_scm.training import Trainer

MODELS: dict[str, dict[str, Any]] = {"ae": {}, **UNSEEN_ENVIRONMENT_MODELS}
"""The suite's models of figure 10, with their options."""

_BOUND = 10.0  # of z-scores, as LINCS clips them
_LOST = 1e12  # mean squared error beyond which nothing is left to learn from a curve
_SLACK = 1.05  # a loss that ends within 5 % of its minimum has not risen
_LATER = 3  # times the epochs of the minimum
_ERRORS = ("sampled", "mean", "largest sigma")


# ---------------------------------------------------------------------- how a VAE is trained
@dataclass(frozen=True)
class Arm:
    """A way to train; the defaults are the seed's, each other value is a remedy.

    Args:
        bounded: sigma of the encoder is softplus + floor, instead of exp(raw / 2).
        learnt: sigma_g of the likelihood is learnt, instead of sigma^2 = 1/2.
        standardised: the encoder reads, and the decoder writes, standardised expression, clamped at 10 sd.
        lr: of Adam.
        clip: largest norm of a gradient, nats per cell.
    """

    bounded: bool = False
    learnt: bool = False
    standardised: bool = False
    lr: float = 1e-3
    clip: float | None = None


REMEDIES: dict[str, dict[str, Any]] = {
    "bounded scale": {"bounded": True},
    "learnt variance": {"learnt": True},
    "standardised input": {"standardised": True},
    "lower rate": {"lr": 1e-4},
    "clipping": {"clip": 100.0},
}
"""Remedies that change training; evaluating at the posterior mean instead of a sample is read off the same fits."""

PUBLISHED = "as published"


def arms() -> dict[str, Arm]:
    """As published, one remedy added, all, all but one."""
    everything = Arm(**{k: v for given in REMEDIES.values() for k, v in given.items()})
    seed = Arm()
    return {
        PUBLISHED: seed,
        **{f"+ {name}": replace(seed, **given) for name, given in REMEDIES.items()},
        "all remedies": everything,
        **{
            f"all - {name}": replace(everything, **{k: getattr(seed, k) for k in given})
            for name, given in REMEDIES.items()
        },
    }


class PublishedEncoder(GaussianEncoder):
    """q(z | x) = N(mu(x), exp(raw(x))), x as it is: what the suite's own encoder is made not to be."""

    def _expression(self, batch: Batch) -> Tensor:
        assert batch.x is not None
        return (batch.x - self.mean) / self.spread

    def forward(self, batch: Batch) -> Any:
        """Normal of batch shape (n,), event shape (d,); its scale overflows where raw is beyond 177."""
        loc, raw = self._encode(batch).chunk(2, -1)
        return normal(loc, (0.5 * raw).exp())


def compose(
    name: str, arm: Arm, schema: Schema, latent: int, hidden: Sequence[int]
) -> tuple[LatentModel, AmortisedGuide]:
    """Model and guide of one arm."""
    if not arm.standardised:
        schema = replace(schema, statistics=Statistics.neutral(len(schema.genes)))
    recipe = recipes.recipe(name)
    options = {"hidden": hidden, "likelihood": "normal" if arm.learnt else "normal-fixed", **MODELS[name]}
    if "environment_hidden" in recipe.options:
        options["environment_hidden"] = hidden
    model = recipe.build(schema, latent=latent, **options)
    guide = amortise(model, schema, inputs=recipe.inputs, hidden=hidden, family=recipe.family)
    if not arm.bounded and recipe.family == "normal":
        guide.local[Z] = PublishedEncoder(schema, latent, recipe.inputs, hidden)
    return model, guide


# ---------------------------------------------------------------------- training under observation
class Watched(Trainer):
    """A training that is looked at after every epoch; what is seen changes nothing of it.

    Args:
        unseen: wells of unseen environments.
        every: epochs between looks.
        *given: see `Trainer`.
    """

    def __init__(self, unseen: EnvironmentDataset, every: int, *given: Any) -> None:
        super().__init__(*given)
        self.unseen, self.every = unseen.batch(), every
        self.curve: list[dict[str, Any]] = []

    def _one_epoch(self) -> None:
        super()._one_epoch()
        if self.epoch % self.every and self.epoch != self.settings.epochs:
            return
        for k, seed in enumerate(self.seeds):
            self.ensemble.load_member(k)
            row = errors(self.system.model, self.system.guide, self.unseen)
            self.curve.append({"seed": seed, "epoch": self.epoch, **row})
        if not all(row["sampled"] < _LOST for row in self.curve[-len(self.seeds) :]):
            raise TrainingError("the reconstruction of unseen wells is lost")


def errors(model: nn.Module, guide: nn.Module, batch: Batch) -> dict[str, float]:
    """Mean squared error per gene, z sampled and at its posterior mean, and the encoder's largest sigma."""
    with isolated(), forked(), torch.no_grad():
        torch.manual_seed(0)
        trace = poutine.trace(guide.forward).get_trace(batch)
        site = trace.nodes[Z]
        law = site["fn"]
        found = {
            "sampled": _error(model, {Z: site["value"]}, batch),
            "mean": _error(model, abduct(guide.forward, batch), batch),
            "largest sigma": float(law.variance.sqrt().max()),
        }
    return found


def _error(model: nn.Module, latents: Mapping[str, Tensor], batch: Batch) -> float:
    program = poutine.condition(model.forward, data=latents)
    mean = poutine.trace(program).get_trace(batch.unobserved()).nodes[X]["fn"].mean
    return float((mean - batch.x).double().square().mean())


def watch(
    model: nn.Module,
    guide: nn.Module,
    cells: EnvironmentDataset,
    unseen: EnvironmentDataset,
    seeds: Sequence[int],
    validation: EnvironmentDataset | None = None,
    every: int = 1,
    **given: Any,
) -> pd.DataFrame:
    """`fit` with its own defaults, looked at as it goes; a training that fails leaves the epochs it had.

    Args:
        model: to train.
        guide: its guide.
        cells: training wells.
        unseen: wells of unseen environments.
        seeds: of the members; each is trained by itself, because one that diverges would end them all.
        validation: see `fit`.
        every: epochs between looks.
        **given: of `fit`, for `Settings`.

    Returns:
        columns seed, epoch, sampled, mean, largest sigma; infinite errors after a failure. `kept` marks the parameters
        of the epoch that the member keeps, where there is a validation set.
    """
    known = inspect.signature(infer.fit).parameters
    settings = Settings(**{f.name: given.get(f.name, known[f.name].default) for f in fields(Settings)})
    frames = []
    for seed in seeds:
        system = System(model, guide, Objective())
        trainer = Watched(unseen, every, system, cells, validation, (seed,), settings, torch.device("cpu"), True)
        try:
            trainer.train(None, settings.epochs, False)
        except TrainingError:
            seen = trainer.curve[-1]["epoch"] if trainer.curve else 0
            rest = [e for e in range(seen + 1, settings.epochs + 1) if e % every == 0 or e == settings.epochs]
            trainer.curve += [{"seed": seed, "epoch": e, **dict.fromkeys(_ERRORS, math.inf)} for e in rest]
        curve = pd.DataFrame(trainer.curve).replace(np.nan, np.inf)
        if validation is not None:
            trainer.ensemble.load_member(0, trainer.kept)
            kept = {
                "seed": seed,
                "epoch": int(trainer.stopped[0]),
                **errors(model, guide, trainer.unseen),
                "kept": True,
            }
            curve = pd.concat([curve.assign(kept=False), pd.DataFrame([kept])])
        frames.append(curve)
    return pd.concat(frames, ignore_index=True)


# ---------------------------------------------------------------------- data
def plates(config: "Explosion") -> tuple[EnvironmentDataset, EnvironmentDataset]:
    """Wells of LJP005, and those of the compounds of LJP009 that are not on it, by fingerprint; z-scores."""
    adata = wells(scale=True)
    adata.X = np.clip(adata.X, -_BOUND, _BOUND)
    cells = EnvironmentDataset.from_anndata(
        adata,
        environment="drug",
        control="DMSO",
        dose="dose",
        smiles="smiles",
        representation=("morgan", "dose"),
        bits=config.bits,
    )
    first = cells.obs["plate"].astype(str).str.startswith("LJP005").to_numpy()
    prints = [cells.representation[e, : config.bits].tobytes() for e in cells.env]
    known = {p for p, own in zip(prints, first, strict=True) if own}  # vehicle wells, without a fingerprint, among them
    return cells.subset(first), cells.subset(~first & np.array([p not in known for p in prints]))


def stand_in(config: "Explosion", seed: int = 0) -> tuple[EnvironmentDataset, EnvironmentDataset]:
    """Signatures of compounds made of `programmes` directions; unseen environments are stronger.

    A compound's effect is linear in its fingerprint times a log-normal strength, which gives z-scores their heavy tail;
    wells add activity of the programmes and Student-t noise of variance 1.
    """
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    number, drawn = config.trained + config.unseen, config.samples
    prints = (rng.random((number, config.bits)) < 0.05).astype(np.float32)
    effects = prints @ rng.standard_normal((config.bits, config.programmes)) / math.sqrt(0.05 * config.bits)
    effects *= rng.lognormal(0.0, config.tail, (number, 1))
    effects[config.trained :] *= config.stronger
    loadings = rng.standard_normal((config.programmes, config.genes)) * (rng.random((1, config.genes)) < 0.5)
    env = np.concatenate([np.full(drawn, -1), np.repeat(np.arange(number), drawn)])
    activity = np.where(env[:, None] < 0, 0.0, effects[env]) + 0.3 * rng.standard_normal((len(env), config.programmes))
    noise = rng.standard_t(5, (len(env), config.genes)) * math.sqrt(3 / 5)
    x = np.clip(activity @ loadings + noise, -_BOUND, _BOUND).astype(np.float32)
    names = np.array([f"compound {i}" for i in range(number)] + ["DMSO"])
    obs = pd.DataFrame({"drug": names[env]}, index=[f"well {i}" for i in range(len(env))])
    var = pd.DataFrame(index=[f"gene {g}" for g in range(config.genes)])
    rows = {str(n): row for n, row in zip(names, [*prints, np.zeros(config.bits, np.float32)], strict=True)}
    cells = EnvironmentDataset.from_anndata(
        AnnData(X=x, obs=obs, var=var), environment="drug", control="DMSO", representation=rows, counts=False
    )
    unseen = env >= config.trained
    return cells.subset(~unseen), cells.subset(unseen)


SOURCES = {"plates": plates, "stand-in": stand_in}


# ---------------------------------------------------------------------- the experiment
@dataclass(frozen=True)
class Explosion:
    """Sizes; the seed has latent 200, 500 hidden units, 682 and 335 environments, 14,631 and 7,167 samples, 3 trials.

    Args:
        data: "plates" or "stand-in".
        latent: of figure 10 and the ablation.
        hidden: likewise.
        batch_size: likewise.
        epochs: likewise.
        every: epochs between looks.
        lasting: epochs of the suite's defaults, which are to last 3 times as long as their minimum took.
        large: whether the suite's defaults also run at the seed's sizes.
        models: of figure 10 and the defaults.
        arms: of the ablation.
        parts: what to run: "figure 10", "ablation", "defaults", "validation".
        seeds: of the members.
        bits: of the fingerprints.
        genes: of the stand-in, as all that follows.
        trained: environments.
        unseen: environments.
        samples: of an environment.
        programmes: directions of the effects.
        tail: standard deviation of a compound's log strength.
        stronger: factor of the effects in unseen environments.
    """

    data: str = "stand-in"
    latent: int = 200
    hidden: int = 500
    batch_size: int = 32
    epochs: int = 100
    every: int = 2
    lasting: int = 300
    large: bool = True
    models: tuple[str, ...] = tuple(MODELS)
    arms: tuple[str, ...] = tuple(name for name in arms() if name != PUBLISHED)
    parts: tuple[str, ...] = ("figure 10", "ablation", "defaults", "validation")
    seeds: tuple[int, ...] = (0, 1, 2)
    bits: int = 1024
    genes: int = 978
    trained: int = 682
    unseen: int = 335
    samples: int = 21
    programmes: int = 20
    tail: float = 1.0
    stronger: float = 2.0

    @classmethod
    def preset(cls, name: str) -> "Explosion":
        """Sizes of smoke, quick and paper; paper is of the plates."""
        if name == "smoke":
            sizes = {"genes": 60, "trained": 20, "unseen": 10, "programmes": 5, "bits": 32, "latent": 10, "hidden": 20}
            return Explosion(**sizes, samples=6, epochs=2, lasting=2, every=1, seeds=(0,), large=False)
        if name == "quick":
            few = Explosion(trained=60, unseen=30, samples=6, epochs=24, lasting=60, large=False)
            return replace(few, seeds=(0, 1), models=("ae", "vae"), parts=("figure 10", "ablation", "defaults"))
        return Explosion(data="plates")


def main(config: Explosion) -> Results:
    if config.data not in SOURCES:
        raise DataError(f"unknown data {config.data!r}: use one of {', '.join(SOURCES)}")
    cells, unseen = SOURCES[config.data](config)
    jobs: list[tuple[str, str, str]] = [("figure 10", name, PUBLISHED) for name in config.models]
    jobs += [("ablation", "vae", arm) for arm in config.arms]
    jobs = [job for job in jobs if job[0] in config.parts]
    curves = []
    for part, name, arm in jobs:
        way = arms()[arm]
        model, guide = compose(name, way, cells.schema, config.latent, (config.hidden,))
        rates = {"batch_size": config.batch_size, "kl_warmup": 0.0, "lr": way.lr, "clip": way.clip}
        curve = watch(model, guide, cells, unseen, config.seeds, epochs=config.epochs, every=config.every, **rates)
        curves.append(curve.assign(part=part, model=name, arm=arm))
        _tell(part, name, arm, curve)
    for part, name, options, validated in _defaults(config):
        model, guide = recipes.make(name, cells.schema, **options)
        train, held = _held_out(cells) if validated else (cells, None)
        every = max(config.every, config.lasting // 60)
        curve = watch(model, guide, train, unseen, config.seeds, held, every, epochs=config.lasting)
        curves.append(curve.assign(part=part, model=name, arm=part))
        _tell(part, name, "", curve)
    table = pd.concat(curves, ignore_index=True)
    scores = summary(table)
    part = scores.index.get_level_values("part")
    power = float(np.square(np.asarray(unseen.x)).mean())
    return Results(
        tables={
            "figure_10": scores[part == "figure 10"],
            "ablation": scores[_ablated(scores)],
            "defaults": scores[part.str.startswith("defaults")],
            "curves": table,
        },
        figures={"figure_10": figure(table, power)},
        text=(
            f"{config.data}: {len(cells)} training wells, {len(unseen)} wells of unseen environments "
            f"({len(np.unique(cells.env))} and {len(np.unique(unseen.env))} environments), {len(cells.genes)} genes; "
            f"mean square of unseen wells (the error of predicting no change) {power:.3f}."
        ),
    )


def _tell(part: str, name: str, arm: str, curve: pd.DataFrame) -> None:
    print(part, name, arm, {key: round(float(value), 3) for key, value in describe(curve).items()}, flush=True)


def _ablated(table: pd.DataFrame) -> NDArray[np.bool_]:
    part, model, arm = (table.index.get_level_values(n) for n in ("part", "model", "arm"))
    chosen: NDArray[np.bool_] = np.asarray((part == "ablation") | ((model == "vae") & (arm == PUBLISHED)))
    return chosen


def _defaults(config: Explosion) -> list[tuple[str, str, dict[str, Any], bool]]:
    """Part, model, options, whether to choose the epoch by held-out compounds."""
    wide = {"latent": config.latent, "hidden": (config.hidden,), "guide_hidden": (config.hidden,)}
    jobs: list[tuple[str, str, dict[str, Any], bool]] = []
    if "defaults" in config.parts:
        jobs += [("defaults", name, MODELS[name], False) for name in config.models]
    if "defaults" in config.parts and config.large:
        jobs += [("defaults, seed's sizes", name, {**MODELS[name], **wide}, False) for name in ("vae", "ae")]
    if "validation" in config.parts:
        jobs += [("defaults, validation", name, MODELS[name], True) for name in config.models]
    return jobs


def _held_out(cells: EnvironmentDataset, share: float = 0.15) -> tuple[EnvironmentDataset, EnvironmentDataset]:
    """Training wells without, and wells of, some of the training compounds."""
    compound = cells.environments["perturbation"].astype(str).to_numpy()[cells.env]
    names = np.unique(compound[~cells.reference[cells.env]])
    chosen = np.random.default_rng(0).permutation(names)[: max(1, round(share * len(names)))]
    held = np.isin(compound, chosen)
    return cells.subset(~held), cells.subset(held)


# ---------------------------------------------------------------------- what is read off the curves
def rise(epochs: NDArray[Any], errors: NDArray[Any]) -> dict[str, float]:
    """Minimum, its epoch, the error over it at 3 times that epoch and at the last, and how many times longer it ran."""
    at = int(np.argmin(errors))
    if not np.isfinite(errors[at]):
        return {"minimum": math.inf, "epoch": epochs[at], "later": math.inf, "ratio": math.inf, "lasted": math.nan}
    later = int(np.flatnonzero(epochs <= _LATER * epochs[at])[-1])
    ratio, lasted = errors[-1] / errors[at], epochs[-1] / epochs[at]
    return {
        "minimum": errors[at],
        "epoch": epochs[at],
        "later": errors[later] / errors[at],
        "ratio": ratio,
        "lasted": lasted,
    }


def describe(curve: pd.DataFrame, column: str = "mean") -> dict[str, Any]:
    """One row over seeds: medians, the largest ratio, seeds that were lost, and what validation kept."""
    if "kept" in curve:
        chosen = curve["kept"].eq(True)  # it is NaN where there was no validation
        kept, curve = curve[chosen], curve[~chosen]
    else:
        kept = curve.iloc[:0]
    by = {seed: rise(c["epoch"].to_numpy(), c[column].to_numpy()) for seed, c in curve.groupby("seed")}
    found = pd.DataFrame(by).T
    row: dict[str, Any] = {
        "minimum": found["minimum"].median(),
        "at epoch": found["epoch"].median(),
        f"at {_LATER}x / minimum": found["later"].median(),
        "last / minimum": found["ratio"].median(),
        "largest last": found["ratio"].max(),
        "lost": int((~np.isfinite(found["ratio"])).sum()),
        f"ran {_LATER}x": int((found["lasted"] >= _LATER).sum()),
        f"of these <= {_SLACK}": int(((found["lasted"] >= _LATER) & (found["later"] <= _SLACK)).sum()),
    }
    if len(kept):
        ratios = kept.set_index("seed")[column] / found["minimum"]
        row |= {"kept / minimum": ratios.median(), "largest kept": ratios.max()}
    return row


def summary(curves: pd.DataFrame) -> pd.DataFrame:
    """`describe` of every part, model and arm, with z sampled and at its posterior mean."""
    rows = {}
    for (part, model, arm), curve in curves.groupby(["part", "model", "arm"], sort=False):
        for column, name in (("sampled", "sample"), ("mean", "posterior mean")):
            rows[part, model, arm, name] = describe(curve, column)
    table = pd.DataFrame(rows).T
    table.index.names = ["part", "model", "arm", "evaluated at"]
    return table.infer_objects()


def figure(curves: pd.DataFrame, power: float) -> Any:
    """As published, and the suite's defaults: error of unseen wells against epochs, range over seeds shaded."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.6))
    panes = drawn.subplots(1, 2, sharey=True)
    for axes, part, title in ((panes[0], "figure 10", PUBLISHED), (panes[1], "defaults", "the suite's defaults")):
        for name, curve in curves[curves["part"] == part].groupby("model", sort=False):
            wide = curve.pivot(index="epoch", columns="seed", values="sampled").clip(upper=100 * power)
            axes.fill_between(wide.index, wide.min(axis=1), wide.max(axis=1), alpha=0.2)
            axes.plot(wide.index, wide.median(axis=1), label=str(name))
        axes.axhline(power, color="0.6", lw=1, ls="--")
        axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.set_title(title)
        if len(axes.get_legend_handles_labels()[0]):
            axes.legend(fontsize=7)
    panes[0].set_ylabel("squared error per gene, unseen environments")
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Explosion, main))
