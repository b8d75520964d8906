"""Free variational parameters for latent sites outside the plate ``data``."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.constraints import real
from torch.nn import functional as F

from pyro_scm.errors import ModelError

__all__ = ["MeanField", "Standard"]


class MeanField(nn.Module):
    """q(theta) = T(N(loc, scale^2)), T the bijection from the reals to the site's support.

    Args:
        site: the model's distribution at this site, for its support and shape.
        scale: initial standard deviation.

    Raises:
        ModelError: a discrete site.
    """

    def __init__(self, site: Any, scale: float = 0.1) -> None:
        super().__init__()
        if site.support.is_discrete:
            raise ModelError(
                f"a site with distribution {type(site).__name__} is discrete: write its guide, or marginalise it"
            )
        self.transform = biject_to(site.support)
        self.event_dim, self.initial = site.event_dim, scale
        self.plain = site.support is real or getattr(site.support, "base_constraint", None) is real
        shape = self.transform.inverse_shape(site.batch_shape + site.event_shape)
        self.loc = nn.Parameter(torch.empty(shape))
        self.raw_scale = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Near zero, narrow."""
        with torch.no_grad():
            self.loc.normal_(std=0.01)
            self.raw_scale.fill_(float(torch.tensor(self.initial).expm1().log()))

    def forward(self) -> dist.TorchDistribution:
        """The variational distribution, of the site's shape."""
        base = dist.Normal(self.loc, _positive(self.raw_scale))
        if self.plain:
            return base.to_event(self.event_dim)
        transformed = dist.TransformedDistribution(base, [self.transform])
        return transformed.to_event(self.event_dim - transformed.event_dim)


def _positive(raw: Tensor) -> Tensor:
    return 1e-4 + F.softplus(raw)


class Standard(nn.Module):
    """q = N(0, I): for noise outside the plate that is drawn anew, which no observation tells anything of.

    Args:
        shape: of the noise, all of it event.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(shape), persistent=False)

    def forward(self) -> dist.Independent:
        """Normal of this event shape."""
        return dist.Normal(self.zero, torch.ones_like(self.zero)).to_event(self.zero.dim())
