"""Learnt masks: which latents an environment moves, a random binary variable of each environment and latent.

The mask of an environment has a prior and a variational posterior q(m | r_e), both factorised; training draws it for
each cell anew, which the bound, a sum over cells for a given mask, allows. It is drawn from standard normal noise u, a
site of its own: the noise is each member's in an ensemble, and u = 0 stands for the most likely mask in queries.
"""

import math
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Beta, Independent, Normal
from torch import Tensor, nn
from torch.distributions import kl_divergence, register_kl
from torch.nn import functional as F

from pyro_scm.batch import Batch, Schema
from pyro_scm.composition import Columns
from pyro_scm.distributions import normal
from pyro_scm.errors import ModelError
from pyro_scm.priors import bounded_log_scale
from pyro_scm.sites import DATA

__all__ = [
    "EFFECT_NOISE",
    "MASK_NOISE",
    "LearntShare",
    "MaskedEffects",
    "MaskedPrior",
    "MaskedShift",
    "OneOf",
    "SpikeSlab",
]

MASK_NOISE = "mask_noise"
"""Standard normal noise from which masks are drawn, batch (n,), event (d,)."""

EFFECT_NOISE = "effect_noise"
"""Standard normal noise from which masks and effects of perturbations are drawn, event (2, M, d), outside the plate."""


class _Charged(Normal):  # type: ignore[misc]
    """N(0, 1) with its log-density lowered by a cost: how the KL of a mask enters every bound, exact or sampled.

    Args:
        cost: ``(...)``.
    """

    def __init__(self, cost: Tensor, validate_args: bool | None = None) -> None:
        self.cost = cost
        super().__init__(torch.zeros_like(cost), torch.ones_like(cost), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Charged":
        new = self._get_checked_instance(_Charged, _instance)
        new.cost = self.cost.expand(batch_shape)
        result: _Charged = super().expand(batch_shape, _instance=new)
        return result

    def log_prob(self, value: Tensor) -> Tensor:
        result: Tensor = super().log_prob(value) - self.cost
        return result


@register_kl(Normal, _Charged)  # type: ignore[untyped-decorator]
def _kl_charged(q: Normal, p: _Charged) -> Tensor:
    return kl_divergence(q, Normal(p.loc, p.scale, validate_args=False)) + p.cost


class SpikeSlab(nn.Module):
    """m_ej ~ Bernoulli(share) a priori, q(m_ej = 1) = sigmoid(logit_ej): each latent by itself (sVAE+, SAMS-VAE).

    The value is 0 or 1, its gradient that of a binary concrete relaxation (straight-through); the KL is that between
    the Bernoulli laws of the hard value, never of the relaxed one.

    Args:
        share: prior probability that an environment moves a latent.
        temperature: of the relaxation.
        opening: added to the logits, so that masks start open: a mask that starts shut gets no gradient to open.

    Raises:
        ModelError: a share outside (0, 1), or a temperature that is not positive.
    """

    def __init__(self, share: float, temperature: float = 1.0, opening: float = 2.0) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise ModelError(f"a mask with prior probability {share}: give a share between 0 and 1 (k below latent)")
        if not temperature > 0:
            raise ModelError(f"temperature {temperature} of the mask: give a positive number")
        self.share, self.temperature, self.opening = share, temperature, opening

    def probability(self, logits: Tensor) -> Tensor:
        """q(m = 1) for logits ``(..., d)``."""
        return torch.sigmoid(logits + self.opening)

    def draw(self, logits: Tensor, u: Tensor) -> Tensor:
        """Masks ``(..., d)`` from standard normal noise u; P(m = 1) is `probability`."""
        logistic = _below(u).log() - _below(-u).log()
        soft = torch.sigmoid((logits + self.opening + logistic) / self.temperature)
        return _straight_through((soft > 0.5).to(soft), soft)

    def prior(self) -> tuple[float | Tensor, float | Tensor]:
        """Log p(m = 1) and log p(m = 0)."""
        return math.log(self.share), math.log1p(-self.share)

    def cost(self, logits: Tensor) -> Tensor:
        """KL(q(m) || p(m)) ``(..., d)``, a term a latent."""
        on, off = F.logsigmoid(logits + self.opening), F.logsigmoid(-logits - self.opening)
        log_on, log_off = self.prior()
        return on.exp() * (on - log_on) + off.exp() * (off - log_off)

    def shared_cost(self) -> Tensor | float:
        """``(d,)`` KL of what all masks share; 0."""
        return 0.0


class LearntShare(SpikeSlab):
    """`SpikeSlab` whose prior probability w_j ~ Beta(1, K) is each latent's own and learnt: q(w_j) = Beta(a_j, b_j).

    Masks enter the bound with E_q[log w], so that the KL stays in closed form (sVAE+: Lopez et al., CLeaR 2023).

    Args:
        latent: d.
        concentration: K; the larger, the fewer environments move a latent.
        temperature: of the relaxation.
        opening: see `SpikeSlab`.

    Raises:
        ModelError: a concentration that is not positive.
    """

    def __init__(
        self, latent: int, concentration: float = 10.0, temperature: float = 1.0, opening: float = 5.0
    ) -> None:
        if not concentration > 0:
            raise ModelError(f"concentration {concentration} of the masks' prior: give a positive number")
        super().__init__(1 / (1 + concentration), temperature, opening)
        self.concentration = concentration
        self.raw = nn.Parameter(torch.empty(2, latent))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Beta(1, K), the prior."""
        with torch.no_grad():
            for row, value in zip(self.raw, (1.0, self.concentration), strict=True):
                row.fill_(math.log(math.expm1(value)) if value < 30 else value)

    def _posterior(self) -> Beta:
        a, b = 1e-3 + F.softplus(self.raw)
        return Beta(a, b, validate_args=False)

    def prior(self) -> tuple[Tensor, Tensor]:
        """E_q[log w] and E_q[log(1 - w)], each ``(d,)``."""
        q = self._posterior()
        both = torch.digamma(q.concentration1 + q.concentration0)
        return torch.digamma(q.concentration1) - both, torch.digamma(q.concentration0) - both

    def shared_cost(self) -> Tensor:
        """``(d,)`` KL(q(w) || Beta(1, K))."""
        one = torch.ones_like(self.raw[0])
        return kl_divergence(self._posterior(), Beta(one, self.concentration * one, validate_args=False))


class OneOf(nn.Module):
    """One target a environment: t_e ~ Categorical(1 / d) a priori, q(t_e = j) = softmax_j(logits_e); m_ej = [t_e = j].

    The value is one-hot, its gradient that of a Gumbel-softmax relaxation (straight-through); the KL that between the
    two categorical laws.

    Args:
        temperature: of the relaxation.

    Raises:
        ModelError: a temperature that is not positive.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ModelError(f"temperature {temperature} of the mask: give a positive number")
        self.temperature = temperature

    def probability(self, logits: Tensor) -> Tensor:
        """q(t = j) for logits ``(..., d)``."""
        return torch.softmax(logits, -1)

    def draw(self, logits: Tensor, u: Tensor) -> Tensor:
        """Masks ``(..., d)`` from standard normal noise u; P(m_j = 1) is `probability`."""
        log_below = torch.where(u > 0, torch.log1p(-_below(-u)), _below(u).log())
        gumbel = -torch.log(-log_below)
        soft = torch.softmax((logits + gumbel) / self.temperature, -1)
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return _straight_through(hard, soft)

    def cost(self, logits: Tensor) -> Tensor:
        """KL(q(t) || p(t)) ``(..., d)``, in terms whose sum over the latents it is."""
        log_q = torch.log_softmax(logits, -1)
        return log_q.exp() * (log_q + math.log(logits.shape[-1]))

    def shared_cost(self) -> float:
        """0: see `SpikeSlab.shared_cost`."""
        return 0.0


Mask = SpikeSlab | OneOf


def _below(u: Tensor) -> Tensor:
    """P(N(0, 1) < u), exact in the lower tail and never 0."""
    return (0.5 * torch.erfc(-u / math.sqrt(2))).clamp(min=1e-30)


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    return hard + (soft - soft.detach())


class _Masked(nn.Module):
    """Network of r_e whose last d outputs are the logits of a mask.

    Args:
        net: r ``(R, F)`` -> ``(R, parts * d + d)``.
        latent: d.
        mask: law of the masks.
        environments: E, among which the KL of the masks is shared out: E times its mean over the cells.
    """

    def __init__(self, net: nn.Module, latent: int, mask: Mask, environments: int) -> None:
        super().__init__()
        self.net, self.latent, self.environments = net, latent, environments
        self.mask: Any = mask

    def _outputs(self, r: Tensor) -> tuple[Tensor, Tensor]:
        out = self.net(r).to(r.dtype)
        return out[..., : -self.latent], out[..., -self.latent :]

    def probability(self, r: Tensor, perturbed: Tensor) -> Tensor:
        """``(R, d)`` probability that an environment moves a latent; 0 in a reference environment."""
        result: Tensor = self.mask.probability(self._outputs(r)[1]) * perturbed.unsqueeze(-1)
        return result

    def _drawn(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each cell's other outputs ``(n, parts * d)`` and its mask ``(..., n, d)``."""
        effects, logits = self._outputs(batch.r)
        on = batch.perturbed.unsqueeze(-1)
        cost = F.embedding(batch.row, self.mask.cost(logits) * on) * (self.environments / batch.total)
        cost = cost + self.mask.shared_cost() / batch.total
        with poutine.block(hide=[DATA]):  # the model opens the plate for itself, and Pyro takes each name once
            plate = batch.plate()
        with plate:
            u = pyro.sample(MASK_NOISE, Independent(_Charged(cost), 1), infer={"fresh": True})
        mask: Tensor = self.mask.draw(F.embedding(batch.row, logits), u) * F.embedding(batch.row, on)
        return F.embedding(batch.row, effects), mask

    def _most_likely(self, r: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        effects, logits = self._outputs(r)
        return effects, self.mask.draw(logits, torch.zeros_like(logits)) * perturbed.unsqueeze(-1)


class MaskedPrior(_Masked):
    """z_j | e, m ~ N(m_ej mu_ej, exp(m_ej log sigma_ej)^2): N(0, 1), the spike, wherever the mask is 0.

    One mask serves mean and scale. Its net gives ``(R, 3 d)``: mu, log sigma and logits; ``(R, 2 d)`` without a scale.
    """

    def __init__(self, net: nn.Module, latent: int, mask: Mask, environments: int, scale: bool = True) -> None:
        super().__init__(net, latent, mask, environments)
        self.scale = scale

    def _law(self, effects: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        loc = effects[..., : self.latent] * mask
        if not self.scale:
            return loc, torch.ones_like(loc)
        return loc, (bounded_log_scale(effects[..., self.latent :]) * mask).exp()

    def moments(self, r: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """mu_e and sigma_e under the most likely mask: two tensors ``(R, d)``."""
        return self._law(*self._most_likely(r, perturbed))

    def forward(self, batch: Batch) -> Any:
        """Normal of batch shape (n,), event shape (d,)."""
        return normal(*self._law(*self._drawn(batch)))


class MaskedShift(_Masked):
    """shift_j(e) = m_ej mu_ej; 0 in a reference environment. Its net gives ``(R, 2 d)``: mu and logits."""

    def moments(self, r: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """Shift under the most likely mask, and unit scale: two tensors ``(R, d)``."""
        effects, mask = self._most_likely(r, perturbed)
        return effects * mask, torch.ones_like(mask)

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        effects, mask = self._drawn(batch)
        return effects * mask


class MaskedEffects(nn.Module):
    """shift(e) = sum_t a_et m_t * e_t, m_tj ~ Bernoulli(p), e_tj ~ N(0, s^2) for each perturbation t (SAMS-VAE).

    The posterior is factorised: q(m_tj) as `SpikeSlab`, q(e_tj) Normal. Masks and effects belong to perturbations, not
    to cells, and are drawn once for all cells of a step; in combinations they add.

    Args:
        schema: of the training cells; amounts a as `composition.Columns` finds them.
        latent: d.
        mask: law of the masks.
        width: s.

    Raises:
        ModelError: a width that is not positive, or a representation that is not one of perturbations.

    Source: Bereket and Karaletsos, "Modelling Cellular Perturbations with the Sparse Additive Mechanism Shift
    Variational Autoencoder", NeurIPS 2023.
    """

    def __init__(self, schema: Schema, latent: int, mask: SpikeSlab, width: float = 1.0) -> None:
        super().__init__()
        if not width > 0:
            raise ModelError(f"width {width} of the effects' prior: give a positive number")
        self.mask, self.width = mask, width
        positions = Columns.of(schema).amounts
        self.positions: Tensor
        self.register_buffer("positions", torch.tensor(positions, dtype=torch.int64), persistent=False)
        self.loc, self.raw_scale, self.logits = (nn.Parameter(torch.empty(len(positions), latent)) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small, narrow effects; masks as open as their law opens them."""
        with torch.no_grad():
            self.loc.normal_(std=0.1)
            self.raw_scale.fill_(math.log(math.expm1(0.1)))
            self.logits.normal_(std=0.01)

    def _amounts(self, r: Tensor, perturbed: Tensor) -> Tensor:
        return r.index_select(-1, self.positions) * perturbed.unsqueeze(-1)

    def _cost(self, scale: Tensor) -> Tensor:
        """``(2, M, d)`` KL of masks, KL of effects."""
        ratio = scale / self.width
        effects = 0.5 * (ratio.square() + (self.loc / self.width).square() - 1) - ratio.log()
        return torch.stack((self.mask.cost(self.logits), effects))

    def probability(self, r: Tensor, perturbed: Tensor) -> Tensor:
        """``(R, d)`` probability that one of an environment's perturbations at least moves a latent."""
        there = (self._amounts(r, perturbed) != 0).to(self.logits)
        moved: Tensor = 1 - torch.exp(there @ torch.log1p(-self.mask.probability(self.logits)))
        return moved

    def moments(self, r: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """Shift under the most likely masks and mean effects, and unit scale: two tensors ``(R, d)``."""
        mask = self.mask.draw(self.logits, torch.zeros_like(self.logits))
        loc = self._amounts(r, perturbed) @ (mask * self.loc)
        return loc, torch.ones_like(loc)

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        scale = 1e-4 + F.softplus(self.raw_scale)
        u = pyro.sample(EFFECT_NOISE, Independent(_Charged(self._cost(scale)), 3), infer={"fresh": True})
        if u.dim() > 3:  # (S, 1, 2, M, d) under a plate of draws
            u = u.squeeze(-4)
        mask = self.mask.draw(self.logits, u[..., 0, :, :])
        moved: Tensor = self._amounts(batch.r, batch.perturbed) @ (mask * (self.loc + scale * u[..., 1, :, :]))
        return moved.index_select(-2, batch.row)
