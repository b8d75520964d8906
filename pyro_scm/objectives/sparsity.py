"""A prior on what environments do to the latents, whatever network computes it: few effects, each of any size."""

import torch
from torch import Tensor, nn

from pyro_scm.objectives.elbo import Penalty, World
from pyro_scm.shifts import mover

__all__ = ["EffectSparsity"]


class EffectSparsity(Penalty):
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

    Raises:
        ModelError: a model whose environments move nothing.
    """

    def __init__(self, model: nn.Module, environments: int, weight: float = 2.0, size: float = 0.1) -> None:
        super().__init__(weight)
        self._mover = (mover(model),)  # the model's, not a part of this penalty
        self.environments, self.size = environments, size

    def penalty(self, world: World) -> Tensor:
        """Nats of all environments."""
        batch = world.batch
        loc = self._mover[0].moments(batch.r, batch.perturbed)[0]
        each = torch.log1p((loc / self.size).square()).sum(-1)
        result: Tensor = each.index_select(0, batch.row).mean() * self.environments
        return result
