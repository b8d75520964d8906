"""Likelihoods p(x | c): the invariant mechanism from causal variables to genes."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.batch import Batch, Schema
from pyro_scm.distributions import NegativeBinomial, TwoNegativeBinomials, normal
from pyro_scm.errors import ModelError
from pyro_scm.sites import X, Y

__all__ = [
    "LOG_BACKGROUND",
    "Gaussian",
    "GaussianFixed",
    "GaussianPerCell",
    "Likelihood",
    "NegativeBinomialLikelihood",
    "ProteinMixture",
    "StudentT",
    "likelihood_for",
    "outputs_of",
]

LOG_BACKGROUND = "log_background"
"""Log of the mean count of unbound antibody, batch (n,), event (P,)."""

# log theta is kept within these bounds by a smooth clamp: Poisson beyond the upper one, all-zero beyond the lower
_LOG_DISPERSION_BOUND = 8.0
_LOG_BACKGROUND_BOUND = 10.0
_SMALLEST_SPREAD = 0.1
_UNIT_SCALE = 0.5413  # softplus^-1(1)


class Likelihood(nn.Module):
    """Abstract: a decoder network and the distribution around its output.

    Args:
        net: c ``(..., d)``, or (c, r_e) ``(..., d + F)`` if `conditional`, -> ``(..., G)``.
        schema: of the training cells.
        conditional: whether the decoder also reads the environment (Conditional VAE only: it breaks x independent of
            e given c).
    """

    site = X

    def __init__(self, net: nn.Module, schema: Schema, conditional: bool = False) -> None:
        super().__init__()
        self.net, self.conditional = net, conditional
        self.genes = len(schema.genes)
        statistics = schema.summary
        self.centre: Tensor
        self.spread: Tensor
        self.register_buffer("centre", statistics.mean.clone())
        self.register_buffer("spread", statistics.scale.clone())

    def decode(self, c: Tensor, batch: Batch) -> Tensor:
        """The network's output ``(..., G)``."""
        if self.conditional:
            e = batch.e
            c = torch.cat((c, e.expand(*c.shape[:-1], e.shape[-1])), -1)
        out: Tensor = self.net(c)
        return out.to(self.centre.dtype)

    def distribution(self, c: Tensor, batch: Batch) -> Any:
        """p(x | c) of event shape (G,)."""
        raise NotImplementedError  # abstract

    def mean(self, c: Tensor, batch: Batch) -> Tensor:
        """E[x | c] ``(..., G)`` in the data's own units."""
        result: Tensor = self.distribution(c, batch).mean
        return result

    def forward(self, c: Tensor, batch: Batch) -> Tensor:
        """The Pyro program: site ``x``."""
        result: Tensor = pyro.sample(self.site, self.distribution(c, batch), obs=batch.x)
        return result


class _Located(Likelihood):
    """x around a location that is the decoder's output in standardised units."""

    def __init__(self, net: nn.Module, schema: Schema, conditional: bool = False, floor: float = 0.05) -> None:
        super().__init__(net, schema, conditional)
        if schema.counts:
            raise ModelError(
                f"{type(self).__name__} is a likelihood of continuous values and the data hold counts: "
                "use NegativeBinomialLikelihood, or log-normalise the data"
            )
        self.floor = floor
        self.raw_scale = nn.Parameter(torch.zeros(self.genes))

    def reset_parameters(self) -> None:
        """Scale 1 in units of each gene's standard deviation."""
        with torch.no_grad():
            self.raw_scale.fill_(_UNIT_SCALE)

    def location(self, c: Tensor, batch: Batch) -> Tensor:
        """``(..., G)`` in the data's units."""
        return torch.addcmul(self.centre, self.spread, self.decode(c, batch))

    @property
    def scale(self) -> Tensor:
        """``(G,)``, never below `floor` standard deviations of the gene: unbounded scales let losses explode."""
        return self.spread * (self.floor + F.softplus(self.raw_scale))


class Gaussian(_Located):
    """x_g ~ N(mu_g(c), sigma_g^2), sigma_g learnt and bounded below.

    Args:
        net: see `Likelihood`.
        schema: of the training cells.
        conditional: see `Likelihood`.
        floor: smallest sigma_g, in standard deviations of gene g.
    """

    def distribution(self, c: Tensor, batch: Batch) -> dist.Independent:
        """Normal, event shape (G,)."""
        loc = self.location(c, batch)
        return normal(loc, self.scale)


class GaussianFixed(_Located):
    """x_g ~ N(mu_g(c), sigma^2) with one fixed sigma: the seed's squared error is sigma^2 = 1/2.

    Args:
        net: see `Likelihood`.
        schema: of the training cells.
        sigma: in the data's units.
        conditional: see `Likelihood`.
    """

    def __init__(self, net: nn.Module, schema: Schema, sigma: float = 0.5**0.5, conditional: bool = False) -> None:
        super().__init__(net, schema, conditional)
        del self.raw_scale
        self.sigma = sigma

    def reset_parameters(self) -> None:
        """Nothing of its own to draw."""

    def distribution(self, c: Tensor, batch: Batch) -> dist.Independent:
        """Normal, event shape (G,)."""
        loc = self.location(c, batch)
        return normal(loc, torch.full_like(loc, self.sigma))


class GaussianPerCell(_Located):
    """x_g ~ N(mu_g(c), sigma_g(c)^2): the decoder gives each cell's variances too (CPA).

    Args:
        net: c ``(..., d)`` -> ``(..., 2 G)``: locations, then raw scales; see `Likelihood`.
        schema: of the training cells.
        conditional: see `Likelihood`.
        floor: smallest sigma_g(c), in standard deviations of gene g.
    """

    def __init__(self, net: nn.Module, schema: Schema, conditional: bool = False, floor: float = 0.05) -> None:
        super().__init__(net, schema, conditional, floor)
        del self.raw_scale

    def reset_parameters(self) -> None:
        """Nothing of its own to draw."""

    def distribution(self, c: Tensor, batch: Batch) -> dist.Independent:
        """Normal, event shape (G,)."""
        loc, raw = self.decode(c, batch).chunk(2, -1)
        return normal(
            torch.addcmul(self.centre, self.spread, loc), self.spread * (self.floor + F.softplus(raw + _UNIT_SCALE))
        )


class StudentT(_Located):
    """x_g ~ t_nu(mu_g(c), sigma_g): one wild gene weighs log as much as it would under a Normal.

    Args:
        net: see `Likelihood`.
        schema: of the training cells.
        conditional: see `Likelihood`.
        floor: smallest sigma_g, in standard deviations of gene g.
        freedom: nu; above 2, so that mean and variance exist.
    """

    def __init__(
        self, net: nn.Module, schema: Schema, conditional: bool = False, floor: float = 0.05, freedom: float = 5.0
    ) -> None:
        super().__init__(net, schema, conditional, floor)
        if not freedom > 2:
            raise ModelError(f"{freedom} degrees of freedom: give more than 2, so that the variance exists")
        self.freedom = freedom

    def distribution(self, c: Tensor, batch: Batch) -> dist.Independent:
        """Student-t, event shape (G,)."""
        loc = self.location(c, batch)
        return dist.StudentT(loc.new_tensor(self.freedom).expand_as(loc), loc, self.scale.expand_as(loc)).to_event(1)


class NegativeBinomialLikelihood(Likelihood):
    """x_g ~ NB(mean = size * softmax_g(net(c)), inverse dispersion theta_g).

    Where a batch has no library size (a simulated world) the training cells' median is used: library size is affected
    by toxic treatments and is not part of what an intervention asks about.

    Args:
        net: see `Likelihood`.
        schema: of the training cells.
        conditional: see `Likelihood`.
    """

    def __init__(self, net: nn.Module, schema: Schema, conditional: bool = False) -> None:
        super().__init__(net, schema, conditional)
        if not schema.counts:
            raise ModelError(
                "NegativeBinomialLikelihood needs counts and the data are continuous: use Gaussian or StudentT, "
                "or name the layer of raw counts"
            )
        statistics = schema.summary
        self.log_proportion: Tensor
        self.log_depth: Tensor
        self.register_buffer("log_proportion", statistics.proportion.clamp(min=1e-12).log())
        self.register_buffer("log_depth", torch.tensor(statistics.depth).log())
        self.raw_dispersion = nn.Parameter(torch.zeros(self.genes))

    def reset_parameters(self) -> None:
        """Theta = e for every gene."""
        with torch.no_grad():
            self.raw_dispersion.fill_(1.0)

    def log_mean(self, c: Tensor, batch: Batch) -> Tensor:
        """``(..., G)`` log expected counts."""
        size = self.log_depth if batch.size is None else batch.size.log().unsqueeze(-1)
        return torch.log_softmax(self.log_proportion + self.decode(c, batch), -1) + size

    def distribution(self, c: Tensor, batch: Batch) -> dist.Independent:
        """Negative binomial, event shape (G,)."""
        bound = _LOG_DISPERSION_BOUND
        log_dispersion = bound * torch.tanh(self.raw_dispersion / bound)
        return NegativeBinomial(self.log_mean(c, batch), log_dispersion, large=batch.large).to_event(1)


class ProteinMixture(Likelihood):
    """y_p ~ pi NB(mu_b, theta_p) + (1 - pi) NB(mu_f, theta_p): surface proteins, background and foreground.

    Background mu_b ~ LogNormal, the cell's and protein's own; foreground mu_f = mu_b (1 + softplus(net(c))); pi =
    sigmoid(net(c)). Proteins that were not measured in a cell (NaN) do not count. The site ``log_background`` is log
    mu_b relative to the protein's level in training cells (`Statistics.log_background`): proteins differ a hundredfold
    in their counts, and a background that starts at one count for all takes thousands of steps to get there.

    Args:
        net: c ``(..., d)`` -> ``(..., 2 P)``: foreground, then logits of pi.
        schema: of the training cells.

    Raises:
        ModelError: cells without proteins.

    Source: Gayoso et al., totalVI, Nat. Methods 2021; MultiCPA (Inecik et al., 2022).
    """

    site = Y

    def __init__(self, net: nn.Module, schema: Schema) -> None:
        super().__init__(net, schema)
        if not schema.proteins:
            raise ModelError("the cells have no proteins: name the obsm entry that holds them (proteins=KEY)")
        self.prior_loc, self.prior_scale, self.raw_dispersion = (
            nn.Parameter(torch.empty(len(schema.proteins))) for _ in range(3)
        )
        self.level: Tensor
        level = schema.summary.log_background
        self.register_buffer("level", torch.ones(len(schema.proteins)) if level is None else level.clone())

    def reset_parameters(self) -> None:
        """Background within a factor of e of the protein's level; theta = e."""
        with torch.no_grad():
            self.prior_loc.zero_()
            self.prior_scale.fill_(_UNIT_SCALE)
            self.raw_dispersion.fill_(1.0)

    def background(self, cells: int) -> dist.Independent:
        """Log mu_b of cells relative to each protein's level, a priori."""
        loc = self.prior_loc.expand(cells, -1)
        return normal(loc, (_SMALLEST_SPREAD + F.softplus(self.prior_scale)).expand_as(loc))

    def mixture(self, c: Tensor, batch: Batch, log_background: Tensor) -> TwoNegativeBinomials:
        """p(y | c, background) of each protein."""
        raw, logits = self.decode(c, batch).chunk(2, -1)
        bound = _LOG_DISPERSION_BOUND
        background = self.level + _LOG_BACKGROUND_BOUND * torch.tanh(log_background / _LOG_BACKGROUND_BOUND)
        foreground = background + torch.log1p(F.softplus(raw))
        return TwoNegativeBinomials(background, foreground, logits, bound * torch.tanh(self.raw_dispersion / bound))

    def forward(self, c: Tensor, batch: Batch) -> Tensor:
        """The Pyro program: sites ``log_background`` and ``y``."""
        background = pyro.sample(LOG_BACKGROUND, self.background(len(batch)))
        law, seen = self.mixture(c, batch, background), batch.y
        if seen is not None:
            law, seen = law.mask(~seen.isnan()), seen.nan_to_num()
        result: Tensor = pyro.sample(self.site, law.to_event(1), obs=seen)
        return result


def likelihood_for(schema: Schema, net: nn.Module, conditional: bool = False, kind: str | None = None) -> Likelihood:
    """The likelihood of a kind.

    Kinds: ``"normal"``, ``"normal-fixed"``, ``"normal-per-cell"``, ``"student-t"`` or ``"negative-binomial"``.

    Args:
        schema: of the training cells.
        net: the decoder, of `outputs_of` outputs.
        conditional: whether the decoder reads the environment.
        kind: by default negative binomial for counts, else Normal.

    Raises:
        ModelError: an unknown kind, or one that does not fit the data.
    """
    result: Likelihood = _KINDS[_named(schema, kind)](net, schema, conditional=conditional)
    return result


def outputs_of(schema: Schema, kind: str | None = None) -> int:
    """Length of what a decoder must give to the likelihood of a kind.

    Raises:
        ModelError: an unknown kind.
    """
    return len(schema.genes) * (2 if _named(schema, kind) == "normal-per-cell" else 1)


_KINDS = {
    "normal": Gaussian,
    "normal-fixed": GaussianFixed,
    "normal-per-cell": GaussianPerCell,
    "student-t": StudentT,
    "negative-binomial": NegativeBinomialLikelihood,
}


def _named(schema: Schema, kind: str | None) -> str:
    name = kind or ("negative-binomial" if schema.counts else "normal")
    if name not in _KINDS:
        raise ModelError(f"unknown likelihood {name!r}: use one of {', '.join(_KINDS)}")
    return name
