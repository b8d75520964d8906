"""Joint densities of two variables under do(t := t + 1) and do(t := t - 0.5), and single cells' counterfactuals.

Figures 3 and 4 of the seed: t -> i and a third variable below both, the learnt densities beside the true ones. Three
latents in a triangle graph, a control and two hard interventions on each, so that a structural model with the causal
order and the targets known is identified up to the units of its latents; linear and network mechanisms, linear and
network decoders. Beside it what fails: a conditional VAE and a VAE, whose latents have no mechanisms.

The true model and the learnt ones answer through the same programs. A learnt latent is matched to a true one by
correlation and measured in its units (mean and standard deviation over the training cells). Densities of genes need no
matching beyond that of t. Measured: energy distance and MMD of the true and the learnt density, beside that of two true
samples (the floor) and that of the true density without the intervention (what it is worth to do nothing); the error of
each cell's counterfactual as a share of the true effect, 0 for none and 1 for no effect.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pyro import poutine

import pyro_scm as ps
from experiments.launch import Results, launch
from guides import amortise
from pyro_scm import graphs, metrics, query
from pyro_scm.batch import Batch
from pyro_scm.chance import forked
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.regimes import target_labels
from pyro_scm.threads import few_threads

Array = NDArray[np.float64]

T, I = 0, 1  # t -> i
EDGES = [[0, 1], [0, 2], [1, 2]]
DESIGNS = {  # mechanism, decoder
    "linear mechanisms, linear decoder": ("linear", "linear"),
    "network mechanisms, linear decoder": ("network", "linear"),
    "network mechanisms, network decoder": ("network", "network"),
}
MODELS = ("structured_environment_vae", "conditional_vae", "vae")
ACTIONS = {"observed": 0.0, "do(t := t + 1)": 1.0, "do(t := t - 0.5)": -0.5}
VALUES = np.linspace(-2.5, 2.5, 11)
FLOOR, NOTHING = "true, another sample", "true, no intervention"


@dataclass(frozen=True)
class Densities:
    """Sizes of the experiment.

    Args:
        designs: names of mechanisms and decoders.
        screens: of each design.
        seeds: of each model on each screen.
        restarts: of each seed, of which the one with the lowest loss is kept.
        genes: of each screen.
        cells: in each environment.
        epochs: of training.
        samples: of each density.
    """

    designs: tuple[str, ...] = tuple(DESIGNS)
    screens: int = 1
    seeds: int = 3
    restarts: int = 4
    genes: int = 20
    cells: int = 300
    epochs: int = 60
    samples: int = 500

    @classmethod
    def preset(cls, name: str) -> "Densities":
        """Sizes of a preset."""
        if name == "smoke":
            network = (list(DESIGNS)[1],)
            return cls(designs=network, seeds=1, restarts=5, genes=10, cells=100, epochs=80, samples=200)
        return cls(screens=3, seeds=10, restarts=6, epochs=100, samples=600) if name == "paper" else cls()


# ---------------------------------------------------------------------- screens and models
def simulated(design: str, screen: int, config: Densities) -> Any:
    """A control and two hard interventions on each of three latents."""
    mechanism, decoder = DESIGNS[design]
    return synthetic.simulate(
        latent=3, genes=config.genes, environments=7, cells=config.cells, graph=EDGES, mechanism=mechanism,
        decoder=decoder, interventions=("hard",), strength=3.0, noise=0.3, seed=screen,
    )  # fmt: skip


def train(name: str, design: str, cells: EnvironmentDataset, config: Densities) -> list[tuple[Any, Any]]:
    """The best restart of each seed, as (model, guide).

    The structural model is trained with a guide that proposes c, which is what can be read off a cell: its posterior
    does not depend on the environment where genes tell c well, that of the noise does.
    """
    mechanism, decoder = DESIGNS[design]
    options: dict[str, Any] = {"latent": 3, "hidden": () if decoder == "linear" else (32,)}
    structured = name == "structured_environment_vae"
    if structured:
        options |= {"mechanism": mechanism, "graph": graphs.full(3), "interventions": "hard", "scale": False}
        options |= {"targets": target_labels(cells.environments), "environment_hidden": ()}
    model = getattr(ps.models, name)(cells.schema, **options)
    trained = ps.InCausalVariables(model) if structured else model
    inputs = ("x", "e") if name == "conditional_vae" else ("x",)
    guide = amortise(trained, cells, inputs=inputs, hidden=() if decoder == "linear" else (64,))
    with few_threads():
        run = ps.fit(
            trained, guide, cells, seeds=range(config.seeds * config.restarts), epochs=config.epochs, batch_size=256,
            lr=3e-2 if decoder == "linear" else 1e-2, schedule="cosine", kl_warmup=0.0, device="cpu", progress=False,
        )  # fmt: skip
    run = ps.in_noise(run) if structured else run
    groups = [range(s * config.restarts, (s + 1) * config.restarts) for s in range(config.seeds)]
    return [run.member(min(group, key=lambda k: run.losses[k])) for group in groups]


# ---------------------------------------------------------------------- one language for true and learnt latents
@dataclass(frozen=True)
class Units:
    """Which learnt latent is which true one, and in which units: learnt[:, order] = offset + slope * true.

    Args:
        order: ``[d]`` learnt position of each true latent.
        slope: ``[d]``, with the sign of the correlation.
        offset: ``[d]``.
        score: mean correlation coefficient.
    """

    order: NDArray[np.intp]
    slope: Array
    offset: Array
    score: float

    @staticmethod
    def of(true: Any, learnt: Any) -> "Units":
        """From c of the same cells, ``[n, d]`` each: matched by correlation, then equal means and deviations.

        Equal deviations, not a regression: a latent that is found badly would be shrunk or inflated by one.
        """
        found = metrics.mcc(true, learnt)
        picked = learnt[:, found.permutation]
        slope = np.where(found.sign < 0, -1.0, 1.0) * picked.std(0) / true.std(0)
        return Units(found.permutation, slope, picked.mean(0) - slope * true.mean(0), found.score)

    @staticmethod
    def same(latent: int) -> "Units":
        """Of the truth itself."""
        return Units(np.arange(latent), np.ones(latent), np.zeros(latent), 1.0)

    def true(self, learnt: Any) -> Array:
        """c ``[..., d]`` of the model in the true latents' order and units."""
        values: Array = (learnt[..., self.order] - self.offset) / self.slope
        return values

    def learnt(self, j: int, values: Any) -> Array:
        """Values of true latent j in the units of its partner."""
        given: Array = self.offset[j] + self.slope[j] * np.asarray(values)
        return given

    def action(self, step: float) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """do(t := t + step), a function of the natural value; nothing for a step of 0."""
        size = float(self.slope[T] * step)
        return {f"c_{self.order[T]}": lambda c: c + size} if step else {}


def draw(model: Any, batch: Batch, do: Mapping[str, Any], seed: int) -> tuple[Array, Array]:
    """c ``[n, d]`` and x ``[n, G]`` simulated under an intervention."""
    with query.isolated(), forked():
        torch.manual_seed(seed)
        trace = poutine.trace(ps.do(model, do)).get_trace(batch.unobserved())
    return tuple(trace.nodes[site]["value"].double().numpy() for site in ("c", "x"))  # type: ignore[return-value]


def control(cells: EnvironmentDataset, number: int) -> Batch:
    """Cells of the reference environment that were never measured, for the true model and learnt ones alike."""
    first = int(np.flatnonzero(cells.reference[cells.env])[0])
    batch = cells.batch(np.full(number, first))
    return replace(batch, index=torch.arange(number), total=number)


# ---------------------------------------------------------------------- what is measured
def distances(true: tuple[Array, Array], other: tuple[Array, Array]) -> dict[str, float]:
    """Energy distance and MMD of the pair (t, i) and of all genes; the kernel's width is the true sample's."""
    spaces = {"pair": (true[0][:, [T, I]], other[0][:, [T, I]]), "genes": (true[1], other[1])}
    found = {}
    for name, (a, b) in spaces.items():
        found[f"energy {name}"] = metrics.energy_distance(a, b)
        found[f"mmd {name}"] = metrics.mmd(a, b, [metrics.median_bandwidth(a)])
    return found


def unexplained(true: Any, learnt: Any) -> float:
    """Squared error of effects over the squared true effects: 0 all right, 1 as wrong as no effect."""
    return float(np.square(learnt - true).sum() / np.square(true).sum())


def counterfactual_errors(
    fitted: Any, units: Units, truth: Any, cells: EnvironmentDataset, step: float
) -> dict[str, float]:
    """Single cells under do(t := t + step), latents in true units."""
    right = query.counterfactual(truth, cells, do=Units.same(3).action(step))
    found = query.counterfactual(fitted, cells, do=units.action(step))
    effect = units.true(found.c[0, 0]) - units.true(found.factual_c[0, 0])
    right_c, right_x = right.c[0, 0], right.x[0, 0]
    return {
        "unexplained effect on c": unexplained(right_c - right.factual_c[0, 0], effect),
        "unexplained effect on genes": unexplained(right.effect[0, 0], found.effect[0, 0]),
        "rmse i": float(np.sqrt(np.mean((units.true(found.c[0, 0])[:, I] - right_c[:, I]) ** 2))),
        "rmse genes": float(np.sqrt(np.mean((found.x[0, 0] - right_x) ** 2))),
    }


def trajectories(fitted: Any, units: Units, cells: EnvironmentDataset) -> Array:
    """i of each cell under do(t := v), ``[V, n]``, in true units."""
    site = f"c_{units.order[T]}"
    c = query.sweep(fitted, cells, units.learnt(T, VALUES).tolist(), nodes=[site], expression=False)["c"][0, 0]
    found: Array = units.true(c)[..., I]
    return found


# ---------------------------------------------------------------------- the experiment
def one(design: str, screen: int, config: Densities) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Scores of every model and seed on one screen, and what its figures need: the models' first seed."""
    adata = simulated(design, screen, config)
    cells = synthetic.dataset(adata)
    truth = synthetic.known(adata, cells)
    true_c = query.embed(truth, cells)["c"][0].astype(float)
    controls = cells.subset(cells.reference[cells.env])
    known = synthetic.known(adata, controls)
    batch, same = control(cells, config.samples), Units.same(3)
    right = {a: draw(truth[0], batch, same.action(step), 1) for a, step in ACTIONS.items()}
    label = {"design": design, "screen": screen}
    rows: list[dict[str, Any]] = []
    for action, step in ACTIONS.items():
        again = draw(truth[0], batch, same.action(step), 2)
        rows.append({**label, "model": FLOOR, "seed": 0, "action": action, **distances(right[action], again)})
        if step:
            still = draw(truth[0], batch, {}, 2)
            rows.append({**label, "model": NOTHING, "seed": 0, "action": action, **distances(right[action], still)})
    lines = trajectories(known, same, controls)
    drawn: dict[str, Any] = {"truth": (right, lines)}
    for name in MODELS:
        for seed, fitted in enumerate(train(name, design, cells, config)):
            learnt = query.embed(fitted, cells)
            units = Units.of(true_c, learnt["c"][0].astype(float))
            samples = {}
            own = trajectories(fitted, units, controls)
            recovered = {
                "mcc c": units.score,
                "mcc z": metrics.mcc(adata.obsm["z"], learnt["z"][0]).score,
                "rmse trajectory": float(np.sqrt(np.mean((own - lines) ** 2))),
            }
            for action, step in ACTIONS.items():
                c, x = draw(fitted[0], batch, units.action(step), 3)
                samples[action] = (units.true(c), x)
                row = {**label, "model": name, "seed": seed, "action": action, **recovered}
                row |= distances(right[action], samples[action])
                rows.append(row | (counterfactual_errors(fitted, units, known, controls, step) if step else {}))
            drawn.setdefault(name, (samples, own))
        print(design, screen, name, pd.DataFrame(rows[-3:])["energy genes"].round(3).tolist(), flush=True)
    factual = query.embed(known, controls)["c"][0]
    return rows, {**drawn, "factual": factual}


def main(config: Densities) -> Results:
    rows: list[dict[str, Any]] = []
    figures = {}
    for design in config.designs:
        for screen in range(config.screens):
            found, drawn = one(design, screen, config)
            rows += found
            if screen == 0:
                name = design.replace(", ", "_").replace(" ", "_")
                figures[f"densities_{name}"] = densities_figure(drawn, design)
                figures[f"trajectories_{name}"] = trajectories_figure(drawn, design)
    scores = pd.DataFrame(rows)
    figures["distances"] = distances_figure(scores)
    tables = {"summary": summary(scores), "counterfactuals": counterfactuals(scores), "scores": scores}
    structured = scores[(scores["model"] == MODELS[0]) & (scores["action"] != "observed")]
    text = (
        f"{config.screens} screens a design, {config.seeds} seeds a model. Structural model: median unexplained effect "
        f"of do(t := t + step) on genes {structured['unexplained effect on genes'].median():.3f}, worst "
        f"{structured['unexplained effect on genes'].max():.3f}."
    )
    return Results(tables, figures, text)


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Median distance of each model, design and action, the range over screens and seeds, and the floor.

    Shares are of the distance between the true densities with and without the intervention, on the same screen.
    """
    by = ["design", "model", "action"]
    place = ["design", "screen", "action"]
    unmoved = scores[scores["model"] == NOTHING].set_index(place)
    columns = ["energy pair", "energy genes", "mmd pair", "mmd genes"]
    table = scores.groupby(by, sort=False)[columns].median()
    for space in ("pair", "genes"):
        spread = scores.groupby(by, sort=False)[f"energy {space}"]
        table[f"lowest {space}"], table[f"highest {space}"] = spread.min(), spread.max()
        share = scores[f"energy {space}"] / unmoved[f"energy {space}"].reindex(scores.set_index(place).index).to_numpy()
        table[f"share {space}"] = scores.assign(share=share).groupby(by, sort=False)["share"].median()
    return table.assign(fits=scores.groupby(by, sort=False).size())


def counterfactuals(scores: pd.DataFrame) -> pd.DataFrame:
    """Errors of single cells' counterfactuals: median, and the worst of screens and seeds."""
    asked = scores[scores["model"].isin(MODELS) & (scores["action"] != "observed")]
    columns = ["mcc c", "mcc z", "unexplained effect on c", "unexplained effect on genes", "rmse i", "rmse genes",
               "rmse trajectory"]  # fmt: skip
    groups = asked.groupby(["design", "model", "action"], sort=False)
    worst = groups[columns[2:]].max().add_prefix("worst ")
    return groups[columns].median().join(groups["mcc c"].min().rename("lowest mcc c")).join(worst)


# ---------------------------------------------------------------------- figures
def contours(axes: Any, points: Array, grid: tuple[Array, Array], action: str) -> None:
    """Filled red, blue and dashed green, as in the seed."""
    from scipy.stats import gaussian_kde

    density = gaussian_kde(points.T)(np.stack([g.ravel() for g in grid])).reshape(grid[0].shape)
    levels = density.max() * np.array([0.1, 0.3, 0.6, 0.9])
    if action == "observed":
        axes.contourf(*grid, density, levels=[*levels, density.max() * 1.01], cmap="Reds", alpha=0.8)
    else:
        blue = ACTIONS[action] > 0
        color, style = ("C0", "solid") if blue else ("C2", "dashed")
        axes.contour(*grid, density, levels=levels, colors=color, linestyles=style, linewidths=1)


def _grid(samples: Sequence[Array]) -> tuple[Array, Array]:
    low, high = np.quantile(np.concatenate(samples), [0.005, 0.995], axis=0)
    margin = 0.15 * (high - low)
    x, y = (np.linspace(a - m, b + m, 50) for a, b, m in zip(low, high, margin, strict=True))
    return tuple(np.meshgrid(x, y))  # type: ignore[return-value]


def densities_figure(drawn: Mapping[str, Any], title: str) -> Any:
    """Above (t, i), below the two genes that the intervention moves most; the truth, then each model's first seed."""
    from matplotlib.figure import Figure

    right = drawn["truth"][0]
    moved = np.abs(right["do(t := t + 1)"][1].mean(0) - right["observed"][1].mean(0))
    genes = np.argsort(-moved)[:2]
    names = ("truth", *MODELS)
    figure = Figure(figsize=(3 * len(names), 6), layout="constrained")
    axes = figure.subplots(2, len(names), sharex="row", sharey="row")
    for row, (part, columns, labels) in enumerate(
        ((0, [T, I], ("t", "i")), (1, list(genes), [f"gene {g}" for g in genes]))
    ):
        grid = _grid([right[a][part][:, columns] for a in ACTIONS])
        for axis, name in zip(axes[row], names, strict=True):
            for action, sample in drawn[name][0].items():
                contours(axis, sample[part][:, columns], grid, action)
            axis.set(xlabel=labels[0], title=name if row == 0 else "")
        axes[row][0].set_ylabel(labels[1])
    figure.suptitle(f"{title}: observed (red), do(t := t + 1) (blue), do(t := t - 0.5) (green, dashed)")
    return figure


def trajectories_figure(drawn: Mapping[str, Any], title: str, cells: int = 12) -> Any:
    """i of single cells under do(t := v) over v: true lines, learnt ones dashed, dots where the cells are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(MODELS), 3.6), layout="constrained")
    right, factual = drawn["truth"][1], drawn["factual"]
    for axis, name in zip(figure.subplots(1, len(MODELS), sharey=True), MODELS, strict=True):
        for n in range(min(cells, right.shape[1])):
            axis.plot(VALUES, right[:, n], color=f"C{n % 10}", linewidth=1)
            axis.plot(VALUES, drawn[name][1][:, n], "--", color=f"C{n % 10}", linewidth=1)
            axis.plot(factual[n, T], factual[n, I], "o", color=f"C{n % 10}", markersize=4)
        axis.set(xlabel="v, do(t := v)", title=name)
    figure.axes[0].set_ylabel("i of a cell, true and learnt (dashed)")
    figure.suptitle(title)
    return figure


def distances_figure(scores: pd.DataFrame) -> Any:
    """Energy distances of genes to the true density, every fit, beside the floor and beside no intervention."""
    from matplotlib.figure import Figure

    names = (FLOOR, *MODELS, NOTHING)
    designs = list(scores["design"].unique())
    figure = Figure(figsize=(4.2 * len(designs), 3.6))
    for axis, design in zip(figure.subplots(1, len(designs), sharey=True, squeeze=False)[0], designs, strict=True):
        for a, action in enumerate(ACTIONS):
            part = scores[(scores["design"] == design) & (scores["action"] == action)]
            for n, name in enumerate(names):
                values = part[part["model"] == name]["energy genes"]
                label = action if n == 0 else None
                axis.plot(np.full(len(values), n + 0.2 * (a - 1)), values, ".", color=f"C{a}", alpha=0.5, label=label)
        axis.set(yscale="log", title=design)
        axis.set_xticks(range(len(names)), [n.replace("_", "\n").replace(", ", "\n") for n in names], fontsize=6)
    figure.axes[0].set_ylabel("energy distance of genes")
    figure.axes[0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Densities, main))
