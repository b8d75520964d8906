"""From genes to d coordinates: what cells say of d latents behind a linear decoder, and nothing of the rest.

x = b + W c + noise with diagonal covariance psi. Factor analysis finds the space that W spans and psi, whatever the law
of c; the generalised least squares projection y of a cell then keeps all that it says of c, with a known error. The
latents themselves are y up to a linear map, which environments (`hard_gaussian`) or a decoder of which it is known who
reads what (`anchored`) have to settle.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from pyro_scm.errors import DataError

__all__ = ["Signal", "anchored", "signal"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_FLOOR = 1e-8  # of psi, in units of a gene's variance


@dataclass(frozen=True, eq=False)
class Signal:
    """Cells in the space that the decoder spans; in the reference they have mean 0 and, error aside, variance I.

    Args:
        y: ``[n, d]``.
        error: ``[d, d]`` covariance of the error of y.
        loading: ``[G, d]`` what a unit of y adds to each gene.
        count: ``[E]`` cells of each environment.
        mean: ``[E, d]`` of y.
        covariance: ``[E, d, d]`` of y.
    """

    y: FloatArray
    error: FloatArray
    loading: FloatArray
    count: FloatArray
    mean: FloatArray
    covariance: FloatArray


def signal(x: FloatArray, env: IntArray, environments: int, latent: int) -> Signal:
    """Factor analysis of all cells together, then coordinates in which the reference is white.

    Args:
        x: ``[n, G]`` continuous expression.
        env: ``[n]`` environment of each cell; 0 is the reference.
        environments: E.
        latent: d.

    Raises:
        DataError: fewer informative genes than latents, or an environment with too few cells.
    """
    if x.ndim != 2 or env.shape != x.shape[:1]:
        raise DataError(f"x has shape {x.shape} and env {env.shape}: expected (n, G) and (n,)")
    count = np.bincount(env, minlength=environments).astype(np.float64)
    poor = [e for e in range(environments) if count[e] < latent + 2]
    if poor:
        raise DataError(
            f"environment {poor[0]} has {int(count[poor[0]])} cells: {latent} latents need at least {latent + 2}"
        )
    varied = x.std(0) > 0
    if varied.sum() <= latent:
        raise DataError(f"{int(varied.sum())} genes vary, for {latent} latents: give more genes than latents")
    x = x[:, varied]
    scale = x.std(0)
    standard = (x - x.mean(0)) / scale
    factors, psi, ratio = _factors(standard.T @ standard / len(x), latent)
    y = standard @ (factors / psi[:, None]) / ratio
    error = np.diag(1 / ratio)
    whole = np.zeros((len(varied), latent))
    whole[varied] = scale[:, None] * factors
    reference = y[env == 0]
    values, vectors = np.linalg.eigh(np.cov(reference.T, bias=True).reshape(latent, latent) - error)
    values = values.clip(min=1e-6)
    turn = (vectors / np.sqrt(values)).T
    y = (y - reference.mean(0)) @ turn.T
    groups = [y[env == e] for e in range(environments)]
    return Signal(
        y=y,
        error=turn @ error @ turn.T,
        loading=whole @ (vectors * np.sqrt(values)),
        count=count,
        mean=np.stack([g.mean(0) for g in groups]),
        covariance=np.stack([np.cov(g.T, bias=True).reshape(latent, latent) for g in groups]),
    )


def _factors(correlation: FloatArray, d: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Factors ``[G, d]``, psi ``[G]`` and each factor's ratio of signal to noise, by maximum likelihood.

    The likelihood is profiled over the factors, so that psi alone is searched.

    Source: Jöreskog, "Some contributions to maximum likelihood factor analysis", Psychometrika 1967.
    """
    g = len(correlation)

    def whitened(log_psi: FloatArray) -> tuple[FloatArray, FloatArray]:
        root = np.exp(-log_psi / 2)
        values, vectors = np.linalg.eigh(root[:, None] * correlation * root)
        return values.clip(min=1e-12), vectors

    def loss(log_psi: FloatArray) -> tuple[float, FloatArray]:
        values, vectors = whitened(log_psi)
        rest, w = values[:-d], vectors[:, :-d]
        return float((rest - np.log(rest) - 1).sum()), -((rest - 1) * w**2).sum(1)

    inverse = np.linalg.inv(correlation + 1e-9 * np.eye(g)).diagonal()
    start = np.log(np.clip((1 - d / (2 * g)) / inverse, _FLOOR, 0.99))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(np.log(_FLOOR), 0.0)] * g)
    values, vectors = whitened(found.x)
    ratio = (values[-d:] - 1).clip(min=1e-6)
    psi: FloatArray = np.exp(found.x)
    return np.sqrt(psi)[:, None] * vectors[:, -d:] * np.sqrt(ratio), psi, ratio


def anchored(space: Signal, reads: NDArray[np.bool_]) -> FloatArray:
    """Causal variables ``[n, d]`` behind a decoder of which it is known which gene reads which latent.

    Column j of the decoder is a combination of the loadings that vanishes on the genes that do not read j. If these
    genes read all other latents, in enough different ways, there is one such combination: no environment is needed.
    Each variable has a scale and sign that nothing can settle: its standard deviation in the reference is 1.

    Args:
        space: of the cells.
        reads: ``[G, d]`` whether a gene reads a latent.

    Raises:
        DataError: a latent that the pattern does not single out.
    """
    d = space.y.shape[1]
    if reads.shape != (len(space.loading), d):
        raise DataError(f"reads has shape {reads.shape}: expected {(len(space.loading), d)}, genes by latents")
    size = np.linalg.norm(space.loading, axis=1, keepdims=True)
    rows = space.loading / np.where(size > 0, size, 1.0)
    columns = np.empty((d, d))
    for j in range(d):
        silent = rows[~reads[:, j]]
        if len(silent) < d - 1:
            raise DataError(
                f"latent {j}: {len(silent)} genes do not read it, at least {d - 1} must: use a sparser mask"
            )
        _, values, directions = np.linalg.svd(silent)
        if d > 1 and values[d - 2] < 1e-3 * values[0]:
            raise DataError(f"latent {j}: the genes that do not read it leave its direction open: use a sparser mask")
        columns[:, j] = directions[-1]
    unmixing = np.linalg.inv(columns)  # the decoder is loading @ columns, so c = columns^-1 y
    unmixing /= np.linalg.norm(unmixing, axis=1, keepdims=True)
    return np.asarray(space.y @ unmixing.T)
