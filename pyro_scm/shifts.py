"""Shifts added to the noise z by an environment: z + shift(e) enters the causal layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.batch import Batch
from pyro_scm.errors import ModelError
from pyro_scm.priors import SparseSoftmax, Sparsifier

__all__ = ["EnvironmentShift", "LinearShift", "mover"]


class EnvironmentShift(nn.Module):
    """shift(e) = s(mu(r_e)) with a sparsifier s; 0 in a reference environment (seed section 4.8).

    Args:
        net: r ``(R, F)`` -> ``(R, d)``.
        sparsifier: of mu.
    """

    def __init__(self, net: nn.Module, sparsifier: Sparsifier | None = None) -> None:
        super().__init__()
        self.net = net
        self.sparsifier: nn.Module = sparsifier if sparsifier is not None else SparseSoftmax()

    def moments(self, r: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and unit scale of environments r ``(R, F)``: two tensors ``(R, d)``, as `EnvironmentPrior.moments`."""
        loc = self.sparsifier(self.net(r).to(r.dtype) * perturbed.unsqueeze(-1))
        return loc, torch.ones_like(loc)

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        return F.embedding(batch.row, self.moments(batch.r, batch.perturbed)[0])


class LinearShift(nn.Module):
    """shift(e) = r_e V: each perturbation moves the latents by its own vector, combinations add (CPA, linear dosers).

    Args:
        features: F.
        latent: d.
    """

    def __init__(self, features: int, latent: int) -> None:
        super().__init__()
        self.effects = nn.Parameter(torch.empty(features, latent))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal vectors."""
        nn.init.normal_(self.effects, std=0.1)

    def moments(self, r: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and unit scale of environments r ``(R, F)``."""
        loc = (r * perturbed.unsqueeze(-1)) @ self.effects
        return loc, torch.ones_like(loc)

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        return F.embedding(batch.row, self.moments(batch.r, batch.perturbed)[0])


def mover(model: Any) -> Any:
    """The part of a model by which its environments move the latents: its shift, else its prior.

    Its `moments` maps r ``(R, F)`` and ``(R,)`` whether perturbed to the mean and scale ``(R, d)`` of the noise.

    Raises:
        ModelError: a model whose environments move nothing.
    """
    for part in (getattr(model, "shift", None), getattr(model, "prior", None)):
        if hasattr(part, "moments"):
            return part
    raise ModelError("this model's environments move no latents: use environment_vae or translation_vae")
