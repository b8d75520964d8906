"""Which environment should be measured next, the seed's last question.

A screen starts with the reference and a few environments. A pool of others, of which only a representation is known (a
noisy descriptor of their effect), waits; a policy takes some of them, an ensemble is fitted again, and so on. Three
policies take the same start: at random; the farthest from all that was measured, in the representation; and the largest
expected information gain. The gain is approximated by how much the members of the ensemble disagree about the mean
expression of a candidate beside the error with which its cells would measure that mean: members have latents of their
own, so that they can be compared only in expression. For means that are jointly Gaussian over members it is
1/2 log det(I + D D'), D the members' deviations in units of that error, and of a set it is that of the rows together,
so that the second of two like candidates counts little. It is taken greedily.

What is measured: MCC of z over all cells of the pool, median over members, after each round; and how many environments
a policy needs to reach 0.9, or the highest level that any policy reaches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

import pyro_scm as ps
from experiments.launch import Results, launch
from guides import amortise
from pyro_scm import metrics
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.evaluation import recovery
from pyro_scm.run import Run

Array = NDArray[np.float64]

POLICIES = ("random", "farthest", "information")
LATENT, GENES, NOISE, STRENGTH, DESCRIPTORS = 4, 20, 0.5, 4.0, 6
TARGET = 0.9


@dataclass(frozen=True)
class NextEnvironment:
    """Sizes of the experiment.

    Args:
        seeds: screens; all policies see the same ones.
        members: of each ensemble.
        pool: environments that can be measured.
        cells: in each environment.
        start: environments measured at the start, the same for all policies.
        batch: environments taken in each round.
        rounds: of taking.
        epochs: of training, with 20 environments; with fewer there are more, for about the same number of steps.
    """

    seeds: int = 4
    members: int = 5
    pool: int = 24
    cells: int = 40
    start: int = 2
    batch: int = 2
    rounds: int = 4
    epochs: int = 40

    @classmethod
    def preset(cls, name: str) -> "NextEnvironment":
        """Sizes of a preset."""
        if name == "smoke":
            return cls(seeds=2, members=3, pool=8, cells=20, rounds=2, epochs=5)
        return cls(seeds=10) if name == "paper" else cls()


# ---------------------------------------------------------------------- one round
def train(cells: EnvironmentDataset, config: NextEnvironment) -> Run:
    """An ensemble of Environment VAEs with linear decoders.

    The guide reads expression alone, so that what it says of cells in environments that were not measured does not
    depend on their representation.
    """
    model = ps.models.environment_vae(cells.schema, latent=LATENT, hidden=(), environment_hidden=(16,), scale=False)
    guide = amortise(model, cells, inputs=("x",), hidden=())
    epochs = round(config.epochs * 20 / max(1, len(cells.present) - 1))
    return ps.fit(
        model, guide, cells, seeds=range(config.members), epochs=epochs, batch_size=128, lr=2e-2, schedule="cosine",
        kl_warmup=0.0, temperature=(2.0, 0.1), device="cpu", progress=False,
    )  # fmt: skip


def predicted(run: Run, cells: EnvironmentDataset) -> Array:
    """Mean expression of every environment of the table, measured or not, by every member ``[K, E, G]``."""
    batch = cells.batch(np.array([0]))
    r = torch.as_tensor(cells.representation)
    perturbed = torch.as_tensor(~cells.reference, dtype=r.dtype)
    found = []
    for k in range(len(run)):
        model: Any = run.member(k)[0]
        with torch.no_grad():
            # the mean of a linear decoder is that of the mean
            loc, _ = model.prior.moments(r, perturbed)
            found.append(model.likelihoods[0].location(model.scm.solve(loc), batch).double().numpy())
    return np.stack(found)


def deviations(means: Array, error: Array) -> Array:
    """Members' deviations from their mean, in standard errors and for K - 1 degrees of freedom ``[E, K, G]``.

    Args:
        means: ``[K, E, G]``.
        error: ``[G]`` standard error of a measured mean.
    """
    centred = (means - means.mean(axis=0)) / error / np.sqrt(max(1, len(means) - 1))
    return np.asarray(centred.transpose(1, 0, 2))


def information(chosen: Array) -> float:
    """1/2 log det(I + sum_e D_e D_e'), nats that measuring the environments ``[S, K, G]`` is expected to give."""
    gram = np.einsum("skg,slg->kl", chosen, chosen)
    return float(0.5 * np.linalg.slogdet(np.eye(len(gram)) + gram)[1])


def most_informative(spread: Array, candidates: Sequence[int], number: int) -> list[int]:
    """Greedily, the candidates that raise `information` most; `spread` ``[E, K, G]``."""
    taken: list[int] = []
    for _ in range(number):
        left = [e for e in candidates if e not in taken]
        taken.append(max(left, key=lambda e: information(spread[[*taken, e]])))
    return taken


def farthest(representation: Array, measured: Sequence[int], candidates: Sequence[int], number: int) -> list[int]:
    """One after the other, the candidate whose nearest measured environment is farthest away."""
    taken: list[int] = []
    for _ in range(number):
        near = representation[[*measured, *taken]]
        left = [e for e in candidates if e not in taken]
        taken.append(max(left, key=lambda e: float(np.linalg.norm(near - representation[e], axis=1).min())))
    return taken


def choose(
    policy: str,
    run: Run,
    cells: EnvironmentDataset,
    measured: Sequence[int],
    number: int,
    rng: np.random.Generator,
) -> list[int]:
    """Environments to measure next.

    Args:
        policy: one of `POLICIES`.
        run: fitted to the measured environments.
        cells: of the whole pool; of environments that are not in `measured` only the representation is looked at.
        measured: indices of environments, the reference among them.
        number: of environments to take.
        rng: of the random policy.
    """
    candidates = [e for e in range(len(cells.environments)) if e not in measured]
    if policy == "random":
        return [int(e) for e in rng.choice(candidates, number, replace=False)]
    if policy == "farthest":
        return farthest(cells.representation.astype(np.float64), measured, candidates, number)
    # cells of an environment vary about its mean as the reference's do
    reference = cells.subset(cells.reference[cells.env])
    error = np.asarray(reference.x).std(axis=0) / np.sqrt(np.bincount(cells.env)[0])
    return most_informative(deviations(predicted(run, cells), error), candidates, number)


# ---------------------------------------------------------------------- the experiment
def rounds(config: NextEnvironment, seed: int) -> list[dict[str, Any]]:
    """One screen: recovery after each round of each policy."""
    adata = ps.simulate(
        latent=LATENT, genes=GENES, environments=config.pool + 1, cells=config.cells, decoder="linear", noise=NOISE,
        cover=False, strength=STRENGTH, descriptors=DESCRIPTORS, seed=seed,
    )  # fmt: skip
    cells = synthetic.dataset(adata, "descriptors")
    targets = np.asarray(adata.uns["truth"]["targets"])
    start = np.random.default_rng([seed, 0]).choice(np.arange(1, config.pool + 1), config.start, replace=False)
    first = train(cells.subset(np.isin(cells.env, [0, *start])), config)
    rows = []
    for policy in POLICIES:
        measured, run = [0, *(int(e) for e in start)], first
        rng = np.random.default_rng([seed, 1])
        for number in range(config.rounds + 1):
            if number:
                measured += choose(policy, run, cells, measured, config.batch, rng)
                run = train(cells.subset(np.isin(cells.env, measured)), config)
            scores = recovery(run, cells, adata)
            rows.append(
                {
                    "seed": seed,
                    "policy": policy,
                    "environments": len(measured) - 1,
                    "mcc_z": float(scores["mcc_z"].median()),
                    "mcc_z, lowest loss": float(scores["mcc_z"].iloc[run.best]),
                    "linear_r2_z": float(scores["linear_r2_z"].median()),
                    "latents targeted": int(targets[measured].any(axis=0).sum()),
                }
            )
    return rows


def level(table: pd.DataFrame) -> float:
    """0.9, or the highest median over seeds that any policy reaches, if that is lower."""
    return min(TARGET, float(table.groupby(["policy", "environments"])["mcc_z"].median().max()))


def needed(table: pd.DataFrame, reach: float) -> pd.DataFrame:
    """Environments at which each policy ``[seeds, policies]`` is first at the level; infinite where it never is."""
    reached = table[table["mcc_z"] >= reach].groupby(["seed", "policy"])["environments"].min().unstack()
    return reached.reindex(index=table["seed"].unique(), columns=list(POLICIES)).fillna(np.inf)


def comparison(table: pd.DataFrame, reach: float) -> pd.DataFrame:
    """Each policy beside random choice, paired by seed.

    Columns: the median number of environments needed (infinite: never), in how many seeds the level was reached; the
    mean MCC over rounds after the start, its difference to random choice with a 95 % bootstrap interval, and wins.
    """
    counts = needed(table, reach)
    later = table[table["environments"] > table["environments"].min()]
    areas = later.groupby(["seed", "policy"])["mcc_z"].mean().unstack()
    rows = {}
    for policy in POLICIES:
        pairs = areas[policy].to_numpy(), areas["random"].to_numpy()
        found = metrics.paired_difference(*pairs, level=0.95, draws=2000, seed=0)
        same = policy == "random"
        rows[policy] = {
            "environments needed": float(np.median(counts[policy])),
            "reached": int(np.isfinite(counts[policy]).sum()),
            "needed fewer": int((counts[policy] < counts["random"]).sum()),
            "needed more": int((counts[policy] > counts["random"]).sum()),
            "mean mcc_z": float(areas[policy].mean()),
            "difference": float("nan") if same else found.estimate,
            "lower": float("nan") if same else found.lower,
            "upper": float("nan") if same else found.upper,
        }
    return pd.DataFrame(rows).T.rename_axis("policy")


def main(config: NextEnvironment) -> Results:
    table = pd.DataFrame([row for seed in range(config.seeds) for row in rounds(config, seed)])
    reach = level(table)
    by = ["environments", "policy"]
    summary = table.groupby(by, sort=False).median(numeric_only=True).drop(columns="seed").sort_index()
    text = f"Level to reach: MCC(z) {reach:.3f}; {config.seeds} screens, policies paired."
    return Results(
        {"comparison": comparison(table, reach), "summary": summary, "rounds": table}, {"mcc": mcc_figure(table)}, text
    )


def mcc_figure(table: pd.DataFrame) -> Figure:
    """MCC of z against the number of environments: median and quartiles over screens."""
    figure, axis = plt.subplots(figsize=(5, 3.6))
    for policy, part in table.groupby("policy", sort=False):
        spread = part.groupby("environments")["mcc_z"].quantile([0.25, 0.5, 0.75]).unstack()
        axis.plot(spread.index, spread[0.5], marker="o", label=policy)
        axis.fill_between(spread.index, spread[0.25], spread[0.75], alpha=0.15)
    axis.set(xlabel="environments measured", ylabel="MCC of z")
    axis.legend()
    plt.close(figure)
    return figure


if __name__ == "__main__":
    raise SystemExit(launch(__file__, NextEnvironment, main))
