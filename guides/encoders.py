"""Encoders: q(z | x, r_e) of the latent sites inside the plate ``data``."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.batch import Batch, Schema
from pyro_scm.distributions import normal
from pyro_scm.errors import ModelError
from pyro_scm.nn import FiLM, Joint

__all__ = ["CONDITIONINGS", "Fresh", "GaussianEncoder", "PointEncoder"]

CONDITIONINGS = ("concatenate", "film")

# Beyond this many standard deviations an input says no more to an encoder than "extreme": unseen strong signatures
# would otherwise drive it far outside what it was trained on.
_CLAMP = 10.0


class _Encoder(nn.Module):
    """Network from cells to the parameters of q."""

    def __init__(
        self,
        schema: Schema,
        outputs: int,
        inputs: Sequence[str] = ("x", "e"),
        hidden: Sequence[int] = (128,),
        conditioning: str = "concatenate",
    ) -> None:
        super().__init__()
        sizes = {"x": len(schema.genes), "e": len(schema.features)}
        sizes |= {name: len(values) for name, values in schema.covariates.items()}
        unknown = [name for name in inputs if name not in sizes]
        if unknown or "x" not in inputs:
            raise ModelError(f"guide inputs {tuple(inputs)}: give 'x' and any of {sorted(set(sizes) - {'x'})}")
        if conditioning not in CONDITIONINGS:
            raise ModelError(f"unknown conditioning {conditioning!r}: use one of {', '.join(CONDITIONINGS)}")
        self.inputs, self.counts = tuple(inputs), schema.counts
        self.sizes = sizes
        statistics = schema.summary
        self.mean: Tensor
        self.spread: Tensor
        self.depth: Tensor
        self.register_buffer("mean", statistics.mean.clone())
        self.register_buffer("spread", statistics.scale.clone())
        self.register_buffer("depth", torch.tensor(statistics.depth))
        self.film = conditioning == "film" and len(self.inputs) > 1
        self.others = [name for name in self.inputs if name != "x"]
        widths = [sizes[name] for name in self.others]
        self.net: nn.Module = (
            FiLM(sizes["x"], sum(widths), hidden, outputs)
            if self.film
            else Joint([sizes["x"], *widths], hidden, outputs)
        )

    def _expression(self, batch: Batch) -> Tensor:
        """``(n, G)`` log-normalised where x holds counts, in standard deviations of the training cells."""
        if batch.x is None:
            raise ModelError("the guide was given cells without expression: it infers z from x, so give observed cells")
        x = batch.x
        if self.counts and batch.size is not None:
            x = torch.log1p(x * (self.depth / batch.size).unsqueeze(-1))
        return ((x - self.mean) / self.spread).clamp(-_CLAMP, _CLAMP)

    def _condition(self, name: str, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """An input other than x, and each cell's row of it where it holds one row an environment."""
        if name == "e":
            return batch.r, batch.row
        return F.one_hot(batch.covariates[name], self.sizes[name]).to(self.mean), None

    def _encode(self, batch: Batch) -> Tensor:
        x, conditions = self._expression(batch), [self._condition(name, batch) for name in self.others]
        if not self.film:
            out = self.net(x, *(value for value, _ in conditions), rows=[None, *(row for _, row in conditions)])
        elif len(conditions) == 1:
            out = self.net(x, *conditions[0])
        else:
            out = self.net(x, torch.cat([v if row is None else v[row] for v, row in conditions], -1))
        result: Tensor = out.to(self.mean.dtype)  # under autocast networks run in bfloat16, densities never do
        return result


class GaussianEncoder(_Encoder):
    """q(z | x, r_e) = N(mu(x, r_e), diag sigma(x, r_e)^2); sigma = softplus + floor, never an unbounded exponential.

    Args:
        schema: of the training cells.
        size: d.
        inputs: ``"x"`` and any of ``"e"`` and the names of covariates.
        hidden: widths of the hidden layers.
        conditioning: how the inputs other than x enter: ``"concatenate"`` or ``"film"``.
        floor: smallest sigma.

    Raises:
        ModelError: unknown inputs or conditioning.
    """

    def __init__(
        self,
        schema: Schema,
        size: int,
        inputs: Sequence[str] = ("x", "e"),
        hidden: Sequence[int] = (128,),
        conditioning: str = "concatenate",
        floor: float = 1e-3,
    ) -> None:
        super().__init__(schema, 2 * size, inputs, hidden, conditioning)
        self.floor = floor

    def forward(self, batch: Batch) -> dist.Independent:
        """Normal of batch shape (n,), event shape (d,)."""
        loc, raw = self._encode(batch).chunk(2, -1)
        return normal(loc, self.floor + F.softplus(raw))


class PointEncoder(_Encoder):
    """q(z | x, r_e) = Delta(f(x, r_e)): an autoencoder's encoder. Arguments as `GaussianEncoder`, without a floor."""

    def __init__(
        self,
        schema: Schema,
        size: int,
        inputs: Sequence[str] = ("x",),
        hidden: Sequence[int] = (128,),
        conditioning: str = "concatenate",
    ) -> None:
        super().__init__(schema, size, inputs, hidden, conditioning)

    def forward(self, batch: Batch) -> dist.Delta:
        """Delta of batch shape (n,), event shape (d,)."""
        return dist.Delta(self._encode(batch), event_dim=1)


class Fresh(nn.Module):
    """q = N(0, I), whatever the cell: for noise that is drawn anew, which no observation tells anything of.

    Args:
        size: of the noise.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(size), persistent=False)

    def forward(self, batch: Batch) -> dist.Independent:
        """Normal of batch shape (n,), event shape (size,)."""
        loc = self.zero.expand(len(batch), -1)
        return normal(loc, torch.ones_like(loc))
