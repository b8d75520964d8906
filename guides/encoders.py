"""Encoders: q(z | x, r_e) of the latent sites inside the plate ``data``."""

from collections.abc import Sequence
from dataclasses import replace

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.batch import Batch, Schema
from pyro_scm.distributions import normal
from pyro_scm.errors import ModelError
from pyro_scm.nn import FiLM, Joint

__all__ = ["CONDITIONINGS", "Fresh", "GaussianEncoder", "PointEncoder", "ProductEncoder", "ReferenceEncoder"]

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
        if schema.proteins:
            sizes["y"] = len(schema.proteins) + 1  # and whether they were measured
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
        self.doses: Tensor | None
        marked = [float(i in schema.doses) for i in range(len(schema.features))]
        self.register_buffer("doses", torch.tensor(marked) if schema.doses and "e" in self.inputs else None)
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
            if "y" in self.inputs and batch.y is not None:
                return self.mean.new_zeros(len(batch), self.sizes["x"])
            raise ModelError("the guide was given cells without expression: it infers z from x, so give observed cells")
        x = batch.x
        if self.counts and batch.size is not None:
            x = torch.log1p(x * (self.depth / batch.size).unsqueeze(-1))
        standardised = ((x - self.mean) / self.spread).clamp(-_CLAMP, _CLAMP)
        return standardised.nan_to_num() if "y" in self.inputs else standardised

    def _proteins(self, batch: Batch) -> Tensor:
        """``(n, P + 1)`` log(1 + count) / 4, and 1 where they were measured; zeros where they were not."""
        if batch.y is None:
            return self.mean.new_zeros(len(batch), self.sizes["y"])
        seen = _seen(batch.y).to(self.mean)
        return torch.cat((torch.log1p(batch.y.nan_to_num()) / 4, seen), -1)

    def _condition(self, name: str, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """An input other than x, and each cell's row of it where it holds one row an environment."""
        if name == "e":
            if self.doses is None:
                return batch.r, batch.row
            logarithm = torch.log10(1 + batch.r.clamp(min=0))  # uM reach from 1e-3 to 1e4
            return torch.where(self.doses > 0, logarithm, batch.r), batch.row
        if name == "y":
            return self._proteins(batch), None
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


class ReferenceEncoder(GaussianEncoder):
    """q(z | x, e) = q(z | x) in a reference environment and N(0, I), the prior, in any other; see `GaussianEncoder`.

    What is inferred of an unperturbed cell is its state; of perturbed cells nothing is, so that the state cannot take
    over what the perturbation does.
    """

    def forward(self, batch: Batch) -> dist.Independent:
        """Normal of batch shape (n,), event shape (d,)."""
        law = super().forward(batch).base_dist
        perturbed = F.embedding(batch.row, batch.perturbed.unsqueeze(-1))
        return normal(law.loc * (1 - perturbed), torch.lerp(law.scale, torch.ones_like(law.scale), perturbed))


class ProductEncoder(nn.Module):
    """q(z | x, y, ...) proportional to N(0, I) q_x(z) q_y(z): a product of the experts of two modalities and the prior.

    An expert whose modality was not measured in a cell is left out; with neither it is the prior, which counts once
    (Wu and Goodman, "Multimodal Generative Models for Scalable Weakly-Supervised Learning", NeurIPS 2018). Arguments as
    `GaussianEncoder`; the inputs must hold ``"x"`` and ``"y"``, the others go to both experts.

    Raises:
        ModelError: see `GaussianEncoder`; inputs without proteins.
    """

    def __init__(
        self,
        schema: Schema,
        size: int,
        inputs: Sequence[str] = ("x", "y", "e"),
        hidden: Sequence[int] = (128,),
        conditioning: str = "concatenate",
        floor: float = 1e-3,
    ) -> None:
        super().__init__()
        if "y" not in inputs:
            raise ModelError(f"guide inputs {tuple(inputs)}: a product of experts needs 'x' and 'y'")
        self.inputs = tuple(inputs)
        others = [name for name in inputs if name not in ("x", "y")]
        self.rna = GaussianEncoder(schema, size, ["x", *others], hidden, conditioning, floor)
        self.protein = _ProteinEncoder(schema, size, ["x", "y", *others], hidden, conditioning, floor)

    def forward(self, batch: Batch) -> dist.Independent:
        """Normal of batch shape (n,), event shape (d,)."""
        experts = []
        if batch.x is not None:
            experts.append((self.rna(replace(batch, x=batch.x.nan_to_num())).base_dist, _seen(batch.x)))
        if batch.y is not None:
            experts.append((self.protein(batch).base_dist, _seen(batch.y)))
        if not experts:
            raise ModelError("the guide was given cells without expression and proteins: give observed cells")
        precisions = [seen * law.scale.square().reciprocal() for law, seen in experts]
        precision = 1 + torch.stack(precisions).sum(0)
        weighted = torch.stack([own * law.loc for own, (law, _) in zip(precisions, experts, strict=True)]).sum(0)
        return normal(weighted / precision, precision.rsqrt())


class _ProteinEncoder(GaussianEncoder):
    """`GaussianEncoder` that reads proteins in place of expression."""

    def __init__(
        self,
        schema: Schema,
        size: int,
        inputs: Sequence[str],
        hidden: Sequence[int],
        conditioning: str,
        floor: float,
    ) -> None:
        proteins = replace(schema, genes=(*schema.proteins, "measured"), statistics=None)
        super().__init__(proteins, size, [name for name in inputs if name != "y"], hidden, conditioning, floor)
        self.sizes["y"] = len(schema.proteins) + 1

    def _expression(self, batch: Batch) -> Tensor:
        return self._proteins(batch)


def _seen(values: Tensor) -> Tensor:
    """``(n, 1)`` whether a modality was measured in a cell."""
    return ~values.isnan().any(-1, keepdim=True)


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
    """q = N(0, scale^2 I), whatever the cell: for noise drawn anew, which no observation tells anything of.

    Args:
        size: of the noise.
        scale: its standard deviation.
    """

    def __init__(self, size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(size), persistent=False)

    def forward(self, batch: Batch) -> dist.Independent:
        """Normal of batch shape (n,), event shape (size,)."""
        loc = self.zero.expand(len(batch), -1)
        return normal(loc, torch.full_like(loc, self.scale))
