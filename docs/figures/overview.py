"""The figure of the front page, from one fit: `python docs/figures/overview.py`.

A simulated screen of six latents and 40 genes, each environment shifting one or two latents. A Translation VAE with
dense effects is fitted; its effects are shown as fitted and after `unmix` and `refine`, beside the true targets; then
one cell is asked what it would have been under do(c_j := v), beside the answer of the SCM that made the cell. Cell,
node and value are fixed here; of the restarts the one with the lowest loss is shown, as a user would take it.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import pyro_scm as ps
from guides import amortise
from pyro_scm.data import synthetic
from pyro_scm.threads import few_threads

OUT = Path(__file__).parents[1] / "assets" / "overview.png"
SCREEN = synthetic.Screen(
    latent=6, genes=40, environments=25, cells=150, graph="empty", decoder="deep", layers=2, width=30, most_targets=2,
    constant=True, strength=4.0, spread=0.5, noise_share=0.2, cover=False, seed=3,
)  # fmt: skip
CELL, NODE, LEVEL = 0, 0, 0.95


def fitted(cells: ps.EnvironmentDataset) -> list[ps.Run]:
    """The dense run, and the same unmixed and refined."""
    model = ps.models.translation_vae(
        cells.schema, latent=6, hidden=(64, 64), environment_hidden=(), sparsity="dense", shortcut=True,
        effect_rate=10.0,
    )  # fmt: skip
    guide = amortise(model, cells, hidden=(64,))
    dense = ps.fit(model, guide, cells, seeds=range(3), epochs=100, lr=3e-3, progress=False)
    return [dense, ps.refine(ps.unmix(dense, cells), cells, epochs=80, progress=False)]


def matched(run: ps.Run, cells: ps.EnvironmentDataset, true_c: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """|effects| ``[E - 1, d]`` of the best member, its latents in the true ones' order; that order; the MCC of c."""
    found = ps.metrics.mcc(true_c, ps.embed(run, cells)["c"][run.best])
    table = ps.effects.shifts(run).to_numpy().reshape(len(run), SCREEN.environments, -1)
    return np.abs(table[run.best][1:, found.permutation]), found.permutation, found.score


def counterfactual(
    run: ps.Run, cells: ps.EnvironmentDataset, truth: object, order: np.ndarray
) -> dict[str, np.ndarray]:
    """One cell as measured, and under do(c_j := v) by the learnt model and by the one that made the cell.

    A learnt latent has units of its own: v is taken to them by the least-squares line over the cells.
    """
    learnt = run.member(run.best)
    ours, theirs = (ps.counterfactual(one, cells).factual_c[0, 0] for one in (learnt, truth))
    value = float(np.quantile(theirs[:, NODE], LEVEL))
    slope, offset = np.polyfit(theirs[:, NODE], ours[:, order[NODE]], 1)
    site = f"c_{order[NODE]}"
    asked = ps.counterfactual(learnt, cells, do={site: float(slope * value + offset)})
    known = ps.counterfactual(truth, cells, do={f"c_{NODE}": value})
    factual, found, true = (x[0, 0, CELL] for x in (asked.factual_x, asked.x, known.x))
    return {"factual": factual, "learnt": found, "true": true, "value": np.float64(value)}


def draw(panels: list[tuple[str, np.ndarray]], targets: np.ndarray, cell: dict[str, np.ndarray]) -> Figure:
    """Two matrices of effects and a cell."""
    figure = Figure(figsize=(10, 3.5), layout="constrained", dpi=110)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 2.1))
    order = np.lexsort(targets.T[::-1])[::-1]
    for axes, (title, effects) in zip((left, middle), panels, strict=True):
        axes.imshow(effects[order] / effects.max(), cmap="Blues", aspect="auto", vmin=0, vmax=1)
        rows, columns = np.nonzero(targets[order])
        axes.scatter(columns, rows, s=30, facecolors="none", edgecolors="#b03a2e", linewidths=1.0)
        axes.set(title=title, xlabel="latent", xticks=range(targets.shape[1]), yticks=[])
    left.set_ylabel("perturbation (circles: its true targets)")
    genes = np.argsort(cell["true"] - cell["factual"])
    for name, style, colour, label in (
        ("factual", "-", "#9a9a9a", "the cell as it is, reconstructed"),
        ("learnt", "-", "#1f5fa8", f"do($c_{NODE}$ := {cell['value']:.1f}), fitted model"),
        ("true", "o", "#b03a2e", "the same, true SCM"),
    ):
        right.plot(cell[name][genes], style, color=colour, label=label, markersize=4, markerfacecolor="none")
    right.set(title="One cell, factual and counterfactual", xlabel="gene, by its true change", ylabel="expression")
    right.set_xticks([])
    right.legend(frameon=False, fontsize=8)
    for axes in figure.axes:
        axes.title.set_fontsize(10)
    right.spines[["top", "right"]].set_visible(False)
    return figure


SIMULATED = synthetic.simulate(SCREEN)


def main() -> None:
    """Fit, ask, draw."""
    with few_threads():
        cells = synthetic.dataset(SIMULATED)
        truth = synthetic.known(SIMULATED, cells)
        names = ("as fitted: rotated", "unmixed and refined")
        panels, order = [], np.arange(SCREEN.latent)
        for name, run in zip(names, fitted(cells), strict=True):
            effects, order, score = matched(run, cells, SIMULATED.obsm["c"])
            panels.append((f"{name} (MCC {score:.2f})", effects))
        cell = counterfactual(run, cells, truth, order)
    targets = np.asarray(SIMULATED.uns["truth"]["targets"])[1:]
    OUT.parent.mkdir(exist_ok=True)
    draw(panels, targets, cell).savefig(OUT)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB; " + "; ".join(title for title, _ in panels))


if __name__ == "__main__":
    main()
