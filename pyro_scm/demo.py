"""The demonstration: a simulated screen with a known latent SCM, fitted, scored, asked and reported."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm import evaluation, metrics, query
from pyro_scm.data import splits, synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.report import Report
from pyro_scm.run import Run
from pyro_scm.threads import few_threads

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

__all__ = ["demo"]

MODELS: dict[str, dict[str, Any]] = {
    "vae": {},
    "conditional_vae": {},
    "environment_vae": {"scale": False},
    "translation_vae": {},
    "structured_environment_vae": {"scale": False, "depth": 3},
    "structured_translation_vae": {"depth": 3},
}
ASKED = "environment_vae"


def demo(
    out: str | Path,
    *,
    quick: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
    progress: bool | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Simulate, fit baselines and models, score them on unseen environments, ask one do-query and one counterfactual.

    Everything learnt stands beside the truth, which the simulation knows.

    Args:
        out: folder for the report, the tables and the fitted run.
        quick: a screen small enough for a test.
        seeds: of each model.
        progress: show progress bars.
        say: receives one line for each step.

    Returns:
        path of the HTML report.
    """
    with few_threads():  # a small screen
        return _demo(Path(out), quick, seeds, progress, say)


def _demo(out: Path, quick: bool, seeds: Sequence[int], progress: bool | None, say: Callable[[str], None]) -> Path:
    started = time.perf_counter()
    screen = synthetic.Screen(
        latent=5,
        genes=20 if quick else 60,
        environments=16 if quick else 41,
        cells=30 if quick else 120,
        descriptors=12,
        descriptor_noise=0.1,
        noise=0.5,
    )
    say(
        f"Simulating {screen.environments} environments x {screen.cells} cells x {screen.genes} genes from a latent "
        f"SCM of {screen.latent} variables ..."
    )
    adata = synthetic.simulate(screen)
    cells = synthetic.dataset(adata, "descriptors")
    split = splits.by_environment(cells, fraction=0.25, seed=0)
    options = {name: {"latent": screen.latent, **given} for name, given in MODELS.items()}
    epochs = 4 if quick else 60
    say(f"Fitting {len(options)} models with {len(seeds)} seeds each, as ensembles ...")
    comparison = evaluation.compare(
        split, options, seeds=seeds, epochs=epochs, lr=3e-3, schedule="cosine", progress=progress
    )
    comparison.save(out / "compare")
    summary = comparison.brief()
    say("\nOut of distribution: unseen environments, predicted from their descriptors\n")
    say(summary.to_string())
    recovered = {name: evaluation.recovery(run, split.train, adata) for name, run in comparison.runs.items()}
    recovery = pd.concat(recovered, names=["model"]).groupby("model").median(numeric_only=True).loc[list(recovered)]
    recovery = recovery.drop(columns=[c for c in ("member", "seed") if c in recovery])
    say("\nRecovery of the true latents (median over seeds)\n")
    say(recovery.to_string(float_format=lambda v: f"{v:.3f}"))
    run = comparison.runs[ASKED]
    run.save(out / "run")
    asked = _do_query(run, adata, split.train)
    moved = _counterfactual(run, adata, split)
    say(f"\n{asked['sentence']}\n{moved['sentence']}")
    path = _report(out, screen, summary, recovery, comparison.figure(), asked, moved, time.perf_counter() - started)
    say(f"\nReport: {path}  ({time.perf_counter() - started:.0f} s)")
    return path


def _controls(cells: EnvironmentDataset) -> EnvironmentDataset:
    return cells.subset(cells.reference[cells.env])


def _do_query(run: Run, adata: "AnnData", cells: EnvironmentDataset) -> dict[str, Any]:
    """The effect of raising one causal variable by two standard deviations, learnt beside true.

    A learnt latent is known up to permutation, sign and scale: it is matched to the true one by correlation, and its
    step is the one that its own units give the true step of two standard deviations.
    """
    controls = _controls(cells)
    learnt = query.embed(run, cells)["c"]
    truth = synthetic.known(adata, cells)
    true_c = query.embed(truth, cells)["c"][0]
    found = metrics.mcc(true_c, learnt[run.best])
    j = int(np.argmax(np.abs(found.correlations)))
    k = int(found.permutation[j])
    step = 2 * float(true_c[:, j].std())
    slope = float(np.polyfit(true_c[:, j], learnt[run.best][:, k], 1)[0])
    answer = query.effect(
        run.member(run.best), controls, do={f"c_{k}": lambda c: c + slope * step}, versus=None
    ).summary()
    true = query.effect(synthetic.known(adata, controls), controls, do={f"c_{j}": lambda c: c + step}).summary()
    correlation = metrics.pearson(true["effect"].to_numpy(), answer["effect"].to_numpy())
    return {
        "true": true["effect"].to_numpy(),
        "learnt": answer["effect"].to_numpy(),
        "sentence": (
            f"do(c_{k} := c_{k} {slope * step:+.2f}), the learnt match of true latent {j} raised by two standard "
            f"deviations: average effect on {len(true)} genes correlates {correlation:.3f} with the true effect."
        ),
    }


def _counterfactual(run: Run, adata: "AnnData", split: splits.Split) -> dict[str, Any]:
    """Control cells, had they been in an environment that no model has seen, learnt beside the true counterfactual."""
    controls = _controls(split.train)
    truth = synthetic.known(adata, controls)
    names = [str(split.test.environments.index[e]) for e in split.test.present]
    scores: list[float] = []
    answers: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    for name in names:
        learnt = query.counterfactual(run.member(run.best), controls, environment=name)
        true = query.counterfactual(truth, controls, environment=name)
        answers.append((true.x[0, 0], learnt.x[0, 0]))
        scores.append(metrics.r2(true.effect.mean((0, 1, 2)), learnt.effect.mean((0, 1, 2))))
    middle = int(np.argsort(scores)[len(scores) // 2])
    true_x, learnt_x = answers[middle]
    return {
        "true": true_x,
        "learnt": learnt_x,
        "environment": names[middle],
        "sentence": (
            f"Counterfactual of {len(controls)} control cells in {len(names)} unseen environments: R2 of the average "
            f"effect on genes, median {np.median(scores):.3f} (from {min(scores):.3f} to {max(scores):.3f})."
        ),
    }


def _report(
    out: Path,
    screen: synthetic.Screen,
    summary: pd.DataFrame,
    recovery: pd.DataFrame,
    scores: "Figure",
    asked: dict[str, Any],
    moved: dict[str, Any],
    seconds: float,
) -> Path:
    report = Report("pyro_scm: a simulated perturbation screen, fitted and questioned")
    report.text(
        f"{screen.environments} environments ({screen.cells} cells each, {screen.genes} genes) were simulated from a "
        f"latent structural causal model of {screen.latent} variables; each environment shifts the noise of one. A "
        "quarter of the environments was held out whole. Models see a descriptor of each environment, as a molecule's "
        f"fingerprint would be. This page took {seconds:.0f} s to make."
    )
    report.section(
        "Prediction of unseen environments",
        "Simple baselines first. Scores are averages over held-out environments; the spread is over seeds. All are of "
        "the change from control: absolute expression flatters every model.",
    )
    report.table(summary)
    report.figure(scores, "Each point is one seed; baselines have none.")
    report.section(
        "Recovery of the true latents",
        "MCC: mean correlation of matched true and learnt latents. Under noise interventions the noise z can be "
        "recovered up to permutation and scale; a graph over c cannot, because the decoder absorbs it.",
    )
    report.table(recovery)
    report.section("A do-query beside the truth", asked["sentence"])
    report.figure(_scatter(asked["true"], asked["learnt"], "effect on a gene"), "One point a gene.")
    report.section("A counterfactual beside the truth", moved["sentence"])
    report.figure(
        _scatter(moved["true"].ravel(), moved["learnt"].ravel(), "counterfactual expression", small=True),
        f"One point a cell and gene, environment {moved['environment']} (the median one).",
    )
    report.section("The same by hand")
    report.code(
        "import pyro_scm as ps\nfrom guides import amortise\n\n"
        "run = ps.load('run')\n"
        "ps.counterfactual(run, cells, do={'c_3': 2.0})"
    )
    return report.write(out / "report.html")


def _scatter(true: NDArray[Any], learnt: NDArray[Any], what: str, small: bool = False) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.4))
    axes = figure.subplots()
    axes.plot(true, learnt, ".", markersize=1 if small else 6, alpha=0.2 if small else 0.8, color="#1f5fa8")
    span = [float(min(true.min(), learnt.min())), float(max(true.max(), learnt.max()))]
    axes.plot(span, span, color="#888", linewidth=0.8)
    axes.set(xlabel=f"true {what}", ylabel=f"learnt {what}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
