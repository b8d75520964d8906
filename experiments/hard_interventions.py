"""When can the graph be known? Linear Gaussian screens under hard interventions and under noise interventions.

Five latents, a random graph of five edges over them, one environment an intervention on each, 500 cells an environment.
Fitted by exact maximum likelihood, in any order of the latents, with the targets known or not. Hard interventions cut
the parents of their target: the graph is recovered, and held-out cells are worse off without it. Shifts of the noise
leave it free: the graph is worth nothing, and the report says so.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd

from experiments.launch import Results, launch
from pyro_scm import identify, infer, metrics, recipes
from pyro_scm.data import synthetic
from pyro_scm.regimes import target_labels

DESIGNS = {
    "hard, targets known": ("hard", "hard", True),
    "hard, targets unknown": ("hard", "hard", False),
    "noise, targets known": ("shift", "noise", True),
}


@dataclass(frozen=True)
class HardInterventions:
    """Sizes."""

    latent: int = 5
    edges: int = 5
    genes: int = 30
    cells: int = 500
    seeds: tuple[int, ...] = tuple(range(20))
    restarts: int = 8

    @classmethod
    def preset(cls, name: str) -> "HardInterventions":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return HardInterventions(latent=3, edges=2, genes=8, cells=200, seeds=(0,), restarts=1)
        return HardInterventions() if name == "paper" else HardInterventions(seeds=tuple(range(5)))


def main(config: HardInterventions) -> Results:
    rows = []
    for name, (kind, model_kind, known) in DESIGNS.items():
        for seed in config.seeds:
            rows.append({"design": name, "seed": seed, **one(config, kind, model_kind, known, seed)})
            print(rows[-1], flush=True)
    scores = pd.DataFrame(rows)
    return Results(
        tables={"summary": summary(scores), "scores": scores},
        figures={"gain": figure(scores)},
        text=f"{len(config.seeds)} screens a design, {config.latent} latents, {config.cells} cells an environment.",
    )


def one(config: HardInterventions, kind: str, model_kind: str, known: bool, seed: int) -> dict[str, Any]:
    """One screen: recovery of the graph and the noise, gain of the graph, verdict."""
    adata = synthetic.simulate(
        latent=config.latent,
        genes=config.genes,
        environments=config.latent + 1,
        cells=config.cells,
        graph=graph(config, seed),
        decoder="linear",
        interventions=(kind,),
        seed=seed,
    )
    cells = synthetic.dataset(adata)
    labels = target_labels(cells.environments) if known else None
    model, guide = recipes.make(
        "structured_environment_vae",
        cells.schema,
        latent=config.latent,
        hidden=(),
        edges="order-free",
        interventions=model_kind,
        targets=labels,
    )
    # the report fits exactly: the run only says which model is meant
    run = infer.fit(model, guide, cells, epochs=1, batch_size=256, progress=False)
    report = identify.identify(run, cells, seeds=range(config.restarts))
    assert report.exact is not None
    truth = adata.uns["truth"]["graph"].T
    matched = metrics.mcc(adata.obsm["z"], report.exact.noise(np.asarray(cells.x), cells.env))
    found = nx.to_numpy_array(report.exact.graph(), nodelist=range(config.latent))
    order = matched.permutation
    low, high = report.interval()
    return {
        "edges": int(truth.sum()),
        "shd": metrics.shd(truth, found[np.ix_(order, order)]),
        "mcc_z": matched.score,
        "gain": report.gain,
        "low": low,
        "high": high,
        "identified": report.identified,
    }


def graph(config: HardInterventions, seed: int) -> list[list[int]]:
    """Edges of a random DAG: so many of the pairs of a random order."""
    rng = np.random.default_rng([seed, 7])
    order = rng.permutation(config.latent).tolist()
    pairs = list(itertools.combinations(order, 2))
    return [list(pairs[i]) for i in rng.choice(len(pairs), config.edges, replace=False)]


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over screens, and shares of screens."""
    rows = {}
    for design, table in scores.groupby("design", sort=False):
        rows[design] = {
            "edges": table["edges"].mean(),
            "shd": table["shd"].mean(),
            "share shd <= 1": (table["shd"] <= 1).mean(),
            "mcc_z": table["mcc_z"].mean(),
            "lowest mcc_z": table["mcc_z"].min(),
            "gain": table["gain"].mean(),
            "share gain >= 0.2": (table["gain"] >= 0.2).mean(),
            "share 'graph identified'": table["identified"].mean(),
        }
    return pd.DataFrame(rows).T.rename_axis("design")


def figure(scores: pd.DataFrame) -> Any:
    """Held-out gain of the graph against its number of edges, with intervals."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 3.6))
    axes = drawn.subplots()
    for offset, (design, table) in enumerate(scores.groupby("design", sort=False)):
        error = np.stack([table["gain"] - table["low"], table["high"] - table["gain"]]).clip(min=0)
        axes.errorbar(table["edges"] + 0.15 * (offset - 1), table["gain"], error, fmt="o", ms=4, label=str(design))
    axes.axhline(0, color="0.7", lw=1)
    axes.set_xlabel("edges of the true graph")
    axes.set_ylabel("held-out gain of the graph, nats per cell")
    axes.legend()
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, HardInterventions, main))
