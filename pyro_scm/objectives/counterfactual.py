"""The adversary of the Adversarial Prior autoencoder: the environment must not show in the counterfactual code."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.attention import EPSILON, Attention, AttentivePrior, counterfactual_code
from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import ModelError
from pyro_scm.model import LatentModel
from pyro_scm.nn import mlp
from pyro_scm.objectives.elbo import Adversary, Objective, World
from pyro_scm.sites import Z

__all__ = ["CounterfactualAdversary", "adversarial_prior"]


class CounterfactualAdversary(Adversary):
    """min_D max_{enc, A} of D's loss for reading the environment off z_count = alpha * epsilon + (1 - alpha) * z.

    D maximises log D(e | z_count) in steps of its own; encoder and attention minimise it (seed section 4.10). Cells of
    environments that were not trained on are left out of a classification: held-out ones have no class.

    Args:
        attention: the model's own, which learns with it.
        critic: D, z_count ``(n, d)`` -> logits ``(n, classes)``, or with `target` ``"r"`` -> ``(n, F)``.
        classes: ``(E,)`` class of each environment of the table, -1 for one without.
        target: ``"env"``, or ``"r"``: D regresses the representation r_e, log D = -|D - r_e|^2 / 2, which scales to any
            number of environments.
        weight: lambda of the model's side.

    Raises:
        ModelError: an unknown target.
    """

    def __init__(
        self, attention: Attention, critic: nn.Module, classes: Tensor, target: str = "env", weight: float = 1.0
    ) -> None:
        if target not in ("env", "r"):
            raise ModelError(f"unknown target {target!r} of the adversary: use 'env' or 'r'")
        super().__init__(critic, Z, target, weight)
        self._of_the_model = (attention,)  # no part of this one: functional calls would put its parameters back twice
        self.classes: Tensor
        self.register_buffer("classes", classes.clone())

    @property
    def attention(self) -> Attention:
        """The model's attention."""
        return self._of_the_model[0]

    def code(self, world: World, constant: bool = False) -> Tensor:
        """z_count ``(n, d)`` of the cells; `constant` cuts it off from encoder and attention."""
        z, alpha = world.guide[self.site]["value"], self.attention.of_cells(world.batch)
        value: Tensor = counterfactual_code(z, world.guide[EPSILON]["value"], alpha)
        return value.detach() if constant else value

    def _cross_entropy(self, value: Tensor, batch: Batch) -> Tensor:
        out: Tensor = self.critic(value).to(value.dtype)
        if self.target == "r":
            loss = 0.5 * (out - batch.e).square().sum(-1)
        else:
            labels = torch.where(batch.env < 0, -1, self.classes[batch.env.clamp(min=0)])
            loss = F.cross_entropy(out, labels, reduction="none", ignore_index=-1)
        return loss.sum() * (batch.total / len(batch))

    def critic_loss(self, world: World) -> Tensor:
        """D's side: no gradient reaches encoder or attention."""
        return self._cross_entropy(self.code(world, constant=True), world.batch)

    def penalty(self, world: World) -> Tensor:
        """The side of encoder and attention."""
        return -self._cross_entropy(self.code(world), world.batch)


def adversarial_prior(
    model: LatentModel,
    cells: EnvironmentDataset,
    *,
    hidden: Sequence[int] = (64, 64),
    target: str = "env",
    weight: float = 1.0,
    kl_weight: float = 1.0,
) -> Objective:
    """The objective of an `adversarial_prior_ae`; `fit(critic_steps=...)` says how many steps D takes for one of it.

    The loss is that of a game: its lowest value is no sign of the best epoch, so `fit` without ``patience``.

    Args:
        model: made by `adversarial_prior_ae`.
        cells: training cells.
        hidden: widths of D's hidden layers.
        target: see `CounterfactualAdversary`.
        weight: of the adversary.
        kl_weight: see `Objective`.

    Raises:
        ModelError: a model without attention.
    """
    prior = model.prior
    if not isinstance(prior, AttentivePrior):
        raise ModelError("this model has no attention to train: build it with models.adversarial_prior_ae")
    present = torch.as_tensor(cells.present)
    classes = torch.full((len(cells.environments),), -1)
    classes[present] = torch.arange(len(present))
    outputs = len(cells.schema.features) if target == "r" else len(present)
    critic = mlp(model.latent, hidden, outputs)
    adversary = CounterfactualAdversary(prior.attention, critic, classes, target, weight)
    return Objective(kl_weight=kl_weight, penalties={"adversary": adversary})
