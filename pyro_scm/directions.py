"""The basis in which a matrix of effects is sparse: a small problem of its own, without models or cells."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from torch import Tensor

from pyro_scm.errors import DataError, ModelError

__all__ = ["CONTRASTS", "Directions", "centre", "sparse_directions"]

FloatArray = NDArray[np.float64]

_LEAST_SINGULAR = 1e-6  # of the largest: below, the effects do not span the latent space
_ROUNDS = 2  # of finding a basis and, in it, the common centre again


def _log_cosh(v: Tensor) -> Tensor:
    return torch.logaddexp(v, -v)


def _smooth_l1(v: Tensor) -> Tensor:
    return (v.square() + 1e-4).sqrt()


def _varimax(v: Tensor) -> Tensor:
    return -0.25 * v.square().square()


CONTRASTS: dict[str, Callable[[Tensor], Tensor]] = {"log-cosh": _log_cosh, "l1": _smooth_l1, "varimax": _varimax}
"""Of one entry of the unmixed effects in columns of unit mean square: small where few entries are large."""


@dataclass(frozen=True, eq=False)
class Directions:
    """A basis in which effects are sparse.

    Args:
        matrix: M ``[d, d]``, rows of unit length: z' = M z, so that a standard normal z has standard normal entries in
            the new basis, independent if M is a rotation.
        score: the contrast, mean over environments, sum over latents; lower is sparser.
        scores: ``[starts]`` of all starts, lowest first; how many agree says how trustworthy the lowest is.
        effects: ``[E, d]`` in the new basis, less the common offset.
        rank: number of leading latents whose directions were searched; the effects on the others are small, and their
            basis is arbitrary.
        offset: ``[d]`` common to all environments, in the new basis; 0 where none was asked for.
    """

    matrix: FloatArray
    score: float
    scores: FloatArray
    effects: FloatArray
    rank: int
    offset: FloatArray

    @property
    def agreement(self) -> float:
        """Share of the starts that reached the lowest score, to 1e-4."""
        return float((self.scores <= self.score + 1e-4).mean())

    @property
    def correlation(self) -> float:
        """Largest correlation between two entries of M z for z ~ N(0, I): 0 for a rotation."""
        gram = np.abs(self.matrix @ self.matrix.T)
        np.fill_diagonal(gram, 0.0)
        return float(gram.max(initial=0.0))


def sparse_directions(
    effects: ArrayLike,
    *,
    rank: int | None = None,
    offset: bool = False,
    covariances: ArrayLike | None = None,
    contrast: str = "log-cosh",
    oblique: float | None = None,
    starts: int = 24,
    steps: int = 500,
    seed: int = 0,
) -> Directions:
    """The basis in which the columns of a matrix of effects are sparsest, from many random starts at once.

    Among rotations M it minimises the sum over columns of the mean contrast of E M'. In an oblique search M is any
    invertible matrix, each column of E M' is scaled to unit mean square, and `oblique` times log |det| of the unmixing
    of the whitened effects is subtracted, which keeps two columns from being the same.

    With `covariances` S_e of the latents in each environment, the mean over environments of
    1/2 log det diag(M S_e M') is added: nats that a diagonal Normal loses against a full one, 0 where M makes all of
    them diagonal, as it can where environments change the scales of independent latents (Flury, J. R. Stat. Soc. C
    1986; Pham, SIAM J. Matrix Anal. 2001).

    Args:
        effects: E ``[E, d]``, one row a perturbed environment, relative to the reference.
        rank: r <= d: turns the r directions in which effects are largest (by singular values) among themselves and
            leaves their orthogonal complement alone; all d by default.
        offset: whether all environments share an unknown offset, which is taken off first: on real screens perturbed
            cells differ from untreated ones even where the perturbation does nothing.
        covariances: ``[E, d, d]`` of the latents in the same environments, of which the reference's is I.
        contrast: one of `CONTRASTS`.
        oblique: None for rotations, which leave the model as it is; else the weight of the log-determinant (0.3, say),
            for fits whose noise is not uncorrelated. Rotations recovered more in every screen that was tried.
        starts: random starts.
        steps: largest number of L-BFGS iterations.
        seed: of the starts.

    Returns:
        Rows in decreasing size of their effects, the `rank` searched ones first, signs such that their largest effects
        are positive.

    Raises:
        DataError: effects that do not span as many latents as asked for, or covariances of another shape.
        ModelError: an unknown contrast, varimax in an oblique search, where all columns would become the same, or
            covariances in one, for M S M' can then always be made diagonal in one environment.
    """
    if contrast not in CONTRASTS:
        raise ModelError(f"unknown contrast {contrast!r}: use one of {', '.join(CONTRASTS)}")
    if contrast == "varimax" and oblique is not None:
        raise ModelError("varimax is a contrast of rotations: use oblique=None with it")
    if covariances is not None and oblique is not None:
        raise ModelError("covariances are made diagonal by a rotation: use oblique=None with them")
    e = np.asarray(effects, np.float64)
    if e.ndim != 2 or not np.isfinite(e).all():
        raise DataError(f"effects have shape {e.shape}: expected finite numbers [environments, latents]")
    spreads = None if covariances is None else _covariances(covariances, e)
    common = centre(e) if offset else np.zeros(e.shape[1])
    for _ in range(_ROUNDS if offset else 1):
        span, r = _span(e - common, rank)
        leading = torch.as_tensor((e - common) @ span[:r].T)
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(starts, r, r, generator=generator, dtype=torch.float64)
        inner = None if spreads is None else torch.as_tensor(span[:r] @ spreads @ span[:r].T)
        found, scores = (
            _rotations(leading, draws, CONTRASTS[contrast], steps, inner)
            if oblique is None
            else _oblique(leading, draws, CONTRASTS[contrast], oblique, steps)
        )
        best = torch.argsort(scores)
        m = np.concatenate([found[best[0]].numpy() @ span[:r], span[r:]])
        m = _canonical(m, e - common, r)
        if offset:  # few environments move a sparse latent: its median is the offset
            common = np.asarray(np.linalg.solve(m, np.median(e @ m.T, 0)), np.float64)
    moved = (e - common) @ m.T
    return Directions(m, float(scores[best[0]]), scores[best].numpy(), moved, r, m @ common)


def centre(effects: ArrayLike, weights: ArrayLike | None = None) -> FloatArray:
    """Spatial median ``[d]`` of effects ``[E, d]``: what most have in common, whatever a few do, in any rotation.

    Weiszfeld's iterations; Vardi and Zhang, "The multivariate L1-median and associated data depth", PNAS 2000.

    Args:
        effects: E ``[E, d]``.
        weights: ``[E]`` how much each environment counts; all alike by default.
    """
    e = np.asarray(effects, np.float64)
    weight = np.ones(len(e)) if weights is None else np.asarray(weights, np.float64)
    found = np.asarray(np.median(e, 0), np.float64)
    least = max(1e-9 * float(np.abs(e).max(initial=0.0)), 1e-290)  # its inverse is finite where no effect is there
    for _ in range(200):
        pull = weight / np.maximum(np.linalg.norm(e - found, axis=1), least)
        before, found = found, np.asarray(pull @ e / pull.sum(), np.float64)
        if np.abs(found - before).max(initial=0.0) <= least:
            break
    return found


def _covariances(given: ArrayLike, e: FloatArray) -> FloatArray:
    s = np.asarray(given, np.float64)
    if s.shape != (*e.shape, e.shape[1]) or not np.isfinite(s).all():
        raise DataError(f"covariances have shape {s.shape}: expected finite numbers {(*e.shape, e.shape[1])}")
    return s


def _span(e: FloatArray, rank: int | None) -> tuple[FloatArray, int]:
    """Orthonormal rows ``[d, d]``, the r in which effects are largest first, and r."""
    n, d = e.shape
    _, singular, rows = np.linalg.svd(e, full_matrices=True)
    own = int((singular > _LEAST_SINGULAR * singular.max(initial=1e-300)).sum()) if n else 0
    asked = d if rank is None else rank
    if not 1 <= asked <= d:
        raise DataError(f"rank is {asked}: give a number from 1 to {d}, that of the latents")
    if own < asked:
        raise DataError(
            f"effects of {n} environments span {own} of {asked} latents: fit with latent={max(own, 1)}, turn "
            f"rank={max(own, 1)} of them, or give more environments"
        )
    return rows, asked


def _minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Arguments and values ``(starts,)`` at the minimum of the sum over starts."""

    def both(flat: FloatArray) -> tuple[float, FloatArray]:
        argument = torch.tensor(flat).reshape(start.shape).requires_grad_(True)
        total = loss(argument).sum()
        (gradient,) = torch.autograd.grad(total, [argument])
        return float(total.detach()), gradient.reshape(-1).numpy()

    result = minimize(both, start.reshape(-1).numpy(), jac=True, method="L-BFGS-B", options={"maxiter": steps})
    argument = torch.as_tensor(result.x).reshape(start.shape)
    return argument, loss(argument).detach()


def _unit(v: Tensor) -> Tensor:
    """Columns ``(..., n, d)`` of unit mean square."""
    return v / v.square().mean(-2, keepdim=True).sqrt()


def _oblique(e: Tensor, draws: Tensor, contrast: Callable[[Tensor], Tensor], weight: float, steps: int) -> Any:
    _, singular, right = torch.linalg.svd(e, full_matrices=False)
    whitener = right.mT / singular * len(e) ** 0.5  # e @ whitener has uncorrelated columns of unit mean square
    white = e @ whitener

    def loss(w: Tensor) -> Tensor:
        columns = w / w.norm(dim=-2, keepdim=True)
        each = contrast(_unit(white @ columns)).mean(-2).sum(-1)
        result: Tensor = each - weight * torch.linalg.slogdet(columns).logabsdet
        return result

    w, scores = _minimise(loss, torch.linalg.qr(draws).Q, steps)
    return (whitener @ w).mT, scores


def _rotations(
    e: Tensor, draws: Tensor, contrast: Callable[[Tensor], Tensor], steps: int, covariances: Tensor | None
) -> Any:
    unit = e / e.square().mean().sqrt()
    first = torch.linalg.qr(draws).Q
    one = torch.eye(e.shape[1], dtype=e.dtype)
    full = 0.0 if covariances is None else float(torch.linalg.slogdet(covariances).logabsdet.mean())

    def rotation(a: Tensor) -> Tensor:  # Cayley's: a tenth of the cost of the exponential
        skew = a - a.mT
        turned: Tensor = first @ torch.linalg.solve(one + skew, one - skew)
        return turned

    def loss(a: Tensor) -> Tensor:
        q = rotation(a)
        each: Tensor = contrast(unit @ q).mean(-2).sum(-1)
        if covariances is not None:
            spread = torch.einsum("sik,eij,sjk->sek", q, covariances, q)
            each = each + 0.5 * (spread.log().sum(-1).mean(-1) - full)
        return each

    a, scores = _minimise(loss, torch.zeros_like(draws), steps)
    return rotation(a).mT, scores


def _canonical(m: FloatArray, e: FloatArray, rank: int) -> FloatArray:
    m = m / np.linalg.norm(m, axis=1, keepdims=True)
    moved = e @ m.T
    signs = np.sign(moved[np.abs(moved).argmax(0), np.arange(len(m))])
    signs[signs == 0] = 1.0  # a latent that nothing moves
    sizes = np.square(moved).sum(0)
    order = np.argsort(-sizes[:rank], kind="stable")
    order = np.concatenate([order, rank + np.argsort(-sizes[rank:], kind="stable")])
    result: FloatArray = (m * signs[:, None])[order]
    return result
