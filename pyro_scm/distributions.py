"""Distributions that the suite leans on at every step: exact in float32, few passes over the data."""

import math
from typing import Any

import torch
from pyro.distributions import Independent, Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus

__all__ = ["TABLE", "NegativeBinomial", "TwoNegativeBinomials", "normal"]

# From here on Stirling's series gives what his formula leaves of log Gamma; below, their difference keeps its digits.
_SERIES_FROM = 8.0
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
# A mean smaller than exp of this enters log p as x log(mu) alone.
_LOG_TINY = -40.0
TABLE = 256
"""Counts below this are looked up in tables, where there are cells enough to share them."""
_ENOUGH = 64


class _Diagonal(Normal):  # type: ignore[misc]
    """A Normal whose scale may be smaller than its location, ``(d,)`` for ``(..., d)``: it is never blown up to that.

    `torch.distributions.Normal` expands the scale and then takes its square and logarithm for every cell.
    """

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.own_scale = scale
        super().__init__(loc, scale.expand_as(loc), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Diagonal":
        new = self._get_checked_instance(_Diagonal, _instance)
        new.own_scale = self.own_scale
        result: _Diagonal = super().expand(batch_shape, _instance=new)
        return result

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        scale = self.own_scale
        if value.shape == self.loc.shape and scale.shape in (value.shape, value.shape[-1:]):
            return torch.as_tensor(_NormalKernel.apply(value, self.loc, scale))
        standardised = (value - self.loc) / scale
        result: Tensor = -0.5 * standardised.square() - (scale.log() + _HALF_LOG_2PI)
        return result


class _NormalKernel(torch.autograd.Function):
    """log N(value; loc, scale) and its gradients in few passes: each takes as long as the memory it fills.

    value and loc ``(..., d)``, scale of the same shape or ``(d,)``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        standardised = (value - loc) / scale
        return torch.addcmul(-_HALF_LOG_2PI - scale.log(), standardised, standardised, value=-0.5)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        value, loc, scale = ctx.saved_tensors
        standardised = (value - loc) / scale
        of_loc = gradients[0] * standardised / scale
        of_scale = None
        if ctx.needs_input_grad[2]:
            terms, own = of_loc * standardised, gradients[0]
            over = tuple(range(terms.dim() - scale.dim()))
            if over:
                terms, own = terms.sum(over), own.sum(over)
            of_scale = terms - own / scale
        return (-of_loc if ctx.needs_input_grad[0] else None), of_loc, of_scale


def normal(loc: Tensor, scale: Tensor) -> Independent:
    """N(loc, diag scale^2): loc ``(..., d)``, scale ``(d,)`` or ``(..., d)``, event ``(d,)``."""
    return _Diagonal(loc, scale).to_event(1)


def _series(a: Tensor) -> Tensor:
    """Stirling's series: `_remainder` to 1e-11 for a >= 8 (Abramowitz & Stegun 6.1.41)."""
    inverse = 1 / a
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))


_AT_EDGE = float(_series(torch.tensor(_SERIES_FROM, dtype=torch.float64)))


def _remainder(a: Tensor) -> Tensor:
    """R(a) = log Gamma(a) - [(a - 1/2) log a - a + log(2 pi) / 2], a > 0: what Stirling's formula leaves."""
    edge = a.new_tensor(_SERIES_FROM)  # one of the two parts is constant on either side of it
    few, many = torch.minimum(a, edge), torch.maximum(a, edge)
    return torch.lgamma(few) - (few - 0.5) * few.log() + few + (_series(many) - (_HALF_LOG_2PI + _AT_EDGE))


def _remainder_slope(a: Tensor) -> Tensor:
    """Derivative of `_remainder`."""
    edge = a.new_tensor(_SERIES_FROM)
    few, many = torch.minimum(a, edge), torch.maximum(a, edge)
    square = 1 / (many * many)
    series = -square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)))
    return torch.where(a < edge, torch.digamma(few) - few.log() + 0.5 / few, series)


class _Kernel(torch.autograd.Function):
    """R(x + theta) - log(1 + x / theta) / 2 - D: the terms of log p that mix x with mu and theta, and their gradients.

    The deviance D = x log(x / mu) + (x + theta) log((theta + mu) / (theta + x)) is 0 at x = mu. It is written with
    logarithms of numbers above 1, each as log1p of how far above: no digit is lost whether x and mu are close or far
    apart, theta tiny or huge.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_mean: Tensor, log_theta: Tensor, x: Tensor) -> Tensor:
        mu, theta = log_mean.exp(), log_theta.exp()
        gap = mu - x
        distance, larger = gap.abs(), torch.maximum(mu, x)
        smaller = torch.minimum(mu, x).clamp(min=math.exp(_LOG_TINY))
        deviance = theta * torch.log1p(distance / (theta + smaller))
        deviance = deviance - x * torch.log1p(theta * distance / (smaller * (theta + larger)))
        return _remainder(theta + x) - 0.5 * torch.log1p(x / theta) - gap.sign() * deviance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        log_mean, log_theta, x = ctx.saved_tensors
        mu, theta = log_mean.exp(), log_theta.exp()
        gap, seen, expected = mu - x, theta + x, theta + mu
        share = gap / expected
        log_ratio = gap.sign() * torch.log1p(gap.abs() / torch.minimum(seen, expected))  # log(expected / seen)
        slope = _remainder_slope(seen) + 0.5 * x / (theta * seen) + (share - log_ratio)
        scaled = gradients[0] * theta
        return -scaled * share, scaled * slope, None


class NegativeBinomial(TorchDistribution):  # type: ignore[misc]
    """NB(mu, theta): mean mu, variance mu + mu^2 / theta; tends to Poisson(mu) as theta grows.

    log p(x) = lgamma(x + theta) - lgamma(theta) - lgamma(x + 1)
               + theta log(theta / (theta + mu)) + x log(mu / (theta + mu))

    Taken as written its terms are of size x log x, and in float32 their sum loses its digits from a few thousand counts
    on. Here Stirling's formula is taken out of each log-gamma and what remains is put together as a deviance (Loader
    2000, "Fast and accurate computation of binomial probabilities"): the error is below 1e-5 relative or 1e-4 absolute
    for theta from 1e-8 to 1e12, mu from 1e-8 to 1e8 and x up to 1e6.

    Args:
        log_mean: ``(...)`` log mu.
        log_dispersion: ``(...)`` log theta, the inverse dispersion.
        large: positions of the genes that may have counts of `TABLE` or more; None to look at the counts each time.
    """

    arg_constraints = {"log_mean": constraints.real, "log_dispersion": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer
    has_rsample = False

    def __init__(
        self,
        log_mean: Tensor,
        log_dispersion: Tensor,
        validate_args: bool | None = None,
        large: Tensor | None = None,
    ) -> None:
        self.log_mean, self.log_dispersion, self.large = log_mean, log_dispersion, large
        super().__init__(torch.broadcast_shapes(log_mean.shape, log_dispersion.shape), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "NegativeBinomial":
        """The same distribution with a larger batch shape."""
        new: NegativeBinomial = self._get_checked_instance(NegativeBinomial, _instance)
        shape = torch.Size(batch_shape)
        new.log_mean, new.log_dispersion, new.large = self.log_mean.expand(shape), self.log_dispersion, self.large
        super(NegativeBinomial, new).__init__(shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Mu."""
        return self.log_mean.exp().expand(self.batch_shape)

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
        constant = _remainder(log_theta.exp())
        value = value.expand(torch.broadcast_shapes(self.batch_shape, value.shape))
        by_gene = log_theta.dim() == 1 and value.dim() > 1 and value.shape[-1] == log_theta.shape[0]
        enough = by_gene and value.shape[-2] >= _ENOUGH
        if enough and self.large is not None:
            found = _small_counts(log_mean, log_theta, value.clamp(max=TABLE - 1))
            if not len(self.large):
                return found
            given = (v.index_select(-1, self.large) for v in (log_mean.expand_as(found), log_theta, constant, value))
            return found.index_copy(-1, self.large, _log_prob(*given))
        large = _large(value) if enough else None
        if large is None:
            return _log_prob(log_mean, log_theta, constant, value)
        found = _small_counts(log_mean, log_theta, value.clamp(max=TABLE - 1))
        if not len(large[0]):
            return found
        given = (v.expand(found.shape)[large] for v in (log_mean, log_theta, constant, value))
        return torch.index_put(found, large, _log_prob(*given))


class TwoNegativeBinomials(TorchDistribution):  # type: ignore[misc]
    """pi NB(mu_b, theta) + (1 - pi) NB(mu_f, theta), pi = sigmoid(logit).

    Args:
        background: ``(...)`` log mu_b.
        foreground: ``(...)`` log mu_f.
        logits: ``(...)`` of pi.
        log_dispersion: ``(...)`` log theta.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer
    has_rsample = False

    def __init__(
        self,
        background: Tensor,
        foreground: Tensor,
        logits: Tensor,
        log_dispersion: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        given = torch.broadcast_tensors(background, foreground, logits, log_dispersion)
        self.background, self.foreground, self.logits, self.log_dispersion = given
        super().__init__(self.logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "TwoNegativeBinomials":
        """The same distribution with a larger batch shape."""
        shape = torch.Size(batch_shape)
        background, foreground = self.background.expand(shape), self.foreground.expand(shape)
        logits, theta = self.logits.expand(shape), self.log_dispersion.expand(shape)
        return TwoNegativeBinomials(background, foreground, logits, theta, self._validate_args)

    @property
    def parts(self) -> tuple[NegativeBinomial, NegativeBinomial]:
        """Background and foreground."""
        theta = self.log_dispersion
        return (
            NegativeBinomial(self.background, theta, validate_args=False),
            NegativeBinomial(self.foreground, theta, validate_args=False),
        )

    @property
    def mean(self) -> Tensor:
        """Pi mu_b + (1 - pi) mu_f."""
        return torch.lerp(self.foreground.exp(), self.background.exp(), torch.sigmoid(self.logits))

    @property
    def variance(self) -> Tensor:
        """Of the mixture."""
        share = torch.sigmoid(self.logits)
        moments = [part.variance + part.mean.square() for part in self.parts]
        return torch.lerp(moments[1], moments[0], share) - self.mean.square()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            share = torch.sigmoid(self.logits).expand(self._extended_shape(shape))
            background, foreground = (part.sample(shape) for part in self.parts)
            return torch.where(torch.bernoulli(share) > 0, background, foreground)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts, of the batch's shape."""
        if self._validate_args:
            self._validate_sample(value)
        background, foreground = (part.log_prob(value) for part in self.parts)
        log_in, log_out = logsigmoid(self.logits), logsigmoid(-self.logits)
        return torch.logaddexp(log_in + background, log_out + foreground)


def _large(value: Tensor) -> tuple[Tensor, ...] | None:
    """Where counts are beyond the tables; None where that cannot be known, under `torch.func.vmap`."""
    try:
        return (value >= TABLE).nonzero(as_tuple=True)
    except RuntimeError:
        return None


def _small_counts(log_mean: Tensor, log_theta: Tensor, x: Tensor) -> Tensor:
    """log p of counts below `TABLE`, many cells with one theta a gene.

    lgamma(x + theta) - lgamma(theta) - x log(theta) = sum over j < x of log1p(j / theta) is looked up in a table of a
    row a count, and so is log x!: no log-gamma is evaluated for a cell.
    """
    theta = log_theta.exp()
    steps = torch.arange(TABLE - 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
    table = torch.cat((torch.zeros_like(theta).unsqueeze(0), torch.log1p(steps / theta).cumsum(0)))
    counts = torch.arange(TABLE, dtype=torch.float64, device=x.device)
    factorial = torch.lgamma(counts + 1).to(x.dtype)
    index = x.long()
    rising = torch.gather(table, 0, index.reshape(-1, index.shape[-1])).reshape(index.shape)
    odds = softplus(log_mean - log_theta)
    return rising - factorial[index] + x * log_mean - (x + theta) * odds


def _log_prob(log_mean: Tensor, log_theta: Tensor, constant: Tensor, x: Tensor) -> Tensor:
    """log p(x) of any count; constant = R(theta)."""
    kernel: Tensor = _Kernel.apply(*torch.broadcast_tensors(log_mean.clamp(min=_LOG_TINY), log_theta, x))
    # log x! - x log x + x - log(2 pi) / 2 + 1; the clamp is for 0 log 0 = 0
    factorial = _remainder(x + 1) + 0.5 * x.log1p() + x * torch.log1p(1 / x.clamp(min=1e-20))
    tiny = x * (log_mean - _LOG_TINY).clamp(max=0)
    return kernel - constant - (factorial + (_HALF_LOG_2PI - 1)) + tiny
