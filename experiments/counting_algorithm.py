"""Trees, forests and DAGs of causal variables by counting in which environments each changes (seed section 4.2).

Four parts. Structures: with the causal variables known, how often is the graph found exactly, targets known or not, and
how often do the data contradict a tree? Curve: errors against effect size and cells of an environment. Kinds: noise
shifts, noise scales, mechanism changes and hard interventions. Inferred: the same counting on variables that a fitted
model infers from genes, matched one-to-one to the true ones.

Variables are in random order, so that none is placed by its number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd

from experiments.launch import Results, launch
from pyro_scm import graphs, infer, metrics, ordering, query, recipes
from pyro_scm.data import synthetic

INFERRED = {
    "environment_vae": {"sparsity": "top-k", "scale": False},
    "structured_environment_vae": {"sparsity": "top-k", "scale": False},
}


@dataclass(frozen=True)
class Counting:
    """Sizes."""

    trees: int = 100
    repeats: int = 50
    cells: int = 500
    strength: float = 3.0
    alpha: float = 0.01
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    cell_numbers: tuple[int, ...] = (30, 100, 300, 1000)
    latent: int = 10
    inferred: int = 5
    inferred_latent: int = 5
    inferred_environments: int = 4
    epochs: int = 60
    seeds: tuple[int, ...] = (0, 1, 2)

    @classmethod
    def preset(cls, name: str) -> "Counting":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            small = {"trees": 2, "repeats": 1, "cells": 100, "strengths": (1.0,), "cell_numbers": (100,), "latent": 5}
            return Counting(**small, inferred=1, inferred_environments=1, epochs=1, seeds=(0,))
        return Counting() if name == "paper" else Counting(repeats=5, inferred=1, epochs=20)


@dataclass(frozen=True)
class Case:
    """Cells of a screen whose variables are known.

    Args:
        graph: ``[d, d]`` entry [i, j] for i -> j.
        c: ``[n, d]``.
        env: ``[n]``; environment 0 is the reference.
        targets: ``[T]`` of environments 1 to T.
        faithful: whether every variable has an effect on each of its descendants; paths of opposite sign may cancel.
    """

    graph: np.ndarray
    c: np.ndarray
    env: np.ndarray
    targets: np.ndarray
    faithful: bool

    def changes(self, correction: str, alpha: float, test: str = "location-scale") -> ordering.Changes:
        """Tests of every variable in every environment."""
        reference = np.arange(self.env.max() + 1) == 0
        return ordering.changes(self.c, self.env, reference, correction=correction, alpha=alpha, test=test)


def case(seed: int, graph: nx.DiGraph, **settings: Any) -> Case:
    """One environment a variable, columns shuffled."""
    d = len(graph)
    screen = {"latent": d, "genes": 1, "environments": d + 1, "constant": True, **settings}
    edges = [list(map(int, e)) for e in graph.edges]
    return read(synthetic.simulate(graph=edges or "empty", seed=seed, **screen), seed)


def read(adata: Any, seed: int) -> Case:
    truth = adata.uns["truth"]
    turn = np.random.default_rng([seed, 1]).permutation(truth["graph"].shape[0])
    graph = truth["graph"].T[np.ix_(turn, turn)]
    targets = np.argmax(truth["targets"][1:][:, turn], axis=1)
    ancestors = nx.to_numpy_array(nx.transitive_closure_dag(nx.from_numpy_array(graph, create_using=nx.DiGraph)))
    faithful = True
    if "scm.weight" in truth["parameters"]:
        weight = (truth["parameters"]["scm.weight"] * truth["graph"])[np.ix_(turn, turn)]
        total = np.linalg.inv(np.eye(len(turn)) - weight.T)
        faithful = bool((np.abs(total)[ancestors > 0] > 1e-6).all())
    env = adata.obs["perturbation"].cat.codes.to_numpy().astype(np.int64)
    return Case(graph, np.asarray(adata.obsm["c"])[:, turn], env, targets, faithful)


def forest_graph(d: int, seed: int) -> nx.DiGraph:
    """A growing tree of which every edge is cut with probability 0.3."""
    rng = np.random.default_rng([seed, 2])
    tree = graphs.growing(d, seed)
    return graphs.from_edges([e for e in tree.edges if rng.random() > 0.3], range(d))


GRAPHS = {"tree": graphs.growing, "forest": forest_graph, "DAG": graphs.multi_growing}


def errors(truth: np.ndarray, found: ordering.Structure) -> dict[str, float]:
    adjacency = found.adjacency()
    scores = metrics.edge_scores(truth, adjacency)
    return {
        "exact": float((truth == adjacency).all()),
        "shd": metrics.shd(truth, adjacency),
        "order_violations": metrics.ancestral_violations(truth, adjacency),
        "edge_f1": scores.f1,
        "contradicted": float(found.contradicted),
    }


def reduced(graph: np.ndarray) -> np.ndarray:
    """The transitive reduction, all that marginals can show."""
    both = nx.from_numpy_array(graph, create_using=nx.DiGraph)
    return nx.to_numpy_array(nx.transitive_reduction(both), nodelist=range(len(graph)), dtype=int)


def structures(config: Counting) -> Iterator[dict[str, Any]]:
    """Random graphs of 5 to 20 known variables."""
    for kind, draw in GRAPHS.items():
        for seed in range(config.trees):
            d = 5 + seed % 16
            cells = case(seed, draw(d, seed), cells=config.cells, strength=config.strength)
            for correction in ("holm", "bh"):
                found = cells.changes(correction, config.alpha)
                for method in ("forest", "dag"):
                    for targets in ("unknown", "known"):
                        given = cells.targets if targets == "known" else None
                        structure = getattr(ordering, method)(found, given)
                        yield {
                            "graph": kind,
                            "d": d,
                            "seed": seed,
                            "faithful": cells.faithful,
                            "correction": correction,
                            "method": method,
                            "targets": targets,
                            **errors(reduced(cells.graph), structure),
                        }


def curve(config: Counting) -> Iterator[dict[str, Any]]:
    """Errors for trees against effect size and cells of an environment."""
    for strength in config.strengths:
        for number in config.cell_numbers:
            for seed in range(config.repeats):
                tree = graphs.growing(config.latent, seed)
                cells = case(seed, tree, cells=number, strength=strength)
                for correction in ("holm", "bh"):
                    found = cells.changes(correction, config.alpha)
                    for targets in ("unknown", "known"):
                        given = cells.targets if targets == "known" else None
                        yield {
                            "strength": strength,
                            "cells": number,
                            "seed": seed,
                            "correction": correction,
                            "targets": targets,
                            **errors(cells.graph, ordering.forest(found, given)),
                        }


def kinds(config: Counting) -> Iterator[dict[str, Any]]:
    """Kinds of intervention, mechanisms and tests."""
    for kind in synthetic.INTERVENTIONS:
        for mechanism in ("linear", "network"):
            for seed in range(config.repeats):
                tree = graphs.growing(config.latent, seed)
                settings = {"cells": 2 * config.cells, "strength": config.strength, "mechanism": mechanism}
                cells = case(seed, tree, interventions=(kind,), **settings)
                for test in ("location-scale", "ks"):
                    found = ordering.forest(cells.changes("holm", config.alpha, test), cells.targets)
                    yield {
                        "intervention": kind,
                        "mechanism": mechanism,
                        "test": test,
                        "seed": seed,
                        **errors(cells.graph, found),
                    }


def inferred(config: Counting) -> Iterator[dict[str, Any]]:
    """Trees counted on the variables that models infer from genes; the truth and its empty graph beside them."""
    d = config.inferred_latent
    for screen in range(config.inferred):
        for kind in ("shift", "hard"):
            adata = synthetic.simulate(
                latent=d,
                genes=50,
                environments=1 + d * config.inferred_environments,
                cells=config.cells,
                decoder="linear",
                interventions=(kind,),
                strength=config.strength,
                constant=True,
                seed=screen,
            )
            known = read(adata, screen)
            turn = np.random.default_rng([screen, 1]).permutation(d)
            truth, shared = np.asarray(adata.obsm["c"])[:, turn], {"screen": screen, "intervention": kind}
            found = ordering.forest(known.changes("holm", config.alpha))
            yield {**shared, "model": "known variables", "seed": 0, "mcc": 1.0, **errors(known.graph, found)}
            empty = ordering.forest(ordering.Changes(*(np.zeros((1, d), t) for t in (float, bool)), np.ones(1, int)))
            yield {**shared, "model": "no edges", "seed": 0, **errors(known.graph, empty)}
            cells = synthetic.dataset(adata)
            for name, options in INFERRED.items():
                given = {**options, "latent": d, "hidden": ()}
                model, guide = recipes.make(name, cells.schema, **given)
                run = infer.fit(
                    model, guide, cells, seeds=config.seeds, epochs=config.epochs, batch_size=256, lr=3e-3,
                    schedule="cosine",
                )  # fmt: skip
                for seed, c in zip(config.seeds, query.embed(run, cells)["c"], strict=True):
                    match = metrics.mcc(truth, c)
                    counted = ordering.forest(
                        ordering.changes(c[:, match.permutation], cells.env, cells.reference, alpha=config.alpha)
                    )
                    yield {**shared, "model": name, "seed": seed, "mcc": match.score, **errors(known.graph, counted)}


MEANS = {name: (name, "mean") for name in ("exact", "shd", "order_violations", "edge_f1", "contradicted")}


def main(config: Counting) -> Results:
    tables = {"structures": structures, "curve": curve, "kinds": kinds, "inferred": inferred}
    rows = {}
    for name, part in tables.items():
        print(name, flush=True)
        rows[name] = pd.DataFrame(part(config))
    by = ["graph", "correction", "method", "targets"]
    graphs_found = rows["structures"].groupby(by).agg(number=("exact", "size"), **MEANS)
    faithful = rows["structures"][rows["structures"]["faithful"] & (rows["structures"]["graph"] == "DAG")]
    by_kind = rows["kinds"].groupby(["intervention", "mechanism", "test"]).agg(number=("exact", "size"), **MEANS)
    by_model = (
        rows["inferred"]
        .groupby(["intervention", "model"])
        .agg(number=("exact", "size"), mcc=("mcc", "mean"), **MEANS, shd_sd=("shd", "std"))
    )
    unknown = graphs_found.loc[("tree", "holm", "forest", "unknown")]
    return Results(
        tables={
            "summary_structures": graphs_found,
            "summary_faithful_dags": faithful.groupby(by).agg(number=("exact", "size"), **MEANS),
            "summary_kinds": by_kind,
            "summary_inferred": by_model,
            **rows,
        },
        figures={"curve": figure(rows["curve"])},
        text=(
            f"{unknown['exact'] * unknown['number']:.0f} of {unknown['number']:.0f} trees of 5 to 20 known variables "
            "are found exactly, targets unknown (Holm)."
        ),
    )


def figure(curve: pd.DataFrame) -> Any:
    """SHD and order violations against the effect size, one line for each number of cells; Holm."""
    from matplotlib.figure import Figure

    holm = curve[curve["correction"] == "holm"]
    sheet = Figure(figsize=(10, 4), layout="constrained")
    for axes, (value, label) in zip(
        sheet.subplots(1, 2),
        [("shd", "structural Hamming distance"), ("order_violations", "ancestors in wrong order")],
        strict=True,
    ):
        for i, (number, own) in enumerate(holm.groupby("cells")):
            for targets, style in (("unknown", "-"), ("known", "--")):
                mean = own[own["targets"] == targets].groupby("strength")[value].mean()
                axes.plot(
                    mean.index, mean, style, marker="o", color=f"C{i}", label=f"{number} cells, targets {targets}"
                )
        axes.set(xscale="log", xlabel="shift of the target, sd of its noise", ylabel=label)
    axes.legend(fontsize=7)
    return sheet


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Counting, main))
