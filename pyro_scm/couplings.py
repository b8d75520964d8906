"""Observation noise shared between worlds: the same quantile of each measurement's law in both."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_scm.distributions import NegativeBinomial
from pyro_scm.errors import InterventionError
from pyro_scm.handlers import diagonal

__all__ = ["coupled"]

_SMALLEST = 1e-12


def coupled(law: Any, other: Any, value: Tensor, generator: torch.Generator) -> Tensor:
    """What a measurement would have been under another law, had it kept its own noise.

    Of location-scale laws (Normal, Student-t) the standardised residual is kept. A count has no one noise value but a
    range of quantiles, F(x - 1) to F(x): one is drawn from it (about ten microseconds a count). Where both laws are the
    same the value stays exactly.

    Args:
        law: that the value came from.
        other: what it would have come from.
        value: ``(..., n, G)``.
        generator: of the draws, on the host.

    Raises:
        InterventionError: a law of another kind, such as the mixtures of protein counts.
    """
    before, after = diagonal(law), diagonal(other)
    if isinstance(before, NegativeBinomial) and isinstance(after, NegativeBinomial):
        return _counts(before, after, value, generator)
    if not all(hasattr(one, name) for one in (before, after) for name in ("loc", "scale")):
        raise InterventionError(
            f"the noise of {type(before).__name__} measurements cannot be carried to another world: ask for their "
            "expectation (sample=False, measured=False)"
        )
    moved: Tensor = value + (after.loc - before.loc) + (after.scale / before.scale - 1) * (value - before.loc)
    return moved


def _counts(before: NegativeBinomial, after: NegativeBinomial, value: Tensor, generator: torch.Generator) -> Tensor:
    from scipy.stats import nbinom

    shape = torch.broadcast_shapes(before.batch_shape, after.batch_shape, value.shape)

    def host(part: Tensor) -> NDArray[np.float64]:
        return np.asarray(part.expand(shape).cpu().double())

    x, share = host(value), torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
    laws = [(host(law.mean), host(law.log_dispersion.exp())) for law in (before, after)]
    moved = x.copy()
    differ = (laws[0][0] != laws[1][0]) | (laws[0][1] != laws[1][1])
    (size, p), (other, q) = (
        (theta[differ], theta[differ] / (theta[differ] + mean[differ])) for mean, theta in laws
    )  # quantile functions are slow: only where something changed, and only from the nearer tail
    mass = nbinom.pmf(x[differ], size, p)
    below = nbinom.cdf(x[differ] - 1, size, p) + share[differ] * mass
    above = nbinom.sf(x[differ], size, p) + (1 - share[differ]) * mass
    left, found = below < 0.5, np.empty_like(below)
    found[left] = nbinom.ppf(below[left].clip(min=_SMALLEST), other[left], q[left])
    found[~left] = nbinom.isf(above[~left].clip(min=_SMALLEST), other[~left], q[~left])
    moved[differ] = found
    return torch.as_tensor(moved, dtype=value.dtype, device=value.device)
