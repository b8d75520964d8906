"""Distributions that the suite leans on at every step: exact in float32, few passes over the data."""

from typing import Any

import torch
from pyro.distributions import Independent, Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

__all__ = ["NegativeBinomial", "normal"]

# Below this inverse dispersion lgamma(x + theta) - lgamma(theta) keeps its digits; above it Stirling's series does.
_STIRLING_FROM = 20.0


def normal(loc: Tensor, scale: Tensor) -> Independent:
    """N(loc, diag scale^2) over the last dimension: loc and scale ``(..., d)``, event ``(d,)``."""
    return Normal(loc, scale).to_event(1)


def _stirling_tail(a: Tensor) -> Tensor:
    """lgamma(a) - [(a - 1/2) log a - a + log(2 pi)/2], to 1e-9 for a >= 20 (Abramowitz & Stegun 6.1.40)."""
    inverse = 1 / a
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square / 1260))


class NegativeBinomial(TorchDistribution):  # type: ignore[misc]
    """NB(mu, theta): mean mu, variance mu + mu^2 / theta; tends to Poisson(mu) as theta grows.

    log p(x) = lgamma(x + theta) - lgamma(theta) - lgamma(x + 1)
               + theta log(theta / (theta + mu)) + x log(mu / (theta + mu))

    evaluated so that it keeps its digits in float32 for theta from 1e-8 to 1e12: for large theta the difference of
    log-gammas and the two logarithms, each of size theta, are combined by Stirling's series before they cancel.

    Args:
        log_mean: ``(...)`` log mu.
        log_dispersion: ``(...)`` log theta, the inverse dispersion.
    """

    arg_constraints = {"log_mean": constraints.real, "log_dispersion": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer
    has_rsample = False

    def __init__(self, log_mean: Tensor, log_dispersion: Tensor, validate_args: bool | None = None) -> None:
        self.log_mean, self.log_dispersion = broadcast_all(log_mean, log_dispersion)
        super().__init__(self.log_mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "NegativeBinomial":
        """The same distribution with a larger batch shape."""
        new: NegativeBinomial = self._get_checked_instance(NegativeBinomial, _instance)
        shape = torch.Size(batch_shape)
        new.log_mean, new.log_dispersion = self.log_mean.expand(shape), self.log_dispersion.expand(shape)
        super(NegativeBinomial, new).__init__(shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Mu."""
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        """Mu + mu^2 / theta."""
        return self.mean + (2 * self.log_mean - self.log_dispersion).exp()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts as a Poisson mixture over Gamma(theta, theta / mu)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            theta = self.log_dispersion.exp().expand(shape)
            rate = torch.distributions.Gamma(theta, theta, validate_args=False).sample() * self.mean.expand(shape)
            return torch.poisson(rate)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts, of the batch's shape."""
        if self._validate_args:
            self._validate_sample(value)
        log_mean, log_theta = self.log_mean, self.log_dispersion
        theta = log_theta.exp()
        # log(1 + mu / theta), exact at both ends
        log_odds = torch.nn.functional.softplus(log_mean - log_theta)
        large = theta > _STIRLING_FROM
        few = torch.where(large, torch.ones_like(theta), theta)  # each branch sees only what it can digest, so that
        many = torch.where(large, theta, torch.full_like(theta, _STIRLING_FROM))  # gradients stay finite in both
        direct = torch.lgamma(value + few) - torch.lgamma(few) - value * log_theta
        ratio = torch.log1p(value / many)
        series = (many + value - 0.5) * ratio - value + _stirling_tail(many + value) - _stirling_tail(many)
        gamma = torch.where(large, series, direct)  # lgamma(x + theta) - lgamma(theta) - x log theta
        # x log(mu / (theta + mu)) + x log theta = x log mu - x log(1 + mu / theta)
        return gamma + value * log_mean - (value + theta) * log_odds - torch.lgamma(value + 1)
