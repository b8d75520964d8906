"""Priors on what environments do to the latents, whatever network computes it: few effects, each of any size."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.objectives.elbo import Penalty, World
from pyro_scm.shifts import mover

__all__ = ["EffectSparsity", "EffectSpikeSlab"]

_FASTER = 10.0  # numbers of a prior are learnt so many times faster than the weights of networks


class _EffectPrior(Penalty):
    """Abstract: weight * sum over perturbed environments e and latents j of a cost of mu_ej, in nats.

    Args:
        model: with an environment prior or an environment shift.
        environments: E of the data set; the batch's mean over cells stands for the mean over environments.
        weight: its factor.
        offset: whether the cost is that of mu_ej - o_j, o an offset that all environments share, learnt.

    Raises:
        ModelError: a model whose environments move nothing.
    """

    def __init__(self, model: nn.Module, environments: int, weight: float, offset: bool) -> None:
        super().__init__(weight)
        self._mover = (mover(model),)  # the model's, not a part of this penalty
        self.environments = environments
        self.latent = int(model.latent)  # type: ignore[arg-type]
        self.offset = nn.Parameter(torch.zeros(self.latent)) if offset else None

    def cost(self, effects: Tensor) -> Tensor:
        """Nats ``(R, d)`` of effects ``(R, d)``."""
        raise NotImplementedError  # abstract

    def penalty(self, world: World) -> Tensor:
        """Nats of all environments."""
        batch = world.batch
        loc = self._mover[0].moments(batch.r, batch.perturbed)[0]
        if self.offset is not None:
            loc = loc - _FASTER * self.offset
        each = self.cost(loc).sum(-1) * batch.perturbed
        result: Tensor = each.index_select(0, batch.row).mean() * self.environments
        return result

    def reset_parameters(self) -> None:
        """No offset."""
        if self.offset is not None:
            nn.init.zeros_(self.offset)


class EffectSparsity(_EffectPrior):
    """weight * sum over environments e and latents j of log(1 + (mu_ej / size)^2), in nats.

    Minus the log-density of a Student t with 2 weight - 1 degrees of freedom, up to a constant: steep at 0 and flat far
    away, so that small effects vanish and large ones are not shrunk. MAP for the effects, variational for all else.

    Rotating latents costs it much where effects are sparse already and gains it little where they are not: start from
    `unmix`.

    Args:
        model: with an environment prior or an environment shift.
        environments: E of the data set; the batch's mean over cells stands for the mean over environments.
        weight: nats of an effect e times `size`.
        size: below which an effect counts as small, in standard deviations of the reference's noise.
        offset: whether effects are counted from an offset that all environments share, which is learnt.

    Raises:
        ModelError: a model whose environments move nothing.
    """

    def __init__(
        self, model: nn.Module, environments: int, weight: float = 2.0, size: float = 0.1, offset: bool = False
    ) -> None:
        super().__init__(model, environments, weight, offset)
        self.size = size

    def cost(self, effects: Tensor) -> Tensor:
        """log(1 + (mu / size)^2)."""
        return torch.log1p((effects / self.size).square())


class EffectSpikeSlab(_EffectPrior):
    """Minus the log-density of mu_ej ~ share_j N(+-m_j, s_j^2) + (1 - share_j) N(0, spike_j^2), in nats.

    The mask of each environment and latent is summed over exactly: no relaxation, no sampling. Share, m, s and spike of
    each latent are learnt with the effects, so that the spike narrows as effects gather in it. MAP for the effects,
    variational for all else. George and McCulloch, "Variable selection via Gibbs sampling", JASA 1993.

    Args:
        model: with an environment prior or an environment shift.
        environments: E of the data set; the batch's mean over cells stands for the mean over environments.
        weight: its factor; 1 is the density itself.
        least: of spike and s, in standard deviations of the reference's noise.
        share: first share.
        spike: first spike.
        size: first m.
        spread: first s.
        offset: see `EffectSparsity`.

    Raises:
        ModelError: a model whose environments move nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        environments: int,
        weight: float = 1.0,
        least: float = 0.05,
        share: float = 0.2,
        spike: float = 0.3,
        size: float = 1.0,
        spread: float = 0.5,
        offset: bool = False,
    ) -> None:
        super().__init__(model, environments, weight, offset)
        self.least = least
        widths = (spike - least, size, spread - spike)
        self.first = (math.log(share / (1 - share)), *(_inverse_softplus(max(v, 0.1 * least)) for v in widths))
        self.raw = nn.Parameter(torch.empty(4, self.latent))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The first values, the same for all latents."""
        super().reset_parameters()
        with torch.no_grad():
            self.raw.copy_(torch.tensor(self.first).unsqueeze(1).expand(4, self.latent) / _FASTER)

    def _log_densities(self, effects: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted log-densities ``(..., d)`` of effects that are not there and of those that are."""
        share, *widths = (_FASTER * self.raw).unbind(-2)
        spike, m, s = (F.softplus(v) for v in widths)
        spike = self.least + spike
        s = spike + s  # what blurs the effects that are not there blurs the others too

        def normal(v: Tensor, sd: Tensor) -> Tensor:
            return -0.5 * (v / sd).square() - sd.log()

        there = torch.logaddexp(normal(effects - m, s), normal(effects + m, s)) - math.log(2)
        return F.logsigmoid(-share) + normal(effects, spike), F.logsigmoid(share) + there

    def cost(self, effects: Tensor) -> Tensor:
        """-log p(mu), up to a constant."""
        return -torch.logaddexp(*self._log_densities(effects))

    def inclusion(self, effects: Tensor) -> Tensor:
        """P(an effect is there | its value) ``(..., d)`` of effects ``(..., d)``, less the offset."""
        off, on = self._log_densities(effects)
        return torch.sigmoid(on - off)


def _inverse_softplus(v: float) -> float:
    return math.log(math.expm1(v))
