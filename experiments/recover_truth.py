"""Do sparse causal latents come out sparse? The simulators of the literature, one command.

Fits of the Translation VAE to screens whose truth is known, with unknown targets: trained sparse from the start, as
published models are (a spike-and-slab mask, and the sparse softmax with its temperature annealed); dense; unmixed; and
refined under a spike and slab. Of each model several restarts, of which the one with the lowest loss is kept: no choice
looks at the truth.

Scores: MCC and linear R2 of the noise of single cells; F1 of the targets that have an inclusion probability above 1/2
(of a mask its own); expected calibration error of these probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import pyro_scm as ps
from experiments.launch import Results, launch
from guides import amortise
from pyro_scm import checkpoints, effects, metrics
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.metrics.recovery import detection
from pyro_scm.run import Run

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Task:
    """A screen and what the models are told of it.

    Args:
        screen: of `synthetic.SCREENS`.
        latent: of the models.
        settings: of the screen that differ.
    """

    screen: str
    latent: int
    settings: tuple[tuple[str, Any], ...] = ()


TASKS = {
    "five latents": Task("five-latents", 5, (("cells", 200),)),
    "SAMS-VAE": Task("sams-vae", 15),
    "SAMS-VAE, 50 cells": Task("sams-vae", 15, (("cells", 50),)),
    "SAMS-VAE, 30 latents": Task("sams-vae", 30),
    "sVAE+": Task("svae", 15),
    # never looked at while the method was made
    "kept apart": Task(
        "sams-vae",
        12,
        (
            ("latent", 12),
            ("genes", 150),
            ("environments", 81),
            ("cells", 300),
            ("layers", 2),
            ("width", 80),
            ("noise_share", 0.35),
            ("target_share", 0.0),
            ("most_targets", 3),
            ("strength", 4.0),
            ("spread", 1.0),
        ),
    ),
}


@dataclass(frozen=True)
class RecoverTruth:
    """Sizes of the experiment.

    Args:
        tasks: of `TASKS`.
        screens: of each task, each of a seed of its own.
        restarts: of each model on each screen.
        steps: of training, and as many again where a fit is refined.
        cells: in each environment, at most.
        first: seed of the first screen.
        published: of how many screens models are also trained sparse from the start.
        kept: CSV of scores: screens that are in it are not fitted again, others are added as they are done.
    """

    tasks: tuple[str, ...] = ("five latents", "SAMS-VAE")
    screens: int = 1
    restarts: int = 2
    steps: int = 1000
    cells: int = 100
    first: int = 0
    published: int = 1
    kept: str = ""

    @classmethod
    def preset(cls, name: str) -> "RecoverTruth":
        """Sizes of a preset."""
        if name == "smoke":
            return cls(tasks=("five latents",), steps=20, cells=10)
        if name == "paper":
            return cls(tasks=tuple(TASKS), screens=10, restarts=4, steps=6000, cells=500, published=2)
        return cls()


# ---------------------------------------------------------------------- training
def fitted(
    cells: EnvironmentDataset,
    latent: int,
    config: RecoverTruth,
    sparsity: str = "dense",
    width: int | None = None,
    effect_rate: float = 10.0,
) -> Run:
    """The Translation VAE, all restarts together."""
    wide = len(cells.genes) > 50
    hidden = (width or 200,) * 2 if wide else (width or 100,)  # seed 6.4: networks of one layer
    model = ps.models.translation_vae(
        cells.schema, latent=latent, hidden=hidden, environment_hidden=(), sparsity=sparsity,
        k=max(1, latent // 7), shortcut=True, effect_rate=effect_rate,
    )  # fmt: skip
    batch = 256 if len(cells) > 10_000 else 128
    return ps.fit(
        model, amortise(model, cells, hidden=hidden), cells, seeds=range(config.restarts), batch_size=batch,
        epochs=max(2, round(config.steps * batch / len(cells))), lr=3e-3, schedule="cosine",
        temperature=(2.0, 0.1) if sparsity == "softmax" else None,
        precision="bfloat16" if wide else "float32",  # 0.6 of the time; scores of a screen differ by .01 at most
        device="cpu", progress=False,
    )  # fmt: skip


def ways(cells: EnvironmentDataset, latent: int, config: RecoverTruth, published: bool) -> dict[str, Callable[[], Run]]:
    """Name -> fit; the dense fit is made once."""
    made: dict[str, Run] = {}

    def dense() -> Run:
        return made.setdefault("dense", fitted(cells, latent, config, "dense"))

    def unmixed() -> Run:
        return made.setdefault("unmixed", ps.unmix(dense(), cells))

    from_the_start = {
        "spike-slab": lambda: fitted(cells, latent, config, "spike-slab"),
        "softmax": lambda: fitted(cells, latent, config, "softmax"),
    }
    return {
        **(from_the_start if published else {}),
        "dense": dense,
        "unmixed": unmixed,
        "refined": lambda: ps.refine(unmixed(), cells, device="cpu", progress=False),
    }


# ---------------------------------------------------------------------- scores
def score(run: Run, cells: EnvironmentDataset, adata: "AnnData", way: str) -> dict[str, float]:
    """Of the member with the lowest loss."""
    best = run.best
    shift = effects.shifts(run).loc[best].to_numpy()
    z = ps.embed(run, cells)["z"][best].astype(np.float64) + shift[cells.env]
    matched = metrics.mcc(adata.obsm["z"], z)
    found = (effects.mask(run) if way == "spike-slab" else effects.inclusion(run)).loc[best].to_numpy()
    order = [str(name) for name in adata.obs["perturbation"].cat.categories]
    own = [order.index(str(name)) for name in cells.environments["perturbation"]]
    targets = np.asarray(adata.uns["truth"]["targets"], bool)[own]
    truth, probability = aligned(targets, found, matched.permutation)
    asked = ~cells.reference
    detected = detection(truth[asked], probability[asked] > 0.5)
    return {
        "mcc_z": matched.score,
        "linear_r2_z": metrics.linear_r2(adata.obsm["z"], z),
        "f1": detected.f1,
        "precision": detected.precision,
        "recall": detected.recall,
        "calibration error": calibration_error(truth[asked], probability[asked]),
        "share on": float((probability[asked] > 0.5).mean()),
        "loss": run.losses[best],
    }


def aligned(
    truth: NDArray[np.bool_], found: NDArray[np.float64], permutation: NDArray[np.intp]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Both with one column a latent; latents of the model that match no true one are targets of nothing."""
    rest = [j for j in range(found.shape[1]) if j not in set(permutation.tolist())]
    columns = np.concatenate([permutation, np.array(rest, dtype=np.intp)])
    padded = np.pad(truth, ((0, 0), (0, len(rest))))
    return padded, found[:, columns]


def calibration_error(truth: NDArray[np.bool_], probability: NDArray[np.float64], bins: int = 10) -> float:
    """Expected calibration error: mean over entries of |share of targets - mean probability| in their bin."""
    place = np.clip((probability * bins).astype(int), 0, bins - 1).ravel()
    count = np.bincount(place, minlength=bins)
    on = np.bincount(place, truth.ravel(), minlength=bins)
    said = np.bincount(place, probability.ravel(), minlength=bins)
    return float(np.abs(on - said).sum() / count.sum())


# ---------------------------------------------------------------------- the experiment
def main(config: RecoverTruth) -> Results:
    scores = pd.read_csv(config.kept) if config.kept and Path(config.kept).is_file() else pd.DataFrame()
    done = set(zip(scores["task"], scores["screen"], strict=True)) if len(scores) else set()
    asked = [(t, n) for t in config.tasks for n in range(config.first, config.first + config.screens)]
    for name, number in asked:
        if (name, number) not in done:
            rows = one_screen(name, number, config)
            scores = pd.concat([scores, pd.DataFrame(rows)], ignore_index=True)
            if config.kept:
                checkpoints.write_text(Path(config.kept), scores.round(3).to_csv(index=False))
    scores = scores[[pair in asked for pair in zip(scores["task"], scores["screen"], strict=True)]]
    text = f"{len(asked)} screens; of {config.restarts} restarts that with the lowest loss."
    return Results({"summary": summary(scores), "scores": scores}, {"recovery": figure(scores)}, text)


def one_screen(name: str, number: int, config: RecoverTruth) -> list[dict[str, Any]]:
    """Scores of all ways."""
    task = TASKS[name]
    settings = {"cells": config.cells, **dict(task.settings)}
    settings["cells"] = min(settings["cells"], config.cells)
    adata = ps.simulate(task.screen, seed=number, **settings)
    cells = synthetic.dataset(adata)
    rows: list[dict[str, Any]] = []
    for way, run in ways(cells, task.latent, config, number - config.first < config.published).items():
        rows.append({"task": name, "way": way, "screen": number, **score(run(), cells, adata, way)})
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Medians over screens, and the worst screen."""
    groups = scores.groupby(["task", "way"], sort=False)
    table = groups[["mcc_z", "linear_r2_z", "f1", "calibration error", "share on"]].median()
    worst = {"mcc_z worst": groups["mcc_z"].min(), "f1 worst": groups["f1"].min()}
    return table.assign(**worst, screens=groups.size())


def figure(scores: pd.DataFrame) -> "Figure":
    """MCC and F1 of every screen."""
    from matplotlib.figure import Figure

    tasks, names = list(scores["task"].unique()), list(scores["way"].unique())
    drawn = Figure(figsize=(2.6 * len(tasks) + 1, 3.6))
    axes = drawn.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        part = scores[scores["task"] == task]
        for i, name in enumerate(names):
            own = part[part["way"] == name]
            axis.plot(np.full(len(own), i - 0.1), own["mcc_z"], "o", color="C0", ms=4, label="MCC of z")
            axis.plot(np.full(len(own), i + 0.1), own["f1"], "s", color="C1", ms=4, label="F1 of targets")
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
        axis.set(title=task, ylim=(0, 1.02))
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].legend(handles[:2], labels[:2], fontsize=7)
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, RecoverTruth, main))
