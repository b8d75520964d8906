"""Regimes: which mechanisms an environment changes or cuts, as gains of the structural equations.

An environment acts on targets t_e in [0, 1]^d, which are known (a genetic screen), unknown (a drug: learnt by a
sparse gate), or known of some environments. Of the kinds of intervention, a shift or scale of the noise leaves the gain
at 1, a change of mechanism makes it 1 + t m, a hard intervention 1 - t: parents cut, c_j left to a law of its own.
"""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.batch import Batch, Schema
from pyro_scm.distributions import normal
from pyro_scm.errors import ModelError, listing
from pyro_scm.nn import mlp
from pyro_scm.priors import EnvironmentPrior, SparseSoftmax, Sparsifier, known

if TYPE_CHECKING:
    import pandas as pd
    import pyro.distributions as dist

__all__ = [
    "HardRegime",
    "MechanismRegime",
    "TableRegime",
    "TargetGate",
    "TargetedPrior",
    "TargetedShift",
    "Targets",
    "regime_for",
    "target_labels",
    "target_table",
]

_GAIN_BOUND = 3.0


class TableRegime(nn.Module):
    """gain[e, j]: 1 leaves f_j as it is, 0 cuts its parents (hard intervention), anything else rescales it.

    Args:
        gain: ``(E, d)``.
    """

    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain: Tensor
        self.register_buffer("gain", gain.to(torch.get_default_dtype()).clone())

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        return F.embedding(known(batch), self.gain)


def target_labels(environments: "pd.DataFrame") -> list[str | None]:
    """What a table of environments (`EnvironmentDataset.environments`) says of targets: ``""`` in references.

    A plain list, so that a model that is built with it (``targets=``) can be saved and built again.
    """
    known_of = environments["targets"].where(environments["targets"].notna(), None)
    return [
        "" if reference else None if label is None else str(label)
        for label, reference in zip(known_of, environments["is_reference"], strict=True)
    ]


def target_table(labels: Sequence[str | None], nodes: Sequence[Hashable]) -> Tensor:
    """``(E, d)`` known targets of environments: 1 on a target, 0 elsewhere, a row of NaN where they are not known.

    Args:
        labels: one an environment, as `EnvironmentDataset.environments` has them in its column ``targets``: ``"A+B"``
            for two targets, ``""`` for none, None where they are not known.
        nodes: of the causal layer. Labels that are all nodes name these; otherwise each distinct label takes the next
            node, in the order in which they come.

    Raises:
        ModelError: more distinct targets than nodes.
    """
    parts = [None if label is None else [p for p in label.split("+") if p] for label in labels]
    names = list(dict.fromkeys(p for part in parts for p in part or []))
    own = [str(n) for n in nodes]
    place = {n: own.index(n) for n in names} if set(names) <= set(own) else {n: i for i, n in enumerate(names)}
    if len(names) > len(own):
        raise ModelError(
            f"{len(names)} distinct targets ({listing(names)}) for {len(own)} latents: raise latent, or leave some of "
            "the targets unknown (None)"
        )
    table = torch.zeros(len(parts), len(own))
    for e, part in enumerate(parts):
        if part is None:
            table[e] = torch.nan
        else:
            table[e, [place[p] for p in part]] = 1.0
    return table


class TargetGate(SparseSoftmax):
    """v -> softmax(v / T): one target for each environment as T falls (`fit(..., temperature=(1, 0.05))`)."""

    def forward(self, v: Tensor) -> Tensor:
        """v ``(..., d)`` -> ``(..., d)``, sums to 1."""
        return torch.softmax(v / self.temperature, -1)


class Targets(nn.Module):
    """t(e) ``(n, d)`` in [0, 1]: from a table where it is known, from a sparse gate on r_e elsewhere, 0 in references.

    Args:
        table: ``(E, d)`` with rows of NaN where targets are not known, see `target_table`; None for unknown ones only.
        net: r ``(R, F)`` -> ``(R, d)``, needed where any are unknown.
        gate: of its output.
    """

    def __init__(self, table: Tensor | None, net: nn.Module | None = None, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.table: Tensor | None
        self.register_buffer("table", None if table is None else table.clone())
        self.net, self.gate = net, gate if gate is not None else TargetGate() if net is not None else None
        if net is None and (table is None or bool(table.isnan().any())):
            raise ModelError("some targets are not known and there is no gate to learn them: give net=")

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        given: Tensor | None = None
        if self.table is not None:
            if self.net is None:
                known(batch)  # raises for environments outside the table
            given = F.embedding(batch.env.clamp(min=0), self.table)
            if self.net is None:
                return given
        assert self.net is not None
        assert self.gate is not None
        gate = self.gate(self.net(batch.r).to(batch.r.dtype)) * batch.perturbed.unsqueeze(-1)
        learnt = F.embedding(batch.row, gate)
        if given is None:
            return learnt
        unknown = given.isnan() | (batch.env < 0).unsqueeze(-1)
        return torch.where(unknown, learnt, given.nan_to_num())


class HardRegime(nn.Module):
    """gain = 1 - t(e): the parents of the targets are cut.

    Args:
        targets: of the environments.
    """

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self.targets = targets

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        gain: Tensor = 1 - self.targets(batch)
        return gain


class MechanismRegime(nn.Module):
    """gain = 1 + t(e) m(r_e): the targets' mechanisms are rescaled, |m| <= 3.

    Args:
        targets: of the environments.
        net: r ``(R, F)`` -> ``(R, d)``, m before its bound.
    """

    def __init__(self, targets: Targets, net: nn.Module) -> None:
        super().__init__()
        self.targets, self.net = targets, net

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        change = _GAIN_BOUND * torch.tanh(self.net(batch.r).to(batch.r.dtype) / _GAIN_BOUND)
        gain: Tensor = 1 + self.targets(batch) * F.embedding(batch.row, change * batch.perturbed.unsqueeze(-1))
        return gain


class TargetedPrior(EnvironmentPrior):
    """z_j | e of its own law on the targets of e, N(0, 1) elsewhere.

    Args:
        net: see `EnvironmentPrior`.
        latent: d.
        targets: of the environments.
        sparsifier: see `EnvironmentPrior`.
        scale: see `EnvironmentPrior`.
        owner: whether the targets are a part of this module; False where they are one of the model's regime.
    """

    def __init__(
        self,
        net: nn.Module,
        latent: int,
        targets: Targets,
        sparsifier: Sparsifier,
        scale: bool = True,
        owner: bool = False,
    ) -> None:
        super().__init__(net, latent, sparsifier, scale)
        self.targets = targets if owner else None
        self._targets = (targets,)  # a tuple: torch does not look for modules there

    def forward(self, batch: Batch) -> "dist.Independent":
        """Normal of batch shape (n,), event shape (d,)."""
        loc, scale = self.moments(batch.r, batch.perturbed)
        t = self._targets[0](batch)
        return normal(F.embedding(batch.row, loc) * t, (F.embedding(batch.row, scale.log()) * t).exp())


class TargetedShift(nn.Module):
    """t(e) * shift(e).

    Args:
        shift: of all latents.
        targets: of the environments.
        owner: see `TargetedPrior`.
    """

    def __init__(self, shift: nn.Module, targets: Targets, owner: bool = False) -> None:
        super().__init__()
        self.shift = shift
        self.targets = targets if owner else None
        self._targets = (targets,)

    def moments(self, r: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """As the shift's own: before the targets, which belong to environments."""
        result: tuple[Tensor, Tensor] = self.shift.moments(r, perturbed)  # type: ignore[operator]
        return result

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        moved: Tensor = self.shift(batch) * self._targets[0](batch)
        return moved


def regime_for(
    schema: Schema,
    nodes: Sequence[Hashable],
    interventions: str,
    targets: Sequence[str | None] | None,
    hidden: Sequence[int],
    temperature: float,
) -> tuple[Targets | None, HardRegime | MechanismRegime | None]:
    """Targets and regime of a kind of intervention; both None for noise interventions on unknown targets.

    Args:
        schema: of the training cells.
        nodes: of the causal layer.
        interventions: ``"noise"``, ``"hard"`` or ``"mechanism"``.
        targets: one label an environment of the schema, see `target_table`; None where all are unknown.
        hidden: widths of the gate's hidden layers.
        temperature: of the gate.

    Raises:
        ModelError: an unknown kind, or another number of labels than environments.
    """
    if interventions not in ("noise", "hard", "mechanism"):
        raise ModelError(f"unknown interventions {interventions!r}: use 'noise', 'hard' or 'mechanism'")
    if interventions == "noise" and targets is None:
        return None, None
    if targets is not None and len(targets) != len(schema.environments):
        raise ModelError(
            f"{len(targets)} targets for {len(schema.environments)} environments: give one label each, None where "
            "it is not known (regimes.target_labels(cells.environments))"
        )
    d, features = len(nodes), len(schema.features)
    table = None if targets is None else target_table(targets, nodes)
    some = table is None or bool(table.isnan().any())
    acted = Targets(table, mlp(features, hidden, d) if some else None, TargetGate(temperature) if some else None)
    if interventions == "mechanism":
        return acted, MechanismRegime(acted, mlp(features, hidden, d))
    return acted, HardRegime(acted) if interventions == "hard" else None
