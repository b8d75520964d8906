"""Eleven signalling proteins in single cells, five of them acted on: the graph, against the one that experts agree on.

Sachs et al., Science 2005: variables are measured, none is latent. Exact search over all acyclic graphs, under hard
interventions (the target's parents cut), under shifts (they stay), from unperturbed cells alone; beside them the greedy
searches GES (Chickering 2002) and GIES (Hauser and Bühlmann 2012), where the packages ``ges`` and ``gies`` are
installed, and graphs drawn at random with as many edges. The consensus of 18 arcs is what the literature scores
against; it is textbook knowledge, not a measured truth, and the inhibitors act on activity more than on abundance.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.launch import Results, data_folder, launch
from pyro_scm import metrics
from pyro_scm.errors import DataError
from pyro_scm.structure_search import learn_graph

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IntArray = NDArray[np.int64]
PROTEINS = ("Raf", "Mek", "PLCg", "PIP2", "PIP3", "Erk", "Akt", "PKA", "PKC", "p38", "JNK")
CONSENSUS = (
    ("Raf", "Mek"), ("Mek", "Erk"), ("PLCg", "PIP2"), ("PLCg", "PKC"), ("PIP2", "PKC"), ("PIP3", "PLCg"),
    ("PIP3", "PIP2"), ("PIP3", "Akt"), ("PKA", "Raf"), ("PKA", "Mek"), ("PKA", "Erk"), ("PKA", "Akt"), ("PKA", "p38"),
    ("PKA", "JNK"), ("PKC", "Raf"), ("PKC", "Mek"), ("PKC", "p38"), ("PKC", "JNK"),
)  # fmt: skip
TARGETS = ("none", "1", "3", "4", "6", "8")


@dataclass(frozen=True)
class Sachs:
    """Sizes.

    Args:
        cells: of each environment, at most.
        resamples: bootstrap samples that edge probabilities are averaged over.
        random: graphs drawn at random.
    """

    cells: int = 400
    resamples: int = 2
    random: int = 20

    @classmethod
    def preset(cls, name: str) -> "Sachs":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return Sachs(cells=100, resamples=0, random=3)
        return Sachs(cells=10_000, resamples=10, random=200) if name == "paper" else Sachs()


def load(folder: Path, cells: int = 10_000) -> tuple[pd.DataFrame, IntArray, NDArray[np.float64]]:
    """Log abundances ``[n, 11]``, environment of each cell ``[n]`` (0: none acted on), targets ``[6, 11]``.

    Args:
        folder: with ``sachs_log_target_<target>.txt``, the target a 0-based column or ``none``.
        cells: of each environment, at most: the first ones.

    Raises:
        DataError: a file that is missing, or has other columns.
    """
    tables, targets = [], np.zeros((len(TARGETS), len(PROTEINS)))
    for e, target in enumerate(TARGETS):
        path = folder / f"sachs_log_target_{target}.txt"
        if not path.is_file():
            raise DataError(f"{path}: no such file: give the folder of the six tables, one an intervention")
        table = pd.read_csv(path)
        if tuple(table.columns) != PROTEINS:
            raise DataError(f"{path}: columns are {', '.join(map(str, table.columns))}: expected {', '.join(PROTEINS)}")
        tables.append(table.iloc[:cells])
        if target != "none":
            targets[e, int(target)] = 1
    env = np.repeat(np.arange(len(tables)), [len(t) for t in tables])
    return pd.concat(tables, ignore_index=True), env, targets


def consensus() -> nx.DiGraph:
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(PROTEINS)
    graph.add_edges_from(CONSENSUS)
    return graph


def intervention_distance(truth: nx.DiGraph, found: nx.DiGraph) -> int:
    """Structural intervention distance: ordered pairs (i, j) whose effect the found graph's parents of i get wrong.

    Range 0 to d (d - 1), lower is better. Source: Peters and Bühlmann, Neural Computation 2015.

    Args:
        truth: a DAG.
        found: another over the same nodes.
    """
    return sum(
        not _adjusts(truth, i, j, set(found.predecessors(i))) for i in truth for j in truth if i != j
    )  # fmt: skip


def _adjusts(truth: nx.DiGraph, i: Any, j: Any, adjusted: set[Any]) -> bool:
    """Whether adjusting for these nodes, the found parents of i, gives the effect of i on j in truth."""
    after = nx.descendants(truth, i)
    if j in adjusted:
        return j not in after
    causal = (after & (nx.ancestors(truth, j) | {j})) if j in after else set()
    blocked = set().union(*(nx.descendants(truth, k) | {k} for k in causal)) if causal else set()
    if adjusted & blocked:
        return False
    back = truth.copy()
    back.remove_edges_from([(i, k) for k in causal if truth.has_edge(i, k)])
    return bool(nx.is_d_separator(back, {i}, {j}, adjusted))


def scores(found: nx.DiGraph) -> dict[str, float]:
    """Of a graph against the consensus."""
    truth = consensus()
    a, b = (nx.to_numpy_array(g, nodelist=PROTEINS, weight=None) for g in (truth, found))
    detected = metrics.edge_scores(a, b)
    return {
        "edges": int(b.sum()),
        "true edges": int((a * b).sum()),
        "reversed": int((a.T * b).sum()),
        "shd": metrics.shd(a, b),
        "sid": intervention_distance(truth, found),
        "precision": detected.precision,
        "recall": detected.recall,
        "f1": detected.f1,
    }


def greedy(values: pd.DataFrame, env: IntArray, targets: NDArray[np.float64]) -> dict[str, nx.DiGraph]:
    """Graphs of the published greedy searches, one of each class that is found; none where they are not installed."""
    try:
        import ges
        import gies
    except ImportError:
        print("no rows of GES and GIES: pip install ges gies")
        return {}
    parts = [values.to_numpy()[env == e] for e in range(len(targets))]
    classes = {
        "GIES, all experiments": gies.fit_bic(parts, [np.flatnonzero(t).tolist() for t in targets])[0],
        "GES, unperturbed cells": ges.fit_bic(parts[0])[0],
    }
    graphs = {name: nx.DiGraph(ges.utils.pdag_to_dag(found)) for name, found in classes.items()}
    return {name: nx.relabel_nodes(graph, dict(enumerate(PROTEINS))) for name, graph in graphs.items()}


def drawn(number: int, seed: int) -> nx.DiGraph:
    """A random DAG: so many of the pairs of a random order."""
    rng = np.random.default_rng(seed)
    order = [str(p) for p in rng.permutation(PROTEINS)]
    pairs = [(a, b) for k, b in enumerate(order) for a in order[:k]]
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(PROTEINS)
    graph.add_edges_from(pairs[k] for k in rng.choice(len(pairs), number, replace=False))
    return graph


def main(config: Sachs) -> Results:
    values, env, targets = load(data_folder("sachs_signalling"), config.cells)
    rows, edges = {}, []
    for mechanism, kind, batches in itertools.product(("linear", "additive"), ("hard", "shift"), (False, True)):
        if kind == "shift" and batches:
            continue  # experiments that all have intercepts of their own have no shifts left
        way = f"{mechanism}, {kind} interventions" + (", within experiments" if batches else "")
        found = learn_graph(
            values, env, targets, mechanism=mechanism, interventions=kind, batches=batches, resamples=config.resamples
        )
        rows[way] = scores(found.graph)
        edges.append(found.edges(0.05).assign(way=way))
    alone = env == 0
    for mechanism in ("linear", "additive"):
        found = learn_graph(values[alone], env[alone], targets[:1], mechanism=mechanism)
        rows[f"{mechanism}, unperturbed cells"] = scores(found.graph)
    rows |= {way: scores(graph) for way, graph in greedy(values, env, targets).items()}
    table = pd.DataFrame(rows).T
    for way in ("linear, hard interventions", "linear, hard interventions, within experiments"):
        number = int(rows[way]["edges"])
        chance = pd.DataFrame([scores(drawn(number, seed)) for seed in range(config.random)])
        table.loc[f"random, {number} edges (mean)"] = chance.mean()
    table.loc["no edges"] = pd.Series(scores(drawn(0, 0)))
    listed = pd.concat(edges, ignore_index=True)
    listed["in consensus"] = [pair in CONSENSUS for pair in zip(listed["parent"], listed["child"], strict=True)]
    return Results(
        {"scores": table.rename_axis("way"), "edges": listed},
        {"edges": figure(listed)},
        f"{len(values)} cells, {len(CONSENSUS)} arcs in the consensus.",
    )


def figure(listed: pd.DataFrame) -> "Figure":
    """Probabilities of the edges found, those of the consensus apart."""
    from matplotlib.figure import Figure

    shown = Figure(figsize=(6, 3.2))
    axes = shown.subplots()
    for k, (_, part) in enumerate(listed.groupby("way", sort=False)):
        for inside, colour in ((True, "C0"), (False, "C1")):
            own = part[part["in consensus"] == inside]
            axes.plot(own["probability"], np.full(len(own), k + (0.1 if inside else -0.1)), "|", color=colour, ms=10)
    axes.set_yticks(range(listed["way"].nunique()), list(listed["way"].unique()))
    axes.set(xlabel="probability of an edge (blue: in the consensus)", xlim=(0, 1.02))
    return shown


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Sachs, main))
