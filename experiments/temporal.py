"""Times as environments: sparse changes from one time to the next, and Boolean rules read off the latents.

The seed's first open point. Cells are measured at times 0..T; from each time to the next the mean of few latents moves.
Three readings of the same cells: each innovation is sparse (consecutive times differ in few latents), each time's total
change from time 0 is sparse (times as unrelated environments), and nothing is sparse. Measured: times of change, which
latent moved when (F1), and the noise of single cells (MCC); also where two latents move at a time, one more than the
sparse readings allow.

Then a small Boolean network drives the latents, one gene switch updated at a time, with some switches flipped from
outside. Latents cut at a threshold give the states; the transitions give each switch's regulators and truth table, by
maximum likelihood over all sets of regulators. Beside it the same inference from the true states: what they hold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from math import log
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.launch import Results, launch
from pyro_scm import metrics
from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.distributions import normal
from pyro_scm.metrics.recovery import detection
from pyro_scm.priors import Dense, SparseSoftmax
from pyro_scm.threads import few_threads

Array = NDArray[np.float64]
States = NDArray[np.bool_]

READINGS = {  # representation of time t, whether what it multiplies is sparse
    "sparse innovations": ("cumulative", True),
    "unrelated, sparse": ("one-hot", True),
    "unrelated, dense": ("one-hot", False),
}
NOISE = 1.0  # standard deviation of what a gene adds to its latents
THRESHOLD = 0.3  # of the largest innovation of the same latent
ERROR = 0.05  # chance that a switch seen to flip (or not) was misread


@dataclass(frozen=True)
class Temporal:
    """Sizes of the experiment.

    Args:
        screens: time courses, each with cells and genes of its own.
        seeds: of each model on each.
        restarts: of each seed, of which the one with the lowest loss is kept.
        latent: d.
        genes: G.
        steps: T of the time courses with random changes.
        moving: latents that move in a step, a set of time courses for each number.
        cells: at each time of these.
        updates: T of the Boolean networks.
        boolean_cells: at each time of these.
        iterations: of each fit.
    """

    screens: int = 2
    seeds: int = 3
    restarts: int = 4
    latent: int = 4
    genes: int = 20
    steps: int = 12
    moving: tuple[int, ...] = (1, 2)
    cells: int = 100
    updates: int = 200
    boolean_cells: int = 20
    iterations: int = 500

    @classmethod
    def preset(cls, name: str) -> "Temporal":
        """Sizes of a preset."""
        if name == "smoke":
            return cls(screens=1, seeds=1, latent=3, genes=10, moving=(1,), boolean_cells=10, iterations=200)
        return cls(screens=10, seeds=2, restarts=6) if name == "paper" else cls()


# ---------------------------------------------------------------------- time courses
def changes(rng: np.random.Generator, latent: int, steps: int, moving: int = 1, rest: float = 0.25) -> Array:
    """Innovations ``[T, d]``: steps of 2 to 4 standard deviations of few latents, or none; each latent at least once.

    Args:
        rng: random numbers.
        latent: d.
        steps: T.
        moving: latents that move together.
        rest: probability of no change.
    """
    first = np.append(rng.permutation(latent), rng.integers(latent, size=steps - latent))
    moves = np.append(np.ones(latent, dtype=bool), rng.random(steps - latent) >= rest)
    found = np.zeros((steps, latent))
    for t, k in enumerate(rng.permutation(steps)):
        others = rng.permutation([j for j in range(latent) if j != first[k]])[: moving - 1]
        moved = [int(first[k]), *(int(j) for j in others)]
        found[t, moved] = moves[k] * rng.choice([-1.0, 1.0], moving) * rng.uniform(2, 4, moving)
    return found


def measured(means: Array, genes: int, cells: int, seed: int) -> tuple[EnvironmentDataset, Array]:
    """Cells around each time's latent means ``[T + 1, d]``, seen through a sparse linear decoder, and their z."""
    from anndata import AnnData

    rng = np.random.default_rng([seed, 7])
    latent = means.shape[1]
    reads = rng.random((genes, latent)) < 0.5
    reads[np.arange(genes), rng.integers(latent, size=genes)] = True
    decoder = rng.choice([-1.0, 1.0], reads.shape) * reads
    time = np.repeat(np.arange(len(means)), cells)
    z = means[time] + rng.normal(size=(len(time), latent))
    x = z @ decoder.T + NOISE * rng.normal(size=(len(z), genes))
    names = [f"t{t:03d}" for t in range(len(means))]
    obs = pd.DataFrame({"time": np.array(names)[time]}, index=[f"cell_{i}" for i in range(len(x))])
    data = EnvironmentDataset.from_anndata(
        AnnData(x.astype(np.float32), obs=obs), environment="time", control=names[0], counts=False
    )
    assert [str(n) for n in data.environments.index] == names
    return data, z


def representation(kind: str, times: int) -> NDArray[np.float32]:
    """r ``[T + 1, T]``: ``"one-hot"``, or ``"cumulative"``: r_t is 1 for every step up to t. Zeros at time 0."""
    rows = np.tri(times, times - 1, -1) if kind == "cumulative" else np.eye(times)[:, 1:]
    return rows.astype(np.float32)


# ---------------------------------------------------------------------- the model
class StepPrior(nn.Module):
    """z | e ~ N(sum_s r_es s(v_s), I): a vector v_s for each feature of r, each made sparse for itself.

    With cumulative r feature s is the step to time s, and mu_t = mu_(t-1) + s(v_t); with one-hot r it is time s.

    Args:
        steps: T, features of r.
        latent: d.
        sparsifier: s.
    """

    def __init__(self, steps: int, latent: int, sparsifier: nn.Module) -> None:
        super().__init__()
        self.latent, self.sparsifier = latent, sparsifier
        self.step = nn.Parameter(torch.empty(steps, latent))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal steps."""
        nn.init.normal_(self.step, std=0.1)

    def moments(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Means and unit scales of environments r ``(R, T)``: two tensors ``(R, d)``."""
        loc = r @ self.sparsifier(self.step)
        return loc, torch.ones_like(loc)

    def forward(self, batch: Batch) -> Any:
        """Normal of batch shape (n,), event shape (d,)."""
        loc, scale = self.moments(batch.r)
        return normal(F.embedding(batch.row, loc), F.embedding(batch.row, scale))


@dataclass(frozen=True)
class Fit:
    """One fit: x | t ~ N(b + W mu_t, W W' + diag psi).

    Args:
        mixing: W ``[G, d]``.
        offset: b ``[G]``.
        psi: ``[G]`` variance of the observation noise.
        means: mu ``[T + 1, d]``.
        loss: negative log-likelihood per cell, without its constant.
    """

    mixing: Array
    offset: Array
    psi: Array
    means: Array
    loss: float

    def noise(self, x: Array, time: NDArray[np.int64]) -> Array:
        """Posterior mean of each cell's z ``[N, d]``."""
        weighted = self.mixing.T / self.psi
        precision = np.eye(self.means.shape[1]) + weighted @ self.mixing
        right = (x - self.offset) @ weighted.T + self.means[time]
        return np.linalg.solve(precision, right.T).T


def maximise(reading: str, cells: EnvironmentDataset, config: Temporal) -> list[Fit]:
    """The best restart of each seed, by the exact likelihood of a linear Gaussian model with a `StepPrior`.

    Every restart begins with the principal factors of the cells around their time's mean, rotated at random: all that
    is left to find is the rotation, and the temperature of the sparse softmax falls meanwhile.
    """
    kind, sparse = READINGS[reading]
    x, times, d = np.asarray(cells.x, float), len(cells.environments), config.latent
    share = torch.as_tensor(np.bincount(cells.env, minlength=times) / len(x))
    mean = torch.as_tensor(np.stack([x[cells.env == t].mean(0) for t in range(times)]))
    within = torch.as_tensor(np.cov((x - mean.numpy()[cells.env]).T, bias=True))
    r = torch.as_tensor(representation(kind, times)).double()
    sparsifier = SparseSoftmax().double() if sparse else Dense()
    values, vectors = torch.linalg.eigh(within)
    rest = values[:-d].mean()
    principal = vectors[:, -d:] * (values[-d:] - rest).sqrt()
    p = _start(config.seeds * config.restarts, principal, rest, mean, r)
    optimiser = torch.optim.Adam(list(p.values()), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.iterations)
    with few_threads():
        for i in range(config.iterations):
            if sparse:
                sparsifier.temperature.fill_(2.0 * 0.05 ** (i / config.iterations))
            optimiser.zero_grad()
            loss = _losses(p, principal, share, mean, within, r, sparsifier)
            loss.sum().backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        loss = _losses(p, principal, share, mean, within, r, sparsifier).numpy()
        arrays = [
            (principal @ p["rotation"] + p["rest"]).numpy(), p["offset"].numpy(), p["log_psi"].exp().numpy(),
            (r @ sparsifier(p["step"])).numpy(),
        ]  # fmt: skip
    fits = [Fit(*(a[k] for a in arrays), float(loss[k])) for k in range(len(loss))]
    groups = [fits[s * config.restarts : (s + 1) * config.restarts] for s in range(config.seeds)]
    return [min(group, key=lambda f: f.loss) for group in groups]


def _start(number: int, principal: Tensor, rest: Tensor, mean: Tensor, r: Tensor) -> dict[str, Tensor]:
    """Parameters of the restarts, a leading dimension each; steps are those that give each time's mean."""
    generators = [torch.Generator().manual_seed(k) for k in range(number)]
    d = principal.shape[1]
    draws = [torch.randn(d, d, generator=g, dtype=torch.float64) for g in generators]
    rotation = torch.stack([torch.linalg.qr(m).Q for m in draws])
    scores = torch.linalg.lstsq(principal, (mean - mean[0]).T).solution.T  # of each time, in principal axes
    p = {
        "rotation": rotation,
        "rest": torch.zeros(number, *principal.shape, dtype=torch.float64),
        "offset": mean[0].repeat(number, 1),
        "log_psi": rest.log().repeat(number, len(principal)),
        "step": torch.linalg.lstsq(r[1:], scores[1:]).solution @ rotation,
    }
    return {name: value.clone().requires_grad_(True) for name, value in p.items()}


def _losses(
    p: dict[str, Tensor], principal: Tensor, share: Tensor, mean: Tensor, within: Tensor, r: Tensor, sparsifier: Any
) -> Tensor:
    """Negative log-likelihood per cell ``(K,)`` of all restarts, from each time's mean and the common covariance."""
    mixing = principal @ p["rotation"] + p["rest"]
    factor = torch.linalg.cholesky(mixing @ mixing.mT + torch.diag_embed(p["log_psi"].exp()))
    located = p["offset"].unsqueeze(1) + (r @ sparsifier(p["step"])) @ mixing.mT
    second = within + torch.einsum("t,ktg,kth->kgh", share, mean - located, mean - located)
    trace = torch.cholesky_solve(second, factor).diagonal(dim1=-2, dim2=-1).sum(-1)
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * trace


# ---------------------------------------------------------------------- change points
def change_scores(true: Array, z: Array, found_z: Array, means: Array) -> dict[str, float]:
    """Recovery of single cells' noise, of the times of change, and of which latent moved.

    Args:
        true: ``[T, d]`` innovations.
        z: ``[N, d]`` true noise.
        found_z: ``[N, d]`` inferred noise.
        means: ``[T + 1, d]`` inferred means.
    """
    matched = metrics.mcc(z, found_z)
    steps = np.diff(means, axis=0)
    targets = metrics.target_scores(true != 0, steps, matched.permutation, threshold=THRESHOLD)
    moved = (np.abs(steps) > THRESHOLD * np.abs(steps).max(0)).any(1)
    return {"mcc z": matched.score, "F1 targets": targets.f1, "F1 times": detection((true != 0).any(1), moved).f1}


# ---------------------------------------------------------------------- Boolean networks
@dataclass(frozen=True)
class BooleanNetwork:
    """Switches s_j := f_j(s of its regulators), one drawn at random updated at a time.

    Args:
        regulators: of each switch, positions.
        tables: of each switch, f_j at the 2^k states of its regulators, the first one the highest bit.
    """

    regulators: tuple[tuple[int, ...], ...]
    tables: tuple[tuple[bool, ...], ...]

    def __len__(self) -> int:
        return len(self.tables)

    @staticmethod
    def random(rng: np.random.Generator, switches: int) -> "BooleanNetwork":
        """One or two regulators each; every regulator matters."""
        regulators, tables = [], []
        for _ in range(switches):
            k = int(rng.integers(1, 3))
            regulators.append(tuple(sorted(int(i) for i in rng.choice(switches, k, replace=False))))
            tables.append(_table(rng, k))
        return BooleanNetwork(tuple(regulators), tuple(tables))

    def next(self, j: int, state: States) -> bool:
        """f_j."""
        return self.tables[j][row_of(state, self.regulators[j])]

    def truth(self) -> States:
        """f ``[2^n, n]`` of every state of all switches, in the order of `every_state`."""
        return np.array([[self.next(j, s) for j in range(len(self))] for s in every_state(len(self))])

    def simulate(self, rng: np.random.Generator, updates: int, kicks: float = 0.3) -> tuple[States, NDArray[np.bool_]]:
        """States ``[T + 1, n]`` from all off, and which of the T steps were flips from outside, at a random switch."""
        states = [np.zeros(len(self), dtype=bool)]
        outside = rng.random(updates) < kicks
        for kicked in outside:
            state, j = states[-1].copy(), int(rng.integers(len(self)))
            state[j] = not state[j] if kicked else self.next(j, state)
            states.append(state)
        return np.stack(states), outside


def _table(rng: np.random.Generator, k: int) -> tuple[bool, ...]:
    """A table of k inputs of which none is idle."""
    while True:
        table = rng.random(2**k) < 0.5
        cube = table.reshape((2,) * k)
        if all((np.take(cube, 0, axis) != np.take(cube, 1, axis)).any() for axis in range(k)):
            return tuple(bool(v) for v in table)


def every_state(switches: int) -> States:
    """``[2^n, n]``."""
    return np.array(list(product([False, True], repeat=switches)))


def row_of(state: States, regulators: tuple[int, ...]) -> int:
    """Row of a truth table."""
    found = 0
    for i in regulators:
        found = 2 * found + int(state[i])
    return found


def infer_rules(states: States, outside: NDArray[np.bool_], most: int = 2) -> BooleanNetwork:
    """The most likely network of at most `most` regulators a switch, with BIC's price on each row of a truth table.

    A switch whose rule disagrees with its state flips when it is the one of n that is updated, one that agrees does
    not. Rows of a table that no transition speaks of are read as off.

    Args:
        states: ``[T + 1, n]``.
        outside: ``[T]`` steps that were flipped from outside, which say nothing.
        most: largest number of regulators.
    """
    before, after = states[:-1][~outside], states[1:][~outside]
    n = states.shape[1]
    regulators, tables = [], []
    for j in range(n):
        options = [c for k in range(most + 1) for c in combinations(range(n), k)]
        best = max(options, key=lambda c: _evidence(j, c, before, after)[0])
        regulators.append(best)
        tables.append(_evidence(j, best, before, after)[1])
    return BooleanNetwork(tuple(regulators), tuple(tables))


def _evidence(j: int, regulators: tuple[int, ...], before: States, after: States) -> tuple[float, tuple[bool, ...]]:
    """Penalised log-likelihood of switch j's transitions under the best table of these regulators, and the table."""
    n, rows = before.shape[1], 2 ** len(regulators)
    which = np.array([row_of(s, regulators) for s in before], dtype=int)
    flips = before[:, j] != after[:, j]
    total, table = -0.5 * rows * log(max(len(before), 2)), []
    for row in range(rows):
        here = which == row
        scores = []
        for value in (False, True):
            wrong = before[here, j] != value  # the rule would have it otherwise: it flips when its turn comes
            p = np.where(wrong, 1 / n, ERROR / n)
            scores.append(float(np.log(np.where(flips[here], p, 1 - p)).sum()))
        table.append(bool(scores[1] > scores[0]))
        total += max(scores)
    return total, tuple(table)


def binarised(means: Array) -> States:
    """States ``[T + 1, d]`` of latents ``[T + 1, d]``: on where above the middle of the two groups that fit best."""
    found = np.zeros(means.shape, dtype=bool)
    for j, values in enumerate(means.T):
        ordered = np.sort(values)
        cuts = (ordered[1:] + ordered[:-1]) / 2
        spread = [np.var(values[values <= c]) * np.mean(values <= c) + np.var(values[values > c]) * np.mean(values > c)
                  for c in cuts if (values > c).any() and (values <= c).any()]  # fmt: skip
        usable = [c for c in cuts if (values > c).any() and (values <= c).any()]
        found[:, j] = values > usable[int(np.argmin(spread))] if usable else False
    return found


def rule_scores(network: BooleanNetwork, states: States, found: BooleanNetwork) -> dict[str, float]:
    """Truth table accuracy over all states and over those that were visited, and F1 of the regulators."""
    n = len(network)
    right = network.truth() == found.truth()
    visited = sorted({row_of(s, tuple(range(n))) for s in states[:-1]})
    edges, guessed = (np.array([[i in r for i in range(n)] for r in net.regulators]) for net in (network, found))
    return {
        "truth table": float(right.mean()),
        "truth table, visited": float(right[visited].mean()),
        "F1 regulators": detection(edges, guessed).f1,
    }


def boolean_scores(
    network: BooleanNetwork, states: States, outside: Any, z: Array, found_z: Array, means: Array
) -> Any:
    """States and rules that are read off inferred latents, each matched and turned to its true one."""
    matched = metrics.mcc(z, found_z)
    read = binarised(means[:, matched.permutation] * np.where(matched.sign < 0, -1.0, 1.0))
    right = {"mcc z": matched.score, "states": float((read == states).mean())}
    return right | rule_scores(network, states, infer_rules(read, outside))


# ---------------------------------------------------------------------- the experiment
def each_fit(config: Temporal, cells: EnvironmentDataset, score: Callable[[Array, Array], dict[str, float]]) -> Any:
    """Scores of every reading and seed on one time course."""
    for reading in READINGS:
        for seed, fit in enumerate(maximise(reading, cells, config)):
            z = fit.noise(np.asarray(cells.x, float), cells.env)
            yield {"reading": reading, "seed": seed, **score(z, fit.means)}


def main(config: Temporal) -> Results:
    moved: list[dict[str, Any]] = []
    rules: list[dict[str, Any]] = []
    for screen in range(config.screens):
        for moving in config.moving:
            steps = changes(np.random.default_rng([screen, moving]), config.latent, config.steps, moving)
            means = np.concatenate([np.zeros((1, config.latent)), np.cumsum(steps, 0)])
            cells, z = measured(means, config.genes, config.cells, screen)
            found = each_fit(config, cells, partial(change_scores, steps, z))
            moved += [{"screen": screen, "moving": moving, **row} for row in found]

        rng = np.random.default_rng([screen, 0])
        network = BooleanNetwork.random(rng, config.latent)
        states, outside = network.simulate(rng, config.updates)
        cells, z = measured(4.0 * states, config.genes, config.boolean_cells, screen + 1000)
        best = infer_rules(states, outside)
        rules.append(
            {"screen": screen, "reading": "true states", "seed": 0, "states": 1.0, **rule_scores(network, states, best)}
        )
        found = each_fit(config, cells, partial(boolean_scores, network, states, outside, z))
        rules += [{"screen": screen, **row} for row in found]
        print(pd.DataFrame(rules[-1:]).round(3).to_dict("records"), flush=True)
    tables = {
        "changes": spread(pd.DataFrame(moved), ["mcc z", "F1 targets", "F1 times"], ["moving", "reading"]),
        "rules": spread(
            pd.DataFrame(rules), ["mcc z", "states", "truth table", "truth table, visited", "F1 regulators"]
        ),
        "change_scores": pd.DataFrame(moved),
        "rule_scores": pd.DataFrame(rules),
    }
    text = f"{config.screens} time courses of either kind, {config.seeds} seeds a reading of each."
    return Results(tables, {"scores": figure(pd.DataFrame(moved), pd.DataFrame(rules))}, text)


def spread(scores: pd.DataFrame, columns: list[str], by: Sequence[str] = ("reading",)) -> pd.DataFrame:
    """Mean over time courses and seeds, standard deviation and lowest value; the number of fits."""
    groups = scores.groupby(list(by), sort=False)
    parts = {}
    for name in columns:
        parts[name], parts[f"sd {name}"] = groups[name].mean(), groups[name].std()
        parts[f"lowest {name}"] = groups[name].min()
    return pd.DataFrame(parts).assign(fits=groups.size())


def figure(moved: pd.DataFrame, rules: pd.DataFrame) -> Any:
    """Every fit: which latent moved when, and the accuracy of the rules."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 3.6), layout="constrained")
    panels = (
        ("F1 targets", moved[moved["moving"] == moved["moving"].min()]),
        ("states", rules),
        ("truth table", rules),
    )
    for axis, (name, scores) in zip(drawn.subplots(1, len(panels)), panels, strict=True):
        readings = list(scores["reading"].unique())
        for i, reading in enumerate(readings):
            values = scores[scores["reading"] == reading][name].to_numpy()
            offset = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(1)
            axis.plot(i + offset, values, ".", color=f"C{i}", alpha=0.6)
        axis.set(title=name, ylim=(-0.02, 1.02))
        axis.set_xticks(range(len(readings)), [r.replace(" ", "\n") for r in readings], fontsize=7)
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Temporal, main))
