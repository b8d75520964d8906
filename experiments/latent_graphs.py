"""Graphs of latents, where they are identifiable: how well are they recovered, and are edge probabilities honest?

Behind a linear decoder, one hard intervention on each latent, 500 cells an environment. Linear mechanisms with 5, 10
and 20 latents: an exact search over graphs against a continuous penalty on cycles, from the same start. Networks with 5
latents, the chain of Zhang et al. (NeurIPS 2023) among them, and what a decoder that is not linear, or shifts in place
of hard interventions, make of it. Probabilities of edges from few cells, against how often such edges are there. And
shifts of the noise alone, where it is known which gene reads which latent.
"""

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pyro import poutine

from experiments.launch import Results, launch
from experiments.recover_truth import calibration_error
from pyro_scm import hard_gaussian, linear_gaussian, metrics
from pyro_scm.chance import forked
from pyro_scm.data import synthetic
from pyro_scm.signal_space import anchored, signal
from pyro_scm.sites import X, Z
from pyro_scm.structure_search import GraphPosterior, learn_graph, learn_latent_graph

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

FloatArray = NDArray[np.float64]
HARD = {"interventions": ("hard",)}
NETWORKS: dict[str, dict[str, Any]] = {
    "random graph": {"decoder": "linear", "mechanism": "network", **HARD},
    "chain": {"screen": "discrepancy-chain", "decoder": "linear", "mechanism": "network", **HARD},
    "chain, nonlinear decoder": {"screen": "discrepancy-chain", "mechanism": "network", **HARD},
    "chain, shifts": {"screen": "discrepancy-chain", "decoder": "linear", "mechanism": "network"},
}


@dataclass(frozen=True)
class LatentGraphs:
    """Sizes.

    Args:
        latents: of the linear screens, with as many edges, and four times as many genes.
        dense: of those with twice as many edges.
        cells: in each environment.
        penalised: number of latents up to which the penalty on cycles is tried too.
        seeds: of linear screens and of known decoders.
        networks: of `NETWORKS`.
        network_seeds: of their screens.
        hopeless_seeds: likewise, of the screens that theory grants nothing.
        few: cells in each environment of the screens on which probabilities are judged.
        screens: number of these, for each number of cells.
        resamples: bootstrap samples of the averaged probabilities.
    """

    latents: tuple[int, ...] = (5, 10)
    dense: tuple[int, ...] = (10,)
    cells: int = 500
    penalised: int = 5
    seeds: int = 3
    networks: tuple[str, ...] = ("chain",)
    network_seeds: int = 1
    hopeless_seeds: int = 0
    few: tuple[int, ...] = (50, 200)
    screens: int = 5
    resamples: int = 5

    @classmethod
    def preset(cls, name: str) -> "LatentGraphs":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return LatentGraphs(
                latents=(3,), dense=(4,), cells=200, penalised=3, seeds=1, network_seeds=0, few=(100,), screens=3,
                resamples=2,
            )  # fmt: skip
        if name == "paper":
            return LatentGraphs(
                latents=(5, 10, 20), dense=(10,), penalised=10, seeds=10, networks=tuple(NETWORKS), network_seeds=10,
                hopeless_seeds=3, few=(50, 100, 200), screens=20, resamples=10,
            )  # fmt: skip
        return LatentGraphs()


# ---------------------------------------------------------------------- screens
def edges(latent: int, number: int, seed: int) -> list[list[int]]:
    """Of a random DAG: so many of the pairs of a random order."""
    rng = np.random.default_rng([seed, 7])
    pairs = list(itertools.combinations(rng.permutation(latent).tolist(), 2))
    return [list(pairs[i]) for i in rng.choice(len(pairs), min(number, len(pairs)), replace=False)]


def linear_screen(latent: int, number: int, cells: int, seed: int, **options: Any) -> "AnnData":
    """Linear mechanisms with weights of 1 or -1, one hard intervention on each latent."""
    given = {"decoder": "linear", "interventions": ("hard",), "genes": 4 * latent, **options}
    return synthetic.simulate(
        latent=latent, environments=latent + 1, cells=cells, graph=edges(latent, number, seed), seed=seed, **given
    )


def weak_screen(cells: int, seed: int, latent: int = 5) -> "AnnData":
    """Effects N(0, 0.5^2), a third of them too small to be seen, and noisier genes."""
    adata = linear_screen(latent, min(latent, latent * (latent - 1) // 2), cells, seed, noise=0.5, strength=2.0)
    model: Any = synthetic.truth(adata)
    rng = np.random.default_rng([seed, 8])
    with forked(), torch.no_grad():
        torch.manual_seed(seed)
        model.scm.weight.copy_(torch.as_tensor(rng.normal(0, 0.5, model.scm.weight.shape)) * model.scm.mask)
        env = adata.obs["perturbation"].cat.codes.to_numpy()
        trace = poutine.trace(model).get_trace(synthetic.world(latent + 1, env))
    adata.X = trace.nodes[X]["value"].numpy()
    adata.obsm[Z], adata.obsm["c"] = trace.nodes[Z]["value"].numpy(), trace.nodes["c"]["value"].numpy()
    return adata


def truth_of(adata: "AnnData") -> tuple[NDArray[np.int8], list[str]]:
    """Adjacency, entry [i, j] for i -> j, and the names of the latents in its order."""
    stored = adata.uns["truth"]
    return np.asarray(stored["graph"]).T, [str(node) for node in stored["nodes"]]


# ---------------------------------------------------------------------- one screen
def scored(adata: "AnnData", found: FloatArray) -> dict[str, float]:
    """Of a graph over the latents in the order of the truth."""
    truth, _ = truth_of(adata)
    scores = metrics.edge_scores(truth, found)
    return {"edges": int(truth.sum()), "found": int(found.sum()), "shd": metrics.shd(truth, found), "f1": scores.f1}


def of_posterior(adata: "AnnData", posterior: GraphPosterior) -> dict[str, float]:
    """Scores, and the lowest correlation of a latent with the true one."""
    _, names = truth_of(adata)
    pairs = zip(posterior.values[names].to_numpy().T, adata.obsm["c"].T, strict=True)
    lowest = min(abs(float(np.corrcoef(a, b)[0, 1])) for a, b in pairs)
    return {**scored(adata, nx.to_numpy_array(posterior.graph, nodelist=names, weight=None)), "lowest r of c": lowest}


def penalised(adata: "AnnData", same_start: bool) -> dict[str, float]:
    """The continuous way: lasso and a penalty on cycles, then the edges above a cut."""
    stored = adata.uns["truth"]
    targets = np.asarray(stored["targets"], np.float64)
    env = adata.obs["perturbation"].cat.codes.to_numpy().astype(np.int64)
    x = np.asarray(adata.X, np.float64)
    start, seeds = None, range(8)
    if same_start:
        space = signal(x, env, len(targets), targets.shape[1])
        q = hard_gaussian.rotation(space, targets)
        everything = 1.0 - np.eye(len(q))
        total = hard_gaussian.effects(space, q, targets, everything)
        matrix = np.clip(np.eye(len(q)) - np.linalg.inv(total), -3, 3)
        start, seeds = (space.loading @ q.T, matrix), range(1)
    fit = linear_gaussian.maximise(x, env, targets, seeds=seeds, start=start)
    return scored(adata, nx.to_numpy_array(fit.graph(), nodelist=range(targets.shape[1]), weight=None))


def linear_rows(config: LatentGraphs) -> list[dict[str, Any]]:
    rows = []
    sizes = [(d, d) for d in config.latents] + [(d, 2 * d) for d in config.dense]
    for (latent, number), seed in itertools.product(sizes, range(config.seeds)):
        adata = linear_screen(latent, number, config.cells, seed)
        ways: dict[str, Any] = {"exact search": lambda a: of_posterior(a, learn_latent_graph(synthetic.dataset(a)))}
        if latent <= config.penalised:
            ways["cycle penalty, same start"] = lambda a: penalised(a, True)
        if latent <= min(5, config.penalised):
            ways["cycle penalty, 8 restarts"] = lambda a: penalised(a, False)
        for way, run in ways.items():
            began = time.perf_counter()
            row = {"latents": latent, "true edges": number, "way": way, "seed": seed, **run(adata)}
            rows.append({**row, "seconds": time.perf_counter() - began})
            show(rows[-1])
    return rows


def network_rows(config: LatentGraphs) -> list[dict[str, Any]]:
    rows = []
    for name in config.networks:
        granted = NETWORKS[name].get("interventions") == ("hard",) and NETWORKS[name].get("decoder") == "linear"
        for seed in range(config.network_seeds if granted else config.hopeless_seeds):
            began = time.perf_counter()
            adata = network_screen(name, config.cells, seed)
            found = learn_latent_graph(synthetic.dataset(adata), mechanism="network")
            rows.append({"screen": name, "seed": seed, **of_posterior(adata, found)})
            rows[-1]["seconds"] = time.perf_counter() - began
            show(rows[-1])
    return rows


def network_screen(name: str, cells: int, seed: int) -> "AnnData":
    """One of `NETWORKS`: nonlinear mechanisms, five latents, 30 genes."""
    given = dict(NETWORKS[name])
    screen = given.pop("screen", None)
    if screen is None:
        given |= {"latent": 5, "environments": 6, "genes": 30, "graph": edges(5, 5, seed)}
    return synthetic.simulate(screen, cells=cells, seed=seed, **given)


def probability_rows(config: LatentGraphs) -> list[dict[str, Any]]:
    """One row an ordered pair of latents: its probability, and whether it is an edge."""
    rows = []
    for cells, seed in itertools.product(config.few, range(config.screens)):
        adata = weak_screen(cells, seed)
        truth, names = truth_of(adata)
        for way, resamples in (("posterior", 0), ("averaged over resamples", config.resamples)):
            found = learn_latent_graph(synthetic.dataset(adata), resamples=resamples)
            said = found.edge_probabilities.loc[names, names].to_numpy()
            rows += [
                {"cells": cells, "seed": seed, "way": way, "probability": said[i, j], "edge": bool(truth[i, j])}
                for i, j in itertools.permutations(range(len(names)), 2)
            ]
    return rows


def mask_rows(config: LatentGraphs) -> list[dict[str, Any]]:
    """Shifts of the noise: with the decoder's mask known, and without it."""
    rows = []
    for mechanism, seed in itertools.product(("linear", "network"), range(config.seeds)):
        latent = min(5, *config.latents)
        adata = linear_screen(
            latent, latent - 1, config.cells, seed, interventions=("shift",), mechanism=mechanism, attachment=0.3,
            genes=30,
        )  # fmt: skip
        stored = adata.uns["truth"]
        targets = np.asarray(stored["targets"], np.float64)
        env = adata.obs["perturbation"].cat.codes.to_numpy().astype(np.int64)
        space = signal(np.asarray(adata.X, np.float64), env, len(targets), latent)
        weight = next(v for name, v in stored["parameters"].items() if np.shape(v) == (30, latent))
        free = space.y @ hard_gaussian.rotation(space, targets).T
        for way, c in (("mask known", anchored(space, np.asarray(weight) != 0)), ("no mask", free)):
            found = learn_graph(
                pd.DataFrame(c, columns=truth_of(adata)[1]), env, targets, interventions="shift",
                mechanism="linear" if mechanism == "linear" else "additive",
            )  # fmt: skip
            rows.append({"mechanism": mechanism, "way": way, "seed": seed, **of_posterior(adata, found)})
            show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


# ---------------------------------------------------------------------- summaries
def summary(scores: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Median, mean and worst screen."""
    groups = scores.groupby(by, sort=False)
    table = groups[["shd", "f1"]].agg(["median", "mean"])
    table.columns = [f"{score} {what}" for score, what in table.columns]
    table["shd worst"], table["f1 worst"] = groups["shd"].max(), groups["f1"].min()
    table["lowest r of c"] = groups["lowest r of c"].min() if "lowest r of c" in scores else np.nan
    return table.assign(screens=groups.size())


def calibration(rows: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """Expected calibration error, Brier score, and F1 of the edges of a probability above one half."""
    table = {}
    for key, part in rows.groupby(["way", "cells"], sort=False):
        said, edge = part["probability"].to_numpy(), part["edge"].to_numpy(bool)
        unsure = (said > 0.05) & (said < 0.95)
        detected = metrics.recovery.detection(edge[None], said[None] > 0.5)
        table[key] = {
            "calibration error": calibration_error(edge, said, bins),
            "Brier": np.square(said - edge).mean(),
            "share unsure (5 to 95 %)": unsure.mean(),
            "mean probability of these": said[unsure].mean() if unsure.any() else np.nan,
            "share of edges among these": edge[unsure].mean() if unsure.any() else np.nan,
            "f1 above 1/2": detected.f1,
            "pairs": len(said),
        }
    return pd.DataFrame(table).T.rename_axis(["way", "cells"])


def figure(rows: pd.DataFrame) -> "Figure":
    """Reliability: how often an edge of a stated probability is there."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.4, 4))
    axes = drawn.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", lw=1)
    for way, part in rows.groupby("way", sort=False):
        place = np.clip((part["probability"] * 5).astype(int), 0, 4)
        means = part.groupby(place)[["probability", "edge"]].mean()
        axes.plot(means["probability"], means["edge"], "o-", ms=4, label=str(way))
    axes.set(xlabel="probability of an edge", ylabel="share of true edges", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=8)
    return drawn


def main(config: LatentGraphs) -> Results:
    linear = pd.DataFrame(linear_rows(config))
    said = pd.DataFrame(probability_rows(config))
    masks = pd.DataFrame(mask_rows(config))
    tables = {
        "linear": summary(linear, ["latents", "true edges", "way"]),
        "calibration": calibration(said),
        "masks": summary(masks, ["mechanism", "way"]),
        "linear_screens": linear,
    }
    networks = pd.DataFrame(network_rows(config))
    if len(networks):
        tables |= {"networks": summary(networks, ["screen"]), "network_screens": networks}
    return Results(tables, {"reliability": figure(said)}, f"{config.cells} cells an environment where not said.")


if __name__ == "__main__":
    raise SystemExit(launch(__file__, LatentGraphs, main))
