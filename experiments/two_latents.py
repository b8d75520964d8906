"""Two latent variables, ten genes, linear equations (seed sections 6.1 to 6.3, figures 5 to 8 and 11 to 14).

Does a model find the two latents that environments move, or a rotation of them? Each gene is the sum of one or two
latents, with coefficients in {-1, 1}. Settings: independent latents, one environment (figures 5, 6); the second latent
equal to the first (degenerate), one environment (11, 12); the same in environments (0, 0) and (0, 0.5) (13, 14, 7, 8).
Then, beyond the seed: independent latents with 1, 2, 3, 5 and 9 environments (the reference, then shifts of one latent
each), for every model, over many screens and seeds, trained in three ways: as published (the sparse softmax), with the
softmax annealed, and unmixed: a dense fit, turned into the basis in which its effects are sparse, and refined there.

What is measured: the reconstruction loss along (T, 0) and (0, T), T in [-20, 20]; the cosine distance between row i of
M R_theta and row i of the learnt matrix; the optimal angle's distance to the nearest multiple of 90 degrees.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

import pyro_scm as ps
from experiments.launch import Results, briefly, launch
from guides import amortise
from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.metrics import angle_to_axis, optimal_angle, row_cosine_distances
from pyro_scm.run import Run

Array = NDArray[np.float64]

GENES, HIDDEN, NOISE, BATCH = 10, 5, 0.1, 256
OFFSETS = np.linspace(-20, 20, 41)
INPUTS = {"vae": ("x",), "conditional_vae": ("x", "e")}
ENVIRONMENT_MODELS = (
    "environment_vae",
    "translation_vae",
    "structured_environment_vae",
    "structured_translation_vae",
)
BY = ["environments", "model", "way"]
WAYS = ("as published", "annealed", "unmixed")
SEED_SETTINGS = {  # (independent, environments): figures
    "independent, 1 environment": (True, ((0.0, 0.0),), ("vae",)),
    "degenerate, 1 environment": (False, ((0.0, 0.0),), ("vae",)),
    "degenerate, 2 environments": (False, ((0.0, 0.0), (0.0, 0.5)), ("vae", "environment_vae", "conditional_vae")),
}


@dataclass(frozen=True)
class TwoLatents:
    """Sizes of the experiment.

    Args:
        screens: matrices M, each with cells of its own.
        seeds: of each model on each screen.
        cells: in each environment.
        steps: of training; half as many again where a fit is refined.
        environments: numbers of environments, the reference among them.
        strength: of the shifts.
    """

    screens: int = 4
    seeds: int = 5
    cells: int = 1000
    steps: int = 600
    environments: tuple[int, ...] = (1, 2, 3, 5, 9)
    strength: float = 3.0

    @classmethod
    def preset(cls, name: str) -> "TwoLatents":
        """Sizes of a preset."""
        if name == "smoke":
            return cls(screens=1, seeds=2, cells=60, steps=6, environments=(1, 3))
        if name == "paper":
            return cls(screens=10, seeds=4, cells=5000, steps=2500)
        return cls(screens=2, seeds=4, environments=(1, 5))


# ---------------------------------------------------------------------- data
def matrix(screen: int) -> Array:
    """M ``[G, 2]``: each entry is -1 or 1 with probability 1/2, else 0; no row is empty, and the columns differ."""
    rng = np.random.default_rng([screen, 0])
    while True:
        reads = rng.random((GENES, 2)) < 0.5
        empty = ~reads.any(1)
        reads[empty, rng.integers(2, size=int(empty.sum()))] = True
        found: Array = rng.choice([-1.0, 1.0], (GENES, 2)) * reads
        if np.linalg.matrix_rank(found) == 2:
            return found


def shifts(number: int, strength: float) -> list[tuple[float, float]]:
    """The reference, then single shifts that go through latents, signs and sizes in turn."""
    found = [(0.0, 0.0)]
    for e in range(number - 1):
        size = strength * (1 if e % 4 < 2 else -1) * (1 + e // 4)
        found.append((size, 0.0) if e % 2 == 0 else (0.0, size))
    return found


def latents(rng: np.random.Generator, offset: Sequence[float], cells: int, independent: bool) -> Array:
    """c ``[n, 2]`` in the environment (T_0, T_1); degenerate: the second is the first before its own offset."""
    first = rng.normal(size=cells) + offset[0]
    second = rng.normal(size=cells) if independent else first
    return np.stack([first, second + offset[1]], 1)


def screen(number: int, environments: Sequence[Sequence[float]], cells: int, independent: bool) -> EnvironmentDataset:
    """Cells of one matrix M in some environments, each represented by its offsets (T_0, T_1)."""
    from anndata import AnnData

    rng = np.random.default_rng([number, 1])
    names = ["control", *(f"shift_{e}" for e in range(1, len(environments)))]
    c = np.concatenate([latents(rng, offset, cells, independent) for offset in environments])
    x = c @ matrix(number).T + NOISE * rng.normal(size=(len(c), GENES))
    obs = pd.DataFrame({"environment": np.repeat(names, cells)}, index=[f"cell_{i}" for i in range(len(c))])
    representation: Any = {n: np.asarray(o, np.float32) for n, o in zip(names, environments, strict=True)}
    return EnvironmentDataset.from_anndata(
        AnnData(x.astype(np.float32), obs=obs),
        environment="environment",
        control="control",
        representation=representation,
        counts=False,
    )


# ---------------------------------------------------------------------- models
def train(name: str, cells: EnvironmentDataset, seeds: Sequence[int], steps: int, way: str = "as published") -> Run:
    """One model with a linear decoder and an encoder of 5 hidden units, all seeds together.

    Ways: ``"as published"``, ``"annealed"``, ``"unmixed"``; the latter where there are as many shifts as latents.
    """
    dense = way == "unmixed" and name in ENVIRONMENT_MODELS
    annealed = way == "annealed" and name in ENVIRONMENT_MODELS
    model, guide = programs(name, cells, dense)
    epochs = max(2, round(steps / math.ceil(len(cells) / BATCH)))
    run = ps.fit(
        model, guide, cells, seeds=seeds, epochs=epochs, batch_size=BATCH, lr=1e-2, schedule="cosine", device="cpu",
        temperature=(2.0, 0.1) if annealed else None, progress=False,
    )  # fmt: skip
    if not dense:
        return run
    # two environments are too few for a spike and slab
    return ps.refine(ps.unmix(run, cells), cells, prior="student-t", **briefly(run), device="cpu", progress=False)


def programs(name: str, cells: EnvironmentDataset, dense: bool) -> tuple[Any, Any]:
    """Model and guide."""
    options: dict[str, Any] = {"latent": 2, "hidden": ()}
    if name in ENVIRONMENT_MODELS:
        options["environment_hidden"] = (16,)
        options |= {"sparsity": "dense"} if dense else {}
        options |= {"scale": False} if name.endswith("environment_vae") else {}
    if name.startswith("structured"):
        options["depth"] = 2
    model = getattr(ps.models, name)(cells.schema, **options)
    return model, amortise(model, cells, inputs=INPUTS.get(name, ("x", "e")), hidden=(HIDDEN,))


def learnt_matrix(model: nn.Module) -> Array:
    """The decoder's matrix M ``[G, 2]`` from the latents that environments move, in the data's units."""
    likelihood: Any = model.likelihoods[0]  # type: ignore[index, union-attr]
    weight = likelihood.spread[:, None] * likelihood.net[0].weight[:, :2]
    scm: Any = model.scm
    with torch.no_grad():
        effect = scm.solve(torch.eye(2)).mT  # column j: what a unit of noise j does to c
        found: Array = (weight @ effect).double().numpy()
    return found


def batch_of(x: Array, offset: Sequence[float]) -> Batch:
    """Cells in one environment, which need not be among those that were trained on."""
    zeros = torch.zeros(len(x), dtype=torch.int64)
    return Batch(
        index=torch.arange(len(x)),
        env=zeros - 1,
        row=zeros,
        r=torch.as_tensor([list(offset)], dtype=torch.float32),
        perturbed=torch.tensor([float(any(offset))]),
        total=len(x),
        x=torch.as_tensor(x, dtype=torch.float32),
        outside=True,
    )


def reconstruction(model: Any, guide: Any, batch: Batch) -> float:
    """Mean squared error of a cell, summed over genes, at the guide's mean."""
    with torch.no_grad():
        _, shift, gain = model.parts(batch)
        c = model.scm.solve(guide.local["z"](batch).mean + shift, gain)
        location = model.likelihoods[0].location(c, batch)
        return float((batch.x - location).square().sum(1).mean())


def losses_along(run: Run, number: int, independent: bool, label: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Reconstruction loss of every member along (T, 0) and (0, T)."""
    rng, m = np.random.default_rng([number, 2]), matrix(number)
    fitted = [run.member(k) for k in range(len(run))]
    for direction in (0, 1):
        for offset in OFFSETS:
            point = (float(offset), 0.0) if direction == 0 else (0.0, float(offset))
            c = latents(rng, point, 200, independent)
            batch = batch_of(c @ m.T + NOISE * rng.normal(size=(200, GENES)), point)
            for seed, programs in zip(run.seeds, fitted, strict=True):
                loss = reconstruction(*programs, batch)
                yield {**label, "seed": seed, "direction": direction, "T": offset, "loss": loss}


def angle_of(model: nn.Module, number: int) -> dict[str, float]:
    """The optimal angle in degrees, how far it is from an axis, and the distance left there."""
    best = optimal_angle(matrix(number), learnt_matrix(model))
    return {
        "angle": float(np.degrees(best.angle)),
        "to_axis": float(np.degrees(angle_to_axis(best.angle))),
        "distance": best.distance,
    }


# ---------------------------------------------------------------------- the experiment
def seed_figures(config: TwoLatents) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Figure]]:
    """The seed's own settings: losses along both directions, and row by row agreement of the matrices."""
    losses: list[dict[str, Any]] = []
    angles: list[dict[str, Any]] = []
    figures: dict[str, Figure] = {}
    for setting, (independent, environments, models) in SEED_SETTINGS.items():
        for name in models:
            for number in range(config.screens):
                cells = screen(number, environments, config.cells, independent)
                run = train(name, cells, range(config.seeds), config.steps)
                label = {"setting": setting, "model": name, "screen": number}
                losses += losses_along(run, number, independent, label)
                angles += [{**label, "seed": s, **angle_of(run.member(k)[0], number)} for k, s in enumerate(run.seeds)]
                if number == 0:
                    title = f"{name}, {setting}"
                    figures[title.replace(", ", "_").replace(" ", "_")] = rows_figure(run, title)
    return pd.DataFrame(losses), pd.DataFrame(angles), figures


def many_environments(config: TwoLatents) -> pd.DataFrame:
    """The optimal angle of every model against the number of environments, by way of training."""
    rows: list[dict[str, Any]] = []
    for number in range(config.screens):
        for count in config.environments:
            cells = screen(number, shifts(count, config.strength), config.cells, independent=True)
            for name in ("vae", *ENVIRONMENT_MODELS):
                for way in ways(name, count):
                    run = train(name, cells, range(config.seeds), config.steps, way)
                    label = {"environments": count, "model": name, "way": way, "screen": number}
                    rows += [
                        {**label, "seed": seed, "loss": run.losses[k], **angle_of(run.member(k)[0], number)}
                        for k, seed in enumerate(run.seeds)
                    ]
    return pd.DataFrame(rows)


def shares(many: pd.DataFrame) -> pd.DataFrame:
    """Of the fits of each number of environments, model and way: median and largest angle, share within 2 degrees."""
    return many.groupby(BY)["to_axis"].agg(
        median="median", largest="max", within_2_degrees=lambda v: float((v <= 2).mean()), runs="size"
    )


def ways(name: str, environments: int) -> tuple[str, ...]:
    """Ways of training that differ for a model and a number of environments, the reference among them."""
    if name not in ENVIRONMENT_MODELS or environments == 1:
        return WAYS[:1]
    return WAYS if environments > 2 else WAYS[:2]


def main(config: TwoLatents) -> Results:
    losses, angles, figures = seed_figures(config)
    many = many_environments(config)
    summary, chosen = shares(many), shares(many.loc[many.groupby([*BY, "screen"])["loss"].idxmin()])
    figures |= {"losses": losses_figure(losses), "angles": angles_figure(many)}
    agreement = angles.groupby(["setting", "model"])[["to_axis", "distance"]].agg(["median", "min", "max"])
    agreement.columns = [" ".join(c) for c in agreement.columns]
    sparse = many[many["model"].isin(ENVIRONMENT_MODELS) & (many["environments"] >= 3)]
    near = {way: part["to_axis"] <= 2 for way, part in sparse.groupby("way", sort=False)}
    text = "Optimal angle within 2 degrees of a multiple of 90, an environment a latent or more: " + "; ".join(
        f"{way} {within.mean():.0%} of {len(within)} fits" for way, within in near.items()
    )
    tables = {
        "summary": summary,
        "restarts_by_loss": chosen,
        "agreement": agreement,
        "angles": angles,
        "many_environments": many,
    }
    return Results({**tables, "losses": losses}, figures, text)


# ---------------------------------------------------------------------- figures
def rows_figure(run: Run, title: str) -> Figure:
    """Cosine distance of each row of M R_theta to the learnt one, with and without the symmetry (as figure 6)."""
    theta = np.linspace(0, 2 * np.pi, 361)
    found = learnt_matrix(run.member(run.best)[0])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for axis, reflected in zip(axes, (False, True), strict=True):
        distances = row_cosine_distances(matrix(0), found, theta, reflected=reflected, scaled=True)
        axis.plot(theta / np.pi, distances, linewidth=0.8)
        axis.set(xlabel="theta / pi", title="with symmetry" if reflected else "as it is")
    axes[0].set_ylabel("1 - cos")
    figure.suptitle(title)
    plt.close(figure)
    return figure


def losses_figure(losses: pd.DataFrame) -> Figure:
    """Median and range over screens and seeds of the reconstruction loss along both directions (as figure 5)."""
    panels = list(losses.groupby(["setting", "model"], sort=False))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3), sharey=True, squeeze=False)
    for axis, ((setting, model), part) in zip(axes[0], panels, strict=True):
        for direction, line in part.groupby("direction"):
            spread = line.groupby("T")["loss"].quantile([0.1, 0.5, 0.9]).unstack()
            axis.plot(spread.index, spread[0.5], label=f"direction {direction}")
            axis.fill_between(spread.index, spread[0.1], spread[0.9], alpha=0.2)
        axis.set(yscale="log", xlabel="T", title=f"{model}\n{setting}")
    axes[0][0].set_ylabel("reconstruction loss")
    axes[0][0].legend()
    plt.close(figure)
    return figure


def angles_figure(many: pd.DataFrame) -> Figure:
    """Distance of the optimal angle to an axis, of every fit."""
    counts, models = sorted(many["environments"].unique()), list(many["model"].unique())
    figure, axes = plt.subplots(1, len(counts), figsize=(3 * len(counts), 3.4), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], counts, strict=True):
        part = many[many["environments"] == count]
        for i, model in enumerate(models):
            for j, way in enumerate(WAYS):
                values = part[(part["model"] == model) & (part["way"] == way)]["to_axis"]
                axis.plot(np.full(len(values), i + 0.25 * j), values, ".", color=f"C{j}", alpha=0.5, label=way)
        axis.set(title=f"{count} environments", ylim=(-1, 46))
        axis.set_xticks(range(len(models)), [m.replace("_", "\n") for m in models], fontsize=6)
    handles = {str(line.get_label()): line for line in axes[0][-1].get_lines()}
    axes[0][-1].legend(handles.values(), handles.keys(), fontsize=6)
    axes[0][0].set_ylabel("degrees to a multiple of 90")
    plt.close(figure)
    return figure


if __name__ == "__main__":
    raise SystemExit(launch(__file__, TwoLatents, main))
