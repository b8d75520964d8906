"""Linear Gaussian latent SCM under hard interventions: a start in closed form, then exact maximum likelihood.

In coordinates y in which the reference is white, z = Q y for a rotation Q. Where an environment acts on latent j, all
other noise stays N(0, 1) and independent, and nothing is said of z_j: so row j of Q has a likelihood of its own, a
function of that environment's moments. `rotation` maximises the sum of these over rotations, plane by plane, each
plane exactly. The parents of j being cut there, -z_j regressed on the other noise then gives row j of (I - A)^-1.

From there on y | e ~ N(b + T N_e mu_e, T N_e diag(sigma_e^2) N_e' T' + error) with N_e = (I - A)(I - D_e A)^-1 is
maximised by scoring: score and information are products of small matrices, no cell is looked at again.

Setting: Squires et al., "Linear causal disentanglement via interventions", ICML 2023.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_scm.errors import DataError
from pyro_scm.orders import Local, parent_scores
from pyro_scm.signal_space import Signal

__all__ = ["HardGaussian", "Parameters", "ancestry", "effects", "rotation", "single_targets"]

FloatArray = NDArray[np.float64]
_COARSE = np.linspace(0, 2 * np.pi, 73)[:-1]
_SWEEPS = 30
_RIDGE = 1e-2  # of regressions on noise of variance 1
_LARGEST = 3.0  # |A| at the start


def single_targets(targets: FloatArray) -> list[list[int]]:
    """For each latent the environments that act on it alone.

    Args:
        targets: ``[E, d]`` 1 where an environment acts on a latent.

    Raises:
        DataError: a latent without one.
    """
    alone = (targets > 0) & (targets.sum(1) == 1)[:, None]
    result = [[int(e) for e in np.flatnonzero(alone[:, j])] for j in range(targets.shape[1])]
    missing = [j for j, own in enumerate(result) if not own]
    if missing:
        raise DataError(
            f"latent {missing[0]} has no environment that acts on it alone: leave it out, or give one; without it "
            "neither the latents nor the graph can be known"
        )
    return result


@dataclass(frozen=True)
class _Form:
    """Of one environment: share of the cells, second moment about the reference's mean, inverse covariance."""

    share: float
    second: FloatArray
    inverse: FloatArray


def _forms(space: Signal, alone: Sequence[Sequence[int]]) -> list[list[_Form]]:
    d = space.y.shape[1]
    result = []
    for own in alone:
        rows = []
        for e in own:
            inner = space.covariance[e] - space.error
            values, vectors = np.linalg.eigh(inner)
            inverse = (vectors / values.clip(min=1e-3)) @ vectors.T
            share = space.count[e] / space.count.sum()
            rows.append(_Form(float(share), inner + np.outer(space.mean[e], space.mean[e]), inverse))
        result.append(rows)
    assert len(result) == d
    return result


def rotation(space: Signal, targets: FloatArray, restarts: int = 4, seed: int = 0) -> FloatArray:
    """Q ``[d, d]`` with z = Q y: the most likely of several starts, the first from the shifts of the means.

    Args:
        space: of the cells.
        targets: ``[E, d]``.
        restarts: number of starts, the others at random.
        seed: of these.

    Raises:
        DataError: see `single_targets`.
    """
    alone = single_targets(targets)
    forms = _forms(space, alone)
    rng = np.random.default_rng(seed)
    d = len(alone)
    best: tuple[float, FloatArray] | None = None
    for start in range(restarts):
        shifts = np.stack([space.mean[own].sum(0) for own in alone]) if start == 0 else rng.normal(size=(d, d))
        left, _, right = np.linalg.svd(shifts)
        found = _turned(left @ right, forms)
        if best is None or found[0] > best[0]:
            best = found
    assert best is not None
    return best[1]


def _turned(q: FloatArray, forms: Sequence[Sequence[_Form]]) -> tuple[float, FloatArray]:
    """Log-likelihood per cell and rotation after sweeps over all planes."""
    for sweep in range(_SWEEPS):
        fine = sweep > 3 and sweep % 3
        angles = np.append(0.0, np.linspace(-0.1, 0.1, 41) * 0.7 ** (sweep - 4)) if fine else _COARSE
        c, s = np.cos(angles), np.sin(angles)
        moved = 0.0
        for i in range(len(q)):
            for j in range(i):
                value = _on_plane(forms[i], q[i], q[j], c, s) + _on_plane(forms[j], q[i], q[j], -s, c)
                b = int(np.argmax(value))
                if value[b] > value[0] + 1e-9:
                    q[i], q[j] = c[b] * q[i] + s[b] * q[j], -s[b] * q[i] + c[b] * q[j]
                    moved += float(value[b] - value[0])
        if moved < 1e-7:
            break
    total = sum(float(_on_plane(own, q[j], q[j], np.ones(1), np.zeros(1))[0]) for j, own in enumerate(forms))
    return total, q


def _on_plane(forms: Sequence[_Form], p: FloatArray, q: FloatArray, a: FloatArray, b: FloatArray) -> FloatArray:
    """Twice the log-likelihood of the direction a p + b q, for all pairs (a, b)."""
    total: FloatArray = np.zeros(len(a))
    for form in forms:
        quadratic, precision = (
            a * a * (p @ m @ p) + 2 * a * b * (p @ m @ q) + b * b * (q @ m @ q) for m in (form.second, form.inverse)
        )
        total = total + form.share * (quadratic + np.log(precision.clip(min=1e-12)))
    return total


def _noise_covariance(space: Signal, q: FloatArray, own: Sequence[int]) -> tuple[float, FloatArray]:
    """Cells and covariance of z in the environments that act on one latent."""
    n = space.count[list(own)]
    pooled = np.einsum("e,eij->ij", n, space.covariance[list(own)]) / n.sum() - space.error
    return float(n.sum()), q @ pooled @ q.T


def effects(space: Signal, q: FloatArray, targets: FloatArray, reached: FloatArray) -> FloatArray:
    """Total effects (I - A)^-1 ``[d, d]``, entry [j, i] of z_i on c_j.

    Args:
        space: of the cells.
        q: see `rotation`.
        targets: ``[E, d]``.
        reached: ``[d, d]`` entry [j, i] non-zero where i may be an ancestor of j.
    """
    total = np.eye(len(q))
    for j, own in enumerate(single_targets(targets)):
        rest = np.flatnonzero(reached[j])
        _, s = _noise_covariance(space, q, own)
        total[j, rest] = -np.linalg.solve(s[np.ix_(rest, rest)] + _RIDGE * np.eye(len(rest)), s[rest, j])
    return total


def ancestry(space: Signal, q: FloatArray, targets: FloatArray, most: int | None = None) -> list[Local]:
    """Scores of the sets of latents whose noise reaches each latent: what a first causal order is read from.

    Args:
        space: of the cells.
        q: see `rotation`.
        targets: ``[E, d]``.
        most: largest set.
    """
    result = []
    for j, own in enumerate(single_targets(targets)):
        rest = np.delete(np.arange(len(q)), j)
        n, s = _noise_covariance(space, q, own)
        inner = s[np.ix_(rest, rest)] + _RIDGE * np.eye(len(rest))
        left = max(float(s[j, j] - s[j, rest] @ np.linalg.solve(inner, s[rest, j])), 1e-3)
        result.append(parent_scores(j, n * inner / left, -n * s[rest, j] / left, most))
    return result


@dataclass(frozen=True, eq=False)
class Parameters:
    """T ``[d, d]``, A ``[d, d]``, b ``[d]``, mu ``[E, d]`` and log sigma ``[E, d]``."""

    total: FloatArray
    matrix: FloatArray
    offset: FloatArray
    loc: FloatArray
    log_scale: FloatArray

    def unmixing(self) -> FloatArray:
        """``[d, d]``: c = unmixing (y - b)."""
        eye = np.eye(len(self.matrix))
        return np.asarray(np.linalg.inv(eye - self.matrix) @ np.linalg.inv(self.total))


class HardGaussian:
    """The likelihood of y, its score and expected information; parameters as one vector.

    Args:
        space: of the cells.
        targets: ``[E, d]`` 1 where an environment acts on a latent, and cuts its parents.
    """

    def __init__(self, space: Signal, targets: FloatArray) -> None:
        self.space, self.gain = space, 1.0 - (targets > 0)
        self.d, self.environments = targets.shape[1], len(targets)
        self.hits = np.argwhere(targets > 0)
        self.child, self.parent = np.nonzero(~np.eye(self.d, dtype=bool))
        d, k = self.d, len(self.hits)
        self._ends = np.cumsum([d * d, d * (d - 1), d, k, k])
        self.size = int(self._ends[-1])
        self.edge = np.zeros(self.size, bool)
        self.edge[d * d : d * d + d * (d - 1)] = True

    def start(self, q: FloatArray, total: FloatArray) -> FloatArray:
        """Parameters from `rotation` and `effects`."""
        a = np.clip(np.eye(self.d) - np.linalg.inv(total), -_LARGEST, _LARGEST)
        loc = (self.space.mean @ q.T)[self.hits[:, 0], self.hits[:, 1]]
        parts = (q.T.ravel(), a[self.child, self.parent], np.zeros(self.d), loc, np.zeros(len(loc)))
        return np.concatenate(parts)

    def unpack(self, p: FloatArray) -> Parameters:
        """The vector's parts."""
        t, a, b, loc, log_scale = np.split(p, self._ends[:-1])
        matrix = np.zeros((self.d, self.d))
        matrix[self.child, self.parent] = a
        mu, sigma = np.zeros((2, self.environments, self.d))
        mu[tuple(self.hits.T)], sigma[tuple(self.hits.T)] = loc, log_scale
        return Parameters(t.reshape(self.d, self.d), matrix, b, mu, sigma)

    def log_likelihood(self, p: FloatArray) -> float:
        """Nats of all cells, up to a constant; -inf where the parameters make no law."""
        try:
            _, _, _, _, whitening, mean = self._law(self.unpack(p))
        except np.linalg.LinAlgError:
            return -np.inf
        s = self.space
        deviation = np.einsum("eij,ej->ei", whitening, s.mean - mean)
        quadratic = np.einsum("eij,ejk,eik->e", whitening, s.covariance, whitening) + (deviation**2).sum(1)
        log_det = -2 * np.log(np.einsum("eii->ei", whitening)).sum(1)
        value = float(-0.5 * (s.count * (quadratic + log_det)).sum())
        return value if np.isfinite(value) else -np.inf

    def _law(self, v: Parameters) -> tuple[FloatArray, ...]:
        """(I - D A)^-1, N, T N, variances, inverse Cholesky factors ``[E, d, d]`` and means ``[E, d]``."""
        eye = np.eye(self.d)
        solved: FloatArray = np.asarray(np.linalg.inv(eye - self.gain[:, :, None] * v.matrix), np.float64)
        noise: FloatArray = (eye - v.matrix) @ solved
        mixed: FloatArray = v.total @ noise
        variance: FloatArray = np.exp(2 * v.log_scale)
        covariance = (mixed * variance[:, None, :]) @ mixed.transpose(0, 2, 1) + self.space.error
        whitening: FloatArray = np.asarray(np.linalg.inv(np.linalg.cholesky(covariance)), np.float64)
        mean: FloatArray = v.offset + (mixed @ v.loc[:, :, None])[:, :, 0]
        return solved, noise, mixed, variance, whitening, mean

    def score(self, p: FloatArray, kept: NDArray[np.bool_] | None = None) -> tuple[FloatArray, FloatArray]:
        """Gradient ``[P]`` and expected information ``[P, P]``, of the parameters that are kept; all by default.

        Whitened, each parameter changes an environment's covariance by u v' + v u' and its mean by s u, so that both
        are products of the matrices of all u, all v and all s.
        """
        values = self.unpack(p)
        solved, noise, mixed, variance, whitening, mean = self._law(values)
        space, d = self.space, self.d
        rows = np.arange(self.size) if kept is None else np.flatnonzero(kept)
        gradient, information = np.zeros(len(rows)), np.zeros((len(rows), len(rows)))
        ends = self._ends
        row, column = np.divmod(np.arange(d * d), d)
        for e in range(self.environments):
            w = whitening[e]
            own = w @ mixed[e]
            scaled = own * variance[e]
            u, v, s = np.zeros((self.size, d)), np.zeros((self.size, d)), np.zeros(self.size)
            u[: ends[0]], v[: ends[0]] = w.T[row], (scaled @ noise[e].T).T[column]
            s[: ends[0]] = (noise[e] @ values.loc[e])[column]
            edges = slice(ends[0], ends[1])
            u[edges] = (w @ values.total @ (noise[e] * self.gain[e] - np.eye(d))).T[self.child]
            v[edges] = (scaled @ solved[e].T).T[self.parent]
            s[edges] = (solved[e] @ values.loc[e])[self.parent]
            u[ends[1] : ends[2]], s[ends[1] : ends[2]] = w.T, 1.0
            here = np.flatnonzero(self.hits[:, 0] == e)
            target = self.hits[here, 1]
            u[ends[2] + here], s[ends[2] + here] = own.T[target], 1.0
            u[ends[3] + here], v[ends[3] + here] = own.T[target], scaled.T[target]
            u, v, s = u[rows], v[rows], s[rows]
            deviation = w @ (space.mean[e] - mean[e])
            excess = w @ space.covariance[e] @ w.T + np.outer(deviation, deviation) - np.eye(d)
            gradient += space.count[e] * (((u @ excess) * v).sum(1) + s * (u @ deviation))
            crossed = u @ v.T
            both = np.column_stack([v, s])
            information += space.count[e] * ((u @ u.T) * (both @ both.T) + crossed * crossed.T)
        return gradient, information

    def maximise(self, p: FloatArray, allowed: FloatArray, steps: int = 60) -> tuple[FloatArray, float]:
        """Parameters and log-likelihood of the best fit whose A is 0 outside `allowed`, by damped scoring.

        Args:
            p: start.
            allowed: ``[d, d]`` entry [j, i] non-zero where i may be a parent of j.
            steps: at most so many.
        """
        free = np.ones(self.size, bool)
        free[self.edge] = allowed[self.child, self.parent] > 0
        p = np.where(free, p, 0.0)
        value, damping = self.log_likelihood(p), 1e-3
        for _ in range(steps):
            g, h = self.score(p, free)
            ridge = h.diagonal() + 1e-3
            for _ in range(12):
                step = np.zeros(self.size)
                step[free] = np.linalg.solve(h + np.diag(damping * ridge), g)
                new = self.log_likelihood(p + step)
                if new > value:
                    break
                damping = max(damping * 5, 1e-4)
            else:
                break
            gain, p, value, damping = new - value, p + step, new, damping / 5
            if gain < 1e-3:
                break
        return p, value

    def parents(self, p: FloatArray, allowed: FloatArray, most: int | None = None) -> list[Local]:
        """Scores of each latent's parent sets, by a quadratic expansion of the likelihood at a fit.

        Row j of A is free in it, all other parameters are profiled out: the decoder, the laws of the environments, and
        the entries of A that are `allowed` in other rows. So the scores know how far the latents themselves are known.

        Args:
            p: of `maximise`.
            allowed: of the same fit.
            most: largest parent set.
        """
        gradient, information = self.score(p)
        a = self.unpack(p).matrix
        row = np.full(self.size, -1)
        row[self.edge] = self.child
        fitted = ~self.edge
        fitted[self.edge] = allowed[self.child, self.parent] > 0
        result = []
        for j in range(self.d):
            asked, rest = np.flatnonzero(row == j), np.flatnonzero(fitted & (row != j))
            ridge = 1e-6 * np.eye(len(rest))
            slopes = np.linalg.solve(information[np.ix_(rest, rest)] + ridge, information[np.ix_(rest, asked)])
            precision = information[np.ix_(asked, asked)] - information[np.ix_(asked, rest)] @ slopes
            precision = (precision + precision.T) / 2 + 1e-6 * np.eye(len(asked))
            linear = precision @ np.delete(a[j], j) + gradient[asked] - slopes.T @ gradient[rest]
            result.append(parent_scores(j, precision, linear, most))
        return result
