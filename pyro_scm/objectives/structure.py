"""Penalties that learn a graph: few edges, no cycles.

They are terms in nats per cell times the number of cells, so that their weight means the same whatever the data's size.
"""

import torch
from torch import Tensor, nn

from pyro_scm.objectives.elbo import Penalty, World
from pyro_scm.scm import LatentSCM, LinearSCM

__all__ = ["Acyclicity", "EdgeSparsity", "acyclicity"]

_LARGEST_FACTOR = 10.0  # of log: e^10 nats per cell are more than any likelihood has to gain by a cycle


class EdgeSparsity(Penalty):
    """weight * sum of the strengths of all edges: the lasso on A, its path norm where mechanisms are networks.

    With a layer that has gates (``cut``) an edge that is worth less than `weight` closes and is then exactly absent.

    Args:
        scm: the model's causal layer.
        weight: nats per cell that a unit of strength must be worth.
    """

    def __init__(self, scm: LatentSCM, weight: float = 0.01) -> None:
        super().__init__(weight)
        self._scm = (scm,)  # the model's, not a part of this penalty

    def penalty(self, world: World) -> Tensor:
        """Sum over edges times the number of cells, of closed gates too: they open only for more than `weight`."""
        return self._scm[0].strength(gated=False).sum() * world.batch.total


class Acyclicity(Penalty):
    """weight * exp(alpha) * h(A), h = 0 exactly where A has no cycle, and alpha rises as long as there is one.

    The multiplier exp(alpha) is a parameter of each member that ascends where the model descends (Platt and Barr,
    "Constrained differential optimization", 1987): the augmented schedule, in one fit.

    Args:
        scm: the model's causal layer.
        weight: nats per cell of a unit of h at the start.
    """

    def __init__(self, scm: LinearSCM, weight: float = 0.1) -> None:
        super().__init__(weight)
        self._scm = (scm,)
        self.alpha = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        """Factor 1."""
        nn.init.zeros_(self.alpha)

    def penalty(self, world: World) -> Tensor:
        """exp(alpha) h(A), times the number of cells; of closed gates too; the gradient of alpha is reversed."""
        h = acyclicity(self._scm[0].strength(gated=False))
        alpha = 2 * self.alpha.detach() - self.alpha
        return alpha.clamp(max=_LARGEST_FACTOR).exp() * h * world.batch.total


def acyclicity(a: Tensor) -> Tensor:
    """h(A) = -log det(I - (A * A) / s) >= 0, and 0 exactly where A, ``(..., d, d)``, is the matrix of a DAG.

    s is just above the largest row or column sum of A * A, held constant: the matrix is then always within the domain
    in which h grows with every cycle, however large a step of the optimiser was.

    Source: Bello, Aragam and Ravikumar, "DAGMA", NeurIPS 2022, after Zheng et al., "DAGs with NO TEARS", NeurIPS 2018.
    """
    squares = a * a
    bound = torch.minimum(squares.sum(-1).amax(-1), squares.sum(-2).amax(-1)).detach()
    s = (1 + 1.1 * bound)[..., None, None]
    system = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) - squares / s
    h: Tensor = -torch.linalg.slogdet(system).logabsdet
    return h
