"""Five dependent latents, non-linear genes, random environments (seed section 6.4, figure 9): what is found of them?

Screens of `synthetic.simulate` with its defaults: a growing network of five latents with linear equations, thirty genes
that are networks of three ReLU units, environments that shift one latent by N(0, 5^2), latents taken in turn.

`unseen`: reconstruction of environments that were not trained on, along training, for every model (figure 9), with 5 to
40 training environments and as many unseen ones, each represented by its true shift as in the seed; and what each model
has found of the latents. `recovery`: environments are names (one-hot), targets known or unknown, several restarts of
which the one with the lowest loss is kept. `limits`: what stands between a model that is told the targets and the
ceiling, the posterior mode under the true model: one row for each thing that is changed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

import pyro_scm as ps
from experiments.launch import Results, briefly, launch
from guides import amortise
from pyro_scm import metrics, recipes
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.evaluation import recovery
from pyro_scm.nn import Shortcut
from pyro_scm.objectives import Objective
from pyro_scm.objectives.elbo import Penalty, World, divergence
from pyro_scm.regimes import target_labels
from pyro_scm.run import Run

if TYPE_CHECKING:
    from anndata import AnnData

LATENT, BATCH, RATE = 5, 128, 1e-2
SIGMA2 = 0.5  # of "normal-fixed": its -log density is the squared error and a constant
ANNEALED = (2.0, 0.1)
SCORES = ["mcc_z", "linear_r2_z", "target_f1", "concentration"]


@dataclass(frozen=True)
class Row:
    """A line of the tables: a model and what is done to it.

    Args:
        recipe: see `recipes.make`.
        options: of it.
        known: whether the model is told which latents each environment targets; it then needs the option ``targets``.
        falling: factor of the KL at the start, falling to 1; see `Falling`.
        objective: see `pyro_scm.fit`; not together with `falling`.
        after: what is done to the fitted run, for example ``lambda run, cells: unmix(run, cells)``.
        screen: settings of the screen that differ.
        longer: factor of the number of steps.
        rate: of learning.
        linear_path: whether the decoder is a linear map plus its network; see `pyro_scm.nn.Shortcut`.
    """

    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    known: bool = False
    falling: float = 1.0
    objective: Callable[[], Objective] | None = None
    after: Callable[[Run, EnvironmentDataset], Run] | None = None
    screen: Mapping[str, Any] = field(default_factory=dict)
    longer: int = 1
    rate: float = RATE
    linear_path: bool = False


MEAN_ONLY = {"scale": False}
TOLD = Row("structured_environment_vae", MEAN_ONLY, known=True, falling=20.0, linear_path=True)


def unmixed(run: Run, cells: EnvironmentDataset) -> Run:
    """In the basis in which effects are sparse."""
    return ps.unmix(run, cells)


def unmixed_and_refined(run: Run, cells: EnvironmentDataset) -> Run:
    """And trained on there."""
    return ps.refine(ps.unmix(run, cells), cells, prior="student-t", **briefly(run), device="cpu", progress=False)


UNMIXED = Row("translation_vae", {"sparsity": "dense"}, after=unmixed, longer=2, rate=3e-3, linear_path=True)

UNSEEN: dict[str, Row] = {
    "vae": Row("vae"),
    "conditional_vae": Row("conditional_vae"),
    "environment_vae": Row("environment_vae", MEAN_ONLY),
    "environment_vae, dense": Row("environment_vae", {"sparsity": "dense", **MEAN_ONLY}),
    "environment_vae, one-of": Row("environment_vae", {"sparsity": "one-of", **MEAN_ONLY}),
    "environment_vae, spike-slab": Row("environment_vae", {"sparsity": "spike-slab", **MEAN_ONLY}),
    "translation_vae": Row("translation_vae"),
    "structured_environment_vae": Row("structured_environment_vae", MEAN_ONLY),
    "structured_translation_vae": Row("structured_translation_vae"),
    "adversarial_prior_ae": Row("adversarial_prior_ae"),
    "targets known": Row("structured_environment_vae", MEAN_ONLY, known=True),
}

RECOVERY: dict[str, Row] = {
    "softmax": Row("environment_vae", MEAN_ONLY),
    "dense": Row("environment_vae", {"sparsity": "dense", **MEAN_ONLY}),
    "one-of": Row("environment_vae", {"sparsity": "one-of", **MEAN_ONLY}),
    "targets known": Row("structured_environment_vae", MEAN_ONLY, known=True),
    "targets known, KL falls, linear path": TOLD,
    "unmixed": UNMIXED,
    "unmixed and refined": replace(UNMIXED, after=unmixed_and_refined),
}

KNOWN = Row("structured_environment_vae", MEAN_ONLY, known=True)
LIMITS: dict[str, Row] = {
    "plain": KNOWN,
    "linear path": replace(KNOWN, linear_path=True),
    "KL falls from 20": replace(KNOWN, falling=20.0),
    "KL falls from 20, linear path": TOLD,
    "the same, KL from 5": replace(TOLD, falling=5.0),
    "the same, 3 times the steps": replace(TOLD, longer=3),
    "the same, Translation VAE": replace(TOLD, recipe="structured_translation_vae", options={}),
    "the same, FiLM guide": replace(TOLD, options={"conditioning": "film", **MEAN_ONLY}),
    "the same, deep guide": replace(TOLD, options={"guide_hidden": (96, 96), **MEAN_ONLY}),
    "5 particles, importance-weighted": replace(KNOWN, objective=lambda: ps.ImportanceWeighted(5)),
    "the same, noise 1": replace(TOLD, screen={"noise": 1.0}),
    "the same, linear genes": replace(TOLD, screen={"decoder": "linear"}),
}


@dataclass(frozen=True)
class FiveLatents:
    """Sizes of the experiment.

    Args:
        parts: of ``"unseen"``, ``"recovery"`` and ``"limits"``.
        screens: of `unseen` and `limits`, each of a seed of its own.
        recovery_screens: of `recovery`.
        seeds: of each model on each screen.
        restarts: of each model in `recovery`.
        cells: in each environment.
        environments: perturbed training environments of `unseen`; the reference is trained on too.
        recovery_environments: likewise of `recovery`; `limits` has the last of these.
        steps: of training in `unseen`.
        recovery_steps: of training in `recovery` and `limits`.
    """

    parts: tuple[str, ...] = ("unseen", "recovery")
    screens: int = 3
    recovery_screens: int = 3
    seeds: int = 3
    restarts: int = 3
    cells: int = 100
    environments: tuple[int, ...] = (20,)
    recovery_environments: tuple[int, ...] = (30,)
    steps: int = 150
    recovery_steps: int = 300

    @classmethod
    def preset(cls, name: str) -> "FiveLatents":
        """Sizes of a preset."""
        if name == "smoke":
            return cls(
                parts=("unseen", "recovery", "limits"), screens=1, recovery_screens=1, seeds=2, restarts=2, cells=20,
                environments=(5,), recovery_environments=(5,), steps=8, recovery_steps=8,
            )  # fmt: skip
        if name == "paper":
            return cls(
                seeds=10, recovery_screens=10, restarts=8, environments=(5, 10, 20, 40), steps=200, recovery_steps=2000
            )
        return cls()


# ---------------------------------------------------------------------- training
class Falling(Penalty):
    """(factor - 1) KL(q || p), the factor falling geometrically from `first` to 1: in the end the loss is the ELBO's.

    At first each latent can afford only what it is for, the shifts of the environments; decoder and encoder then learn
    the details around latents that have their places. Without it they learn any code that reconstructs, which the
    prior then has to turn.

    Args:
        first: factor at the start.
        until: share of the training at which it is 1.
    """

    def __init__(self, first: float, until: float = 0.7) -> None:
        super().__init__()
        self.first, self.until = first, until
        self.extra: Tensor
        self.register_buffer("extra", torch.tensor(first - 1.0), persistent=False)

    def at(self, done: float) -> None:
        """Training has done this share of its epochs: set the factor."""
        self.extra.fill_(self.first ** max(0.0, 1 - done / self.until) - 1)

    def penalty(self, world: World) -> Tensor:
        """What is added to the negative ELBO."""
        latent = [name for name in world.guide if name in world.model]
        return self.extra * torch.stack([divergence(world.guide[n], world.model[n]) for n in latent]).sum()


def train(
    row: Row,
    cells: EnvironmentDataset,
    seeds: Sequence[int],
    steps: int,
    validation: EnvironmentDataset | None = None,
    **options: Any,
) -> Run:
    """One line's model, all seeds together, for so many steps."""
    options = {"latent": LATENT, "hidden": (96,), "guide_hidden": (96,), **options, **row.options}
    if row.recipe not in ("vae", "conditional_vae"):
        options.setdefault("environment_hidden", ())
    if row.known:
        # without a causal layer above them: which latents are parents of which is not asked here
        options |= {"targets": target_labels(cells.environments), "depth": 1}
    model, guide = recipes.make(row.recipe, cells.schema, **options)
    if row.linear_path:
        decoder: Any = model.likelihoods[0]
        decoder.net, model.spec = Shortcut(decoder.net, LATENT, len(cells.genes)), None
    recipe = recipes.recipe(row.recipe)
    if row.objective is not None:
        objective = row.objective()
    elif row.falling > 1:
        objective = Objective(penalties={"falling": Falling(row.falling)})
    else:
        objective = recipes.objective(row.recipe, model, cells)
    softmax = "sparsity" in recipe.options and not row.known and options.get("sparsity", "softmax") == "softmax"
    run = ps.fit(
        model, guide, cells, seeds=seeds, objective=objective, validation=validation, batch_size=BATCH, lr=row.rate,
        epochs=max(2, round(steps * row.longer / math.ceil(len(cells) / BATCH))), schedule="cosine", kl_warmup=0.0,
        temperature=ANNEALED if softmax else None, critic_steps=min(recipe.critic_steps, 2),
        device="cpu", progress=False,
    )  # fmt: skip
    return run if row.after is None else row.after(run, cells)


def scores(run: Run, cells: EnvironmentDataset, adata: "AnnData") -> pd.DataFrame:
    """Recovery of the latents by each member, with its loss."""
    return recovery(run, cells, adata).assign(loss=run.losses)


# ---------------------------------------------------------------------- unseen environments
def screen(environments: int, cells: int, seed: int, **settings: Any) -> "AnnData":
    """A screen with a reference and so many other environments."""
    return ps.simulate(environments=environments + 1, cells=cells, seed=seed, **settings)


def halves(adata: "AnnData", count: int) -> tuple[EnvironmentDataset, EnvironmentDataset]:
    """Cells of the reference and the first `count` environments, and those of the others."""
    cells = synthetic.dataset(adata, "oracle")
    training = cells.env <= count
    return cells.subset(training), cells.subset(~training)


def squared_error(nats: pd.Series, genes: int) -> pd.Series:
    """Expected squared error of a cell, summed over genes, from -log p(x | z) of "normal-fixed"."""
    return (nats - genes * 0.5 * math.log(2 * math.pi * SIGMA2)) * 2 * SIGMA2


def unseen(config: FiveLatents, screens: Sequence[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Errors along training (one row an epoch and member) and recovery scores (one row a member)."""
    curves, found = [], []
    for number in screens:
        for count in config.environments:
            adata = screen(2 * count, config.cells, number)
            training, validation = halves(adata, count)
            for name, row in UNSEEN.items():
                run = train(row, training, range(config.seeds), config.steps, validation, likelihood="normal-fixed")
                label = {"model": name, "environments": count, "screen": number}
                history = run.history
                curves.append(
                    pd.DataFrame(
                        {
                            "seed": history["seed"],
                            "done": history["epoch"] / history["epoch"].max(),
                            "training": squared_error(history["reconstruction"], len(training.genes)),
                            "unseen": squared_error(history["validation_reconstruction"], len(training.genes)),
                        }
                    ).assign(**label)
                )
                found.append(scores(run, training, adata).assign(**label))
    return pd.concat(curves, ignore_index=True), pd.concat(found, ignore_index=True)


def ends(curves: pd.DataFrame) -> pd.DataFrame:
    """Of each fit: the errors at the end, the lowest along the way, and how far the end is above it."""
    by = ["environments", "model", "screen", "seed"]
    groups = curves.sort_values("done", kind="stable").groupby(by, sort=False)
    table = groups.agg(training=("training", "last"), unseen=("unseen", "last"), lowest=("unseen", "min"))
    return table.assign(rise=table["unseen"] / table["lowest"]).reset_index()


def unseen_summary(last: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Median over screens and seeds, and the middle 80 % of the unseen error."""
    by = ["environments", "model"]
    errors = last.groupby(by, sort=False)
    spread = errors["unseen"].quantile([0.1, 0.9]).unstack()
    table = errors[["training", "unseen", "lowest", "rise"]].median()
    table = table.assign(**{"unseen 10 %": spread[0.1], "unseen 90 %": spread[0.9]})
    return table.join(found.groupby(by, sort=False)[SCORES].median())


# ---------------------------------------------------------------------- recovery and its limits
def fits(rows: Mapping[str, Row], config: FiveLatents, screens: Sequence[int], counts: Sequence[int]) -> pd.DataFrame:
    """Recovery scores of every restart of every line."""
    found = []
    for number in screens:
        for count in counts:
            for name, row in rows.items():
                adata = screen(count, config.cells, number, **row.screen)
                cells = synthetic.dataset(adata)
                run = train(row, cells, range(config.restarts), config.recovery_steps)
                label = {"row": name, "environments": count, "screen": number}
                found.append(scores(run, cells, adata).assign(**label))
    return pd.concat(found, ignore_index=True)


def kept(table: pd.DataFrame) -> pd.DataFrame:
    """Of each line and screen the restart with the lowest loss, which needs no truth."""
    best = table.groupby(["row", "environments", "screen"], sort=False)["loss"].idxmin()
    return table.loc[best].reset_index(drop=True)


def recovery_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Median over screens of the kept restarts; their range; MCC of any restart and of the best by truth."""
    by = ["environments", "row"]
    best = kept(table)
    groups = best.groupby(by, sort=False)
    every = table.groupby([*by, "screen"], sort=False)["mcc_z"]
    summary = groups[SCORES].median()
    return summary.assign(
        **{
            "mcc_z lowest": groups["mcc_z"].min(),
            "mcc_z highest": groups["mcc_z"].max(),
            "mcc_z of a restart": every.median().groupby(by).median(),
            "mcc_z by truth": every.max().groupby(by).median(),
            "loss": groups["loss"].median(),
        }
    )


def posterior_mode(
    adata: "AnnData", rows: NDArray[np.int64], starts: int = 16, steps: int = 300
) -> NDArray[np.float64]:
    """argmax_z p(z | x, e) ``[n, d]`` under the model that made the cells, by descent from draws of p(z | e).

    The noise of the observations starts wide and narrows to its true value, so that starts cross the ReLUs' kinks.
    """
    model, cells = synthetic.truth(adata), synthetic.dataset(adata).subset(rows)
    batch = cells.batch()
    assert batch.x is not None
    likelihood: Any = model.likelihoods[0]
    prior = model.prior(batch).base_dist
    generator = torch.Generator().manual_seed(0)
    z = prior.loc + prior.scale * torch.randn((starts, *prior.loc.shape), generator=generator)
    z.requires_grad_()

    def energy(noise: Tensor) -> Tensor:
        error = (likelihood.location(model.scm.solve(z), batch) - batch.x) / noise
        return 0.5 * error.square().sum(-1) + 0.5 * ((z - prior.loc) / prior.scale).square().sum(-1)

    optimiser = torch.optim.Adam([z], lr=0.3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        energy(likelihood.scale + 3 * (1 - step / steps) ** 4).sum().backward()
        optimiser.step()
    with torch.no_grad():
        best = energy(likelihood.scale).argmin(0)
    found: NDArray[np.float64] = z.detach()[best, torch.arange(len(best))].double().numpy()
    return found


def ceilings(config: FiveLatents, screens: Sequence[int]) -> pd.DataFrame:
    """MCC of the true model's posterior mode, and of an encoder that is trained for the true model.

    And F1 of the targets that the true shifts give: some are below the threshold of `metrics.target_scores`.
    """
    rows = []
    count = config.recovery_environments[-1]
    for number in screens:
        adata = screen(count, config.cells, number)
        cells = synthetic.dataset(adata)
        chosen = np.arange(0, len(cells), max(1, config.cells // 10))
        mode = metrics.mcc(adata.obsm["z"][chosen], posterior_mode(adata, chosen)).score
        truth = synthetic.truth(adata)
        guide = amortise(truth, cells, hidden=(64,))
        epochs = max(2, round(config.recovery_steps / math.ceil(len(cells) / BATCH)))
        run = ps.fit(
            truth, guide, cells, epochs=epochs, batch_size=BATCH, lr=RATE, schedule="cosine", device="cpu",
            progress=False,
        )  # fmt: skip
        encoder = metrics.mcc(adata.obsm["z"], ps.embed(run, cells)["z"][0]).score
        shift, targets = adata.uns["truth"]["shift"][1:], adata.uns["truth"]["targets"][1:]
        f1 = metrics.target_scores(targets, shift, np.arange(LATENT)).f1
        rows.append(
            {"screen": number, "posterior mode": mode, "encoder of the true model": encoder, "f1 of true shifts": f1}
        )
    return pd.DataFrame(rows).set_index("screen")


# ---------------------------------------------------------------------- the experiment
def main(config: FiveLatents) -> Results:
    tables: dict[str, pd.DataFrame] = {}
    figures: dict[str, Figure] = {}
    if "unseen" in config.parts:
        curves, found = unseen(config, range(config.screens))
        last = ends(curves)
        tables |= {"unseen": unseen_summary(last, found), "unseen_ends": last, "unseen_scores": found, "curves": curves}
        figures["unseen"] = curves_figure(curves)
    if "recovery" in config.parts:
        table = fits(RECOVERY, config, range(config.recovery_screens), config.recovery_environments)
        tables |= {"recovery": recovery_summary(table), "recovery_scores": table}
        figures["recovery"] = recovery_figure(table)
    if "limits" in config.parts:
        screens = range(config.screens)
        table = fits(LIMITS, config, screens, config.recovery_environments[-1:])
        tables |= {"limits": recovery_summary(table), "limits_scores": table, "ceilings": ceilings(config, screens)}
    text = (
        "Errors are squared and summed over genes, of a cell; environments do not count the reference; of restarts the "
        "one with the lowest loss is kept."
    )
    return Results(tables, figures, text)


# ---------------------------------------------------------------------- figures
def curves_figure(curves: pd.DataFrame) -> Figure:
    """Error in unseen environments along training: median and middle 80 % over screens and seeds (as figure 9)."""
    panels = list(curves.groupby("environments"))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), sharey=True, squeeze=False)
    for axis, (count, part) in zip(axes[0], panels, strict=True):
        for i, (model, lines) in enumerate(part.groupby("model", sort=False)):
            spread = lines.groupby("done")["unseen"].quantile([0.1, 0.5, 0.9]).unstack()
            colour = plt.get_cmap("tab20")(i)
            axis.plot(spread.index, spread[0.5], label=model, color=colour)
            axis.fill_between(spread.index, spread[0.1], spread[0.9], color=colour, alpha=0.1)
        axis.set(yscale="log", xlabel="share of the training", title=f"{count} training environments")
    axes[0][0].set_ylabel("squared error in unseen environments")
    axes[0][-1].legend(fontsize=6)
    plt.close(figure)
    return figure


def recovery_figure(table: pd.DataFrame) -> Figure:
    """MCC of z of every restart, and of those that are kept."""
    counts, names = sorted(table["environments"].unique()), list(table["row"].unique())
    figure, axes = plt.subplots(1, len(counts), figsize=(5 * len(counts), 3.6), sharey=True, squeeze=False)
    best = kept(table)
    for axis, count in zip(axes[0], counts, strict=True):
        for i, name in enumerate(names):
            for part, marker, colour in ((table, ".", "0.7"), (best, "_", "C3")):
                values = part[(part["row"] == name) & (part["environments"] == count)]["mcc_z"]
                axis.plot(np.full(len(values), i), values, marker, color=colour)
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=7)
        axis.set(title=f"{count} environments", ylim=(0, 1.02))
    axes[0][0].set_ylabel("MCC of z")
    plt.close(figure)
    return figure


if __name__ == "__main__":
    raise SystemExit(launch(__file__, FiveLatents, main))
