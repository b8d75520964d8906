"""Nonlinear latent SCM under hard interventions, behind a linear decoder: c = H y, c_j = f_j(parents) + Gaussian noise.

f_j is linear plus a layer of smooth hinges. For given H and hinges the rest is least squares, so the likelihood is
profiled over it: what is left to climb is H and the hinges' positions. A graph has unit Jacobian, hence

    log L = n log |det H| - sum_j (n_j / 2) log residual variance of c_j - sum over environments on j of their own.

The causal order is searched by insertions, with a complete graph in each order, so that no missing edge can bend H;
edges are then dropped one at a time, everything else fitted anew, as long as BIC gains.

Setting: Varici et al., arXiv 2310.15450 (linear decoder, general SCM). With a decoder that is not linear none of it
holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from pyro_scm.errors import TrainingError

__all__ = ["Fit", "HardNetwork", "complete", "drop_edges", "edge_gains", "search_order"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_UNITS = 8
_RIDGE = 1e-3  # of standardised features, per cell
_SHRINK = 1e-4  # nats per cell of a unit of squared weights: they stay where nothing moves them
_BETTER = 1.0  # nats by which another order must be better


@dataclass(frozen=True, eq=False)
class Fit:
    """A maximum of the profile likelihood.

    Args:
        value: log-likelihood, nats of all cells.
        unmixing: H ``[d, d]``.
        weight: of the hinges ``[d, M, d]``.
        bias: of the hinges ``[d, M]``.
        allowed: ``[d, d]`` entry [j, i] non-zero where i is a parent of j.
    """

    value: float
    unmixing: FloatArray
    weight: FloatArray
    bias: FloatArray
    allowed: FloatArray


class HardNetwork:
    """The profile likelihood of given cells.

    Args:
        y: ``[n, d]`` cells in the space of the decoder.
        env: ``[n]``.
        targets: ``[E, d]`` 1 where an environment acts on a latent, and cuts its parents.
        units: hinges of each mechanism.
        seed: of their first positions.
    """

    def __init__(self, y: FloatArray, env: IntArray, targets: FloatArray, units: int = _UNITS, seed: int = 0) -> None:
        self.y, (self.n, self.d), self.units = torch.as_tensor(y), y.shape, units
        self.natural = torch.as_tensor((targets[env] == 0).T.astype(np.float64))  # (d, n)
        self.cells = self.natural.sum(1)
        own = [(j, (env == e).astype(np.float64)) for e, j in np.argwhere(targets > 0) if (env == e).any()]
        self.acted = torch.as_tensor([j for j, _ in own])
        self.within = torch.as_tensor(np.stack([rows for _, rows in own]))
        self.counts = self.within.sum(1)
        rng = np.random.default_rng(seed)
        self.first_weight = rng.normal(size=(self.d, units, self.d))
        self.first_bias = rng.uniform(-2, 2, size=(self.d, units))

    @property
    def price(self) -> float:
        """Nats that an edge must be worth: BIC, for a slope and the units."""
        return float(0.5 * (self.units + 1) * np.log(self.n))

    def log_likelihood(self, unmixing: Tensor, weight: Tensor, bias: Tensor, allowed: Tensor) -> Tensor:
        """Nats of all cells, up to a constant."""
        c = unmixing @ self.y.T  # (d, n)
        total = self.n * torch.linalg.slogdet(unmixing).logabsdet
        hinges = F.softplus(2 * (torch.einsum("jmi,in->jmn", weight * allowed[:, None], c) + bias[:, :, None])) / 2
        features = torch.cat([allowed[:, :, None] * c, hinges], 1)
        use = self.natural[:, None]
        features = (features - (features * use).sum(-1, keepdim=True) / self.cells[:, None, None]) * use
        response = (c - (c * self.natural).sum(1, keepdim=True) / self.cells[:, None]) * self.natural
        gram = features @ features.mT
        gram = gram + torch.diag_embed(1e-6 * gram.diagonal(dim1=-2, dim2=-1) + _RIDGE * self.cells[:, None])
        right = features @ response[:, :, None]
        left = response.square().sum(1) - (right * torch.linalg.solve(gram, right)).sum((1, 2))
        total = total - 0.5 * (self.cells * (left / self.cells).log()).sum()
        own = c[self.acted]
        mean = (own * self.within).sum(1, keepdim=True) / self.counts[:, None]
        variance = ((own - mean).square() * self.within).sum(1) / self.counts
        result: Tensor = total - 0.5 * (self.counts * variance.log()).sum()
        return result

    def value(self, fit: Fit, allowed: FloatArray) -> float:
        """Of a fit's parameters with other edges."""
        parts = (torch.as_tensor(v) for v in (fit.unmixing, fit.weight, fit.bias, allowed))
        return float(self.log_likelihood(*parts))

    def start(self, unmixing: FloatArray, allowed: FloatArray) -> Fit:
        """Hinges at their first positions, rows of H scaled so that all c_j have variance 1."""
        scaled = unmixing / (self.y.numpy() @ unmixing.T).std(0)[:, None]
        fit = Fit(0.0, scaled, self.first_weight, self.first_bias, allowed)
        return Fit(self.value(fit, allowed), scaled, self.first_weight, self.first_bias, allowed)

    def maximise(self, fit: Fit, allowed: FloatArray, steps: int = 80) -> Fit:
        """The best fit with the edges of `allowed`, from another one.

        Args:
            fit: start.
            allowed: see `Fit`.
            steps: of L-BFGS, at most.

        Raises:
            TrainingError: a likelihood that is not finite.
        """
        mask = torch.as_tensor(allowed)
        shapes = [fit.unmixing.shape, fit.weight.shape, fit.bias.shape]
        sizes = [int(np.prod(shape)) for shape in shapes]

        def parts(flat: Tensor) -> list[Tensor]:
            return [v.reshape(shape) for v, shape in zip(flat.split(sizes), shapes, strict=True)]

        def loss(flat: FloatArray) -> tuple[float, FloatArray]:
            at = torch.as_tensor(flat).requires_grad_(True)
            h, weight, bias = parts(at)
            value = -self.log_likelihood(h, weight, bias, mask) / self.n + _SHRINK * weight.square().sum()
            (gradient,) = torch.autograd.grad(value, at)
            return float(value.detach()), gradient.numpy()

        begin = np.concatenate([fit.unmixing.ravel(), fit.weight.ravel(), fit.bias.ravel()])
        options: dict[str, Any] = {"maxiter": steps, "maxcor": 20}
        found: Any = minimize(loss, begin, jac=True, method="L-BFGS-B", options=options)  # type: ignore[call-overload]
        if not np.isfinite(found.fun):
            raise TrainingError("the likelihood is not finite: give more cells, or leave constant genes out")
        unmixing, weight, bias = (v.numpy() for v in parts(torch.as_tensor(found.x)))
        result = Fit(0.0, unmixing, weight, bias, allowed)
        return Fit(self.value(result, allowed), unmixing, weight, bias, allowed)


def complete(order: Sequence[int]) -> FloatArray:
    """``[d, d]`` all edges that go forward in an order; entry [j, i] for i -> j."""
    allowed = np.zeros((len(order), len(order)))
    for k, j in enumerate(order):
        allowed[j, list(order[:k])] = 1
    return allowed


def search_order(
    network: HardNetwork,
    first: Sequence[Sequence[int]],
    unmixings: Callable[[Sequence[int]], Sequence[FloatArray]],
    rng: np.random.Generator,
    steps: int = 40,
) -> tuple[list[int], Fit]:
    """The causal order of the highest likelihood that insertions reach, from each of the first orders.

    Args:
        network: of the cells, or of a part of them: orders differ by hundreds of nats.
        first: orders to start from.
        unmixings: order -> H to start from.
        rng: for the order in which neighbours are tried.
        steps: of each fit.
    """
    seen: dict[tuple[int, ...], Fit] = {}

    def fitted(order: tuple[int, ...], near: Fit | None) -> Fit:
        if order not in seen:
            allowed = complete(order)
            starts = [network.start(h, allowed) for h in unmixings(order)]
            if near is not None:
                starts.append(network.start(near.unmixing, allowed))
            best = max(starts, key=lambda f: f.value)
            seen[order] = network.maximise(best, allowed, steps)
        return seen[order]

    ends = []
    for begin in first:
        order = tuple(begin)
        current = fitted(order, None)
        better: tuple[int, ...] | None = order
        while better is not None:
            order, better = better, None
            current = seen[order]
            pairs = rng.permutation([(a, b) for a in range(network.d) for b in range(network.d) if a != b])
            for a, b in pairs if network.d > 1 else ():
                moved = list(order)
                moved.insert(int(b), moved.pop(int(a)))
                if fitted(tuple(moved), current).value > current.value + _BETTER:
                    better = tuple(moved)
                    break
        ends.append((current.value, order))
    order = max(ends)[1]
    return list(order), seen[order]


def drop_edges(network: HardNetwork, fit: Fit, steps: int = 25, patience: int = 3) -> Fit:
    """Backward elimination: the edge that seems to matter least goes, all else is fitted anew, while BIC gains.

    Args:
        network: of the cells.
        fit: with all edges that may be.
        steps: of each fit.
        patience: edges that are tried in vain before it ends.
    """
    kept: set[tuple[int, int]] = set()
    while len(kept) < patience:
        edges = [(int(j), int(i)) for j, i in np.argwhere(fit.allowed > 0) if (int(j), int(i)) not in kept]
        if not edges:
            break
        fewer = {edge: _without(fit.allowed, edge) for edge in edges}
        edge = max(edges, key=lambda e: network.value(fit, fewer[e]))
        without = network.maximise(fit, fewer[edge], steps)
        if fit.value - without.value < network.price:
            fit, kept = without, set()
        else:
            kept.add(edge)
    return fit


def edge_gains(network: HardNetwork, fit: Fit, order: Sequence[int], steps: int = 25) -> FloatArray:
    """``[d, d]`` nats that each edge i -> j is worth beyond its price, all other edges as they are; -inf against order.

    Args:
        network: of the cells.
        fit: with the graph.
        order: a causal order; edges against it are not fitted.
        steps: of each fit.
    """
    gains = np.full((network.d, network.d), -np.inf)
    for j, i in np.argwhere(complete(order) > 0):
        edge = (int(j), int(i))
        if fit.allowed[edge] > 0:
            gains[i, j] = fit.value - network.maximise(fit, _without(fit.allowed, edge), steps).value - network.price
        else:
            more = fit.allowed.copy()
            more[edge] = 1
            gains[i, j] = network.maximise(fit, more, steps).value - fit.value - network.price
    return gains


def _without(allowed: FloatArray, edge: tuple[int, int]) -> FloatArray:
    fewer = allowed.copy()
    fewer[edge] = 0
    return fewer
