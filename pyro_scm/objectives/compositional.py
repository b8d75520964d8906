"""What compositional models are trained with beside the ELBO: adversaries, an independence penalty, site weights."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import ModelError
from pyro_scm.model import LatentModel
from pyro_scm.nn import mlp
from pyro_scm.objectives.elbo import Adversary, Objective, Penalty, World
from pyro_scm.objectives.independence import Independence
from pyro_scm.sites import Z

__all__ = ["BasalAdversary", "Critic", "compositional"]


class Critic(nn.Module):
    """A network z ``(n, d)`` -> logits ``(n, classes)``, and how steep it is.

    Args:
        inputs: d.
        hidden: widths of the hidden layers.
        outputs: classes or labels.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.net = mlp(inputs, hidden, outputs)

    def forward(self, z: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.net(z)
        return logits

    def slope(self, z: Tensor) -> Tensor:
        """``(n, d)`` gradient of the sum of the logits with respect to z, differentiable in the weights."""
        layers = [layer for layer in self.net if isinstance(layer, nn.Linear)]
        open_units = []
        for layer in layers[:-1]:
            z = layer(z)
            open_units.append((z > 0).to(z.dtype))
            z = F.relu(z)
        slope = layers[-1].weight.sum(0).expand(*z.shape[:-1], -1)
        for layer, mask in zip(reversed(layers[:-1]), reversed(open_units), strict=True):
            slope = (slope * mask) @ layer.weight
        return slope


class BasalAdversary(Adversary):
    """min over critic, max over encoder, of the critic's loss for reading a label of the cells off their basal state.

    The critic's side has a penalty on its slope, the mean squared gradient of its summed logits (CPA), which keeps it
    smooth enough for the encoder to follow.

    Args:
        critic: z ``(n, d)`` -> logits.
        labels: ``(E, M)`` of 0 and 1, perturbations of each environment: binary cross-entropy, the mean over labels;
            or ``(E,)`` int64 classes of environments; None for classes that are a covariate's.
        covariate: name of the covariate, where labels are None.
        weight: lambda of the model's side.
        gradient_penalty: of the critic's side.
        warmup: share of the epochs over which the weight of the model's side rises from 0.

    Raises:
        ModelError: a warm-up that is not a share.
    """

    def __init__(
        self,
        critic: Critic,
        labels: Tensor | None = None,
        covariate: str = "",
        weight: float = 1.0,
        gradient_penalty: float = 0.0,
        warmup: float = 0.0,
    ) -> None:
        super().__init__(critic, Z, covariate or "env", weight)
        if not 0 <= warmup <= 1:
            raise ModelError(f"warmup = {warmup}: give a share of the epochs, between 0 and 1")
        self.labels: Tensor | None
        self.register_buffer("labels", labels)
        self.gradient_penalty, self.warmup = gradient_penalty, warmup
        self.ramp: Tensor
        # a buffer, because what a recorded step reads must be a tensor that it is given
        self.register_buffer("ramp", torch.tensor(1.0), persistent=False)

    def at(self, done: float) -> None:
        """Training has done this share of its epochs: set the weight."""
        self.ramp.fill_(min(1.0, done / self.warmup) if self.warmup > 0 else 1.0)

    def _cross_entropy(self, value: Tensor, batch: Batch) -> Tensor:
        logits = self.critic(value).to(value.dtype)
        if self.labels is None:
            loss = F.cross_entropy(logits, batch.covariates[self.target], reduction="sum")
        elif self.labels.dim() == 1:
            loss = F.cross_entropy(logits, self.labels.index_select(0, batch.env), reduction="sum")
        else:
            target = self.labels.index_select(0, batch.env).to(value.dtype)
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1).sum()
        return loss * (batch.total / len(batch))

    def critic_loss(self, world: World) -> Tensor:
        """The critic's side: its loss and the penalty on its slope; no gradient reaches the encoder."""
        loss = super().critic_loss(world)
        if self.gradient_penalty == 0:
            return loss
        slope = self.critic.slope(world.guide[self.site]["value"].detach())  # type: ignore[operator]
        result: Tensor = loss + self.gradient_penalty * slope.square().mean() * world.batch.total
        return result

    def penalty(self, world: World) -> Tensor:
        """The encoder's side."""
        return self.ramp * super().penalty(world)


def compositional(
    model: LatentModel,
    cells: EnvironmentDataset,
    *,
    adversary: float = 0.0,
    covariate_adversary: float | None = None,
    gradient_penalty: float = 3.0,
    critic_hidden: Sequence[int] = (64, 64),
    warmup: float = 0.0,
    independence: float = 0.0,
    measure: str = "hsic",
    protein_weight: float = 1.0,
    kl_weight: float = 1.0,
    separator: str = "+",
) -> Objective:
    """The objective of `cpa`, `chemcpa` and `multicpa`: by default the evidence lower bound alone.

    With `adversary` the basal state must not tell which perturbations a cell had (binary cross-entropy of each), nor
    its cell line or any covariate that the model uses (cross-entropy of each); each has a critic, and every critic is
    trained. `fit(critic_steps=...)` says how many steps they take for one of the model. As in CPA, weights stand beside
    the reconstruction's mean over genes: 1 to 60 were used there. Recent comparisons find the adversary harmful (Wu et
    al., PerturBench, 2024), so it is off.

    The loss of a game is lowest at no particular epoch: `fit` without ``patience`` where there are adversaries.

    Args:
        model: built by one of these.
        cells: training cells.
        adversary: weight of the adversary of the perturbations, and of the others unless they have their own; 0: none.
        covariate_adversary: weight of each adversary of a covariate.
        gradient_penalty: see `BasalAdversary`.
        critic_hidden: widths of the critics' hidden layers.
        warmup: share of the epochs over which the adversaries' weights rise from 0.
        independence: weight of `Independence`, beside the mean over genes too; 0: none.
        measure: of independence, ``"hsic"`` or ``"mmd"``.
        protein_weight: factor of the proteins' log-likelihood (w1 of MultiCPA).
        kl_weight: see `Objective`.
        separator: between the parts of a combination's name.

    Raises:
        ModelError: a weight below 0, or options that do not exist.
    """
    own = adversary if covariate_adversary is None else covariate_adversary
    for name, value in (("adversary", adversary), ("covariate_adversary", own), ("independence", independence)):
        if not value >= 0:
            raise ModelError(f"{name} = {value}: give 0 or a positive weight")
    genes = len(cells.genes)
    penalties: dict[str, Penalty] = {}

    def opposed(name: str, outputs: int, weight: float, labels: Tensor | None, covariate: str = "") -> None:
        critic = Critic(model.latent, critic_hidden, outputs)
        penalties[f"adversary_{name}"] = BasalAdversary(
            critic, labels, covariate, weight * genes, gradient_penalty, warmup
        )

    if adversary:
        labels = _perturbations(cells, separator)
        opposed("perturbations", labels.shape[1], adversary, labels)
    if own:
        lines, names = _cell_lines(cells)
        if len(names) > 1:
            opposed("cell_line", len(names), own, lines)
        for name in getattr(getattr(model.shift, "covariates", None), "names", ()):
            opposed(name.replace(".", "_"), len(cells.categories[name]), own, None, name)
    if independence:
        penalties["independence"] = Independence(measure, independence * genes)
    weights = {} if protein_weight == 1 else {"y": protein_weight}
    return Objective(kl_weight=kl_weight, penalties=penalties, site_weights=weights)


def _perturbations(cells: EnvironmentDataset, separator: str) -> Tensor:
    """``(E, M)`` which perturbations each environment has; none in a reference."""
    parts = [
        [] if reference else str(name).split(separator)
        for name, reference in zip(cells.environments["perturbation"], cells.reference, strict=True)
    ]
    names = sorted({part for own in parts for part in own})
    rows = np.array([[name in own for name in names] for own in parts], np.float32)
    return torch.as_tensor(rows.reshape(len(parts), len(names)))


def _cell_lines(cells: EnvironmentDataset) -> tuple[Tensor, Mapping[str, int]]:
    """``(E,)`` cell line of each environment, and their names."""
    lines = [str(line) for line in cells.environments["cell_line"]]
    names = {line: i for i, line in enumerate(sorted(set(lines)))}
    return torch.tensor([names[line] for line in lines]), names
