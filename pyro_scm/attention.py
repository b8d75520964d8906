"""Attention of an environment to the latents that it moves, and the prior of a model that learns it by an adversary."""

from collections.abc import Sequence

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.batch import Batch, Schema
from pyro_scm.composition import Columns
from pyro_scm.distributions import normal
from pyro_scm.nn import mlp
from pyro_scm.priors import SparseSoftmax
from pyro_scm.sites import DATA

__all__ = ["ALPHA", "EPSILON", "Attention", "AttentivePrior", "TargetedShift", "counterfactual_code"]

ALPHA = "alpha"
"""Attention of each cell's environment, a deterministic site, batch (n,), event (d,)."""

EPSILON = "epsilon"
"""Fresh standard noise that takes the place of attended latents, batch (n,), event (d,)."""


class _Gate(SparseSoftmax):
    """v -> softmax(v / T), whose T a schedule of the training sets as it does those of sparse priors."""

    def forward(self, v: Tensor) -> Tensor:
        """v ``(..., d)`` -> ``(..., d)``, of sum 1."""
        return torch.softmax(v / self.temperature, -1)


class Attention(nn.Module):
    """alpha(e) = softmax(A(r_e) / T): non-negative, of sum 1 over the latents (seed section 4.10).

    Args:
        net: A, r ``(R, F)`` -> ``(R, d)``.
        temperature: T; the lower, the nearer to one latent. `fit(..., temperature=...)` may schedule it.
    """

    def __init__(self, net: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.net, self.gate = net, _Gate(temperature)

    def forward(self, r: Tensor) -> Tensor:
        """r ``(R, F)`` -> ``(R, d)``."""
        alpha: Tensor = self.gate(self.net(r).to(r.dtype))
        return alpha

    def of_cells(self, batch: Batch) -> Tensor:
        """``(n, d)``, each environment's attention computed once."""
        return F.embedding(batch.row, self(batch.r))


class AttentivePrior(nn.Module):
    """A prior of z, with the attention of each environment beside it: sites ``alpha`` and ``epsilon`` ~ N(0, I).

    Neither changes the law of z or x: they are what an adversary needs to make the counterfactual code. The noise is
    drawn by the guide as it is here, so its KL is 0.

    Args:
        prior: of z.
        attention: of the environments.
    """

    def __init__(self, prior: nn.Module, attention: Attention) -> None:
        super().__init__()
        self.prior, self.attention = prior, attention
        self.latent = int(prior.latent)  # type: ignore[arg-type]

    def forward(self, batch: Batch) -> object:
        """The law of z; batch shape (n,), event shape (d,)."""
        alpha = self.attention.of_cells(batch)
        with poutine.block(hide=[DATA]):  # the model opens the plate for itself, and Pyro takes each name once
            plate = batch.plate()
        with plate:
            pyro.deterministic(ALPHA, alpha, event_dim=1)
            pyro.sample(EPSILON, normal(torch.zeros_like(alpha), torch.ones_like(alpha)), infer={"fresh": True})
        return self.prior(batch)


class TargetedShift(nn.Module):
    """shift(e) = sum_m a_em size_m softmax(A(m) / T): every perturbation moves mostly one latent (discrepancy-VAE).

    Where the representation names perturbations, A and size are a network of the name, and combinations add; else of
    the whole representation, as of one perturbation.

    Args:
        schema: of the training cells; amounts a as `composition.Columns` finds them.
        latent: d.
        hidden: widths of the network's hidden layers.
        temperature: T; `fit(..., temperature=...)` may schedule it.
    """

    def __init__(self, schema: Schema, latent: int, hidden: Sequence[int] = (128,), temperature: float = 1.0) -> None:
        super().__init__()
        columns = Columns.of(schema)
        names = columns.amounts if columns.perturbations else []
        self.named, self.latent = bool(names), latent
        self.positions: Tensor
        self.names: Tensor
        self.register_buffer("positions", torch.tensor(names, dtype=torch.int64), persistent=False)
        self.register_buffer("names", torch.eye(len(names)), persistent=False)
        self.net, self.gate = mlp(len(names) or len(schema.features), hidden, latent + 1), _Gate(temperature)

    def moments(self, r: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and unit scale of environments r ``(R, F)``: two tensors ``(R, d)``."""
        out = self.net(self.names if self.named else r).to(r.dtype)
        each = self.gate(out[..., : self.latent]) * out[..., self.latent :]
        loc = (r.index_select(-1, self.positions) @ each if self.named else each) * perturbed.unsqueeze(-1)
        return loc, torch.ones_like(loc)

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        return F.embedding(batch.row, self.moments(batch.r, batch.perturbed)[0])


def counterfactual_code(z: Tensor, epsilon: Tensor, alpha: Tensor) -> Tensor:
    """z_count = alpha * epsilon + (1 - alpha) * z, each ``(..., d)``."""
    return torch.lerp(z, epsilon, alpha)
