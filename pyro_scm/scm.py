"""The latent structural causal model: C_j = g_j f_j(PA_j) + Z_j over a directed acyclic graph (seed definition 1).

The gain g_j is 1 in the observational regime. It makes each kind of intervention one case of the same equation:
a mechanism change is another gain, a hard (perfect) intervention is g_j = 0, which cuts the parents and leaves c_j
its own noise, and do(c_j = v) is g_j = 0 with Z_j := v.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import networkx as nx
import pyro
import torch
from torch import Tensor, nn

from pyro_scm import graphs
from pyro_scm.errors import ModelError, listing
from pyro_scm.handlers import addressed
from pyro_scm.nn import MaskedMLP
from pyro_scm.sites import C, node_site

__all__ = ["IndependentSCM", "LatentSCM", "LinearSCM", "MechanismSCM"]


class LatentSCM(nn.Module):
    """Abstract: what every causal layer shares; a subclass gives `_solve`, the equations without the clamp.

    Args:
        graph: a networkx DAG; its nodes are the d causal variables.
        nodes: their order in c, a topological one; by default the lexicographic topological order.

    Raises:
        ModelError: a cycle, no nodes, or labels that read the same.
    """

    def __init__(self, graph: nx.DiGraph, nodes: tuple[Hashable, ...] | None = None) -> None:
        super().__init__()
        graphs.checked(graph)
        self.graph = graph
        self.nodes: tuple[Hashable, ...] = nodes or tuple(nx.lexicographical_topological_sort(graph, key=_sort_key))
        self.sites = tuple(node_site(n) for n in self.nodes)
        shared = [n for n in self.nodes if self.sites.count(node_site(n)) > 1]
        if shared:
            raise ModelError(
                f"nodes {listing(shared)} share the site {node_site(shared[0])!r}: give each another label"
            )

    @property
    def latent(self) -> int:
        """Number d of causal variables."""
        return len(self.nodes)

    def adjacency(self) -> Tensor:
        """``(d, d)``, entry [j, i] is 1 where i is a parent of j; strictly lower-triangular in the order of `nodes`."""
        matrix = nx.to_numpy_array(self.graph, nodelist=list(self.nodes), weight=None)
        return torch.as_tensor(matrix.T, dtype=torch.get_default_dtype())

    def _solve(self, z: Tensor, gain: Tensor | None) -> Tensor:
        raise NotImplementedError  # abstract

    def effects(self, c: Tensor) -> Tensor:
        """What the parents contribute to each variable, f(c) ``(..., d)`` for given c ``(..., d)``."""
        raise NotImplementedError  # abstract

    def noise(self, c: Tensor, gain: Tensor | None = None) -> Tensor:
        """The inverse of `solve`: z = c - g f(c), all mechanisms at once.

        Args:
            c: ``(..., d)`` causal variables.
            gain: see `solve`.
        """
        effects = self.effects(c)
        return c - (effects if gain is None else gain * effects)

    def solve(self, z: Tensor, gain: Tensor | None = None, do: Tensor | None = None) -> Tensor:
        """Causal variables for given noise: one call, any batch shape, nothing sampled.

        Args:
            z: ``(..., d)`` exogenous noise.
            gain: ``(d,)`` or ``(..., d)``, None for 1.
            do: ``(d,)`` or ``(..., d)`` imposed values, NaN where free.

        Returns:
            c ``(..., d)``.
        """
        if do is not None:
            free = do.isnan()
            shape = torch.broadcast_shapes(z.shape, do.shape)
            z = torch.where(free, z, do.nan_to_num()).expand(shape)
            gain = free.to(z) if gain is None else gain * free
        return self._solve(z, gain)

    def solve_each(self, z: Tensor, nodes: Sequence[int], values: Tensor, gain: Tensor | None = None) -> Tensor:
        """do(c_j := v) for each of J nodes and V values, one at a time, on the same noise.

        Args:
            z: ``(n, d)``.
            nodes: J positions in c.
            values: ``(V,)``.
            gain: see `solve`.

        Returns:
            c ``(J, V, n, d)``.
        """
        clamp = torch.full((len(nodes), len(values), 1, self.latent), torch.nan, dtype=z.dtype, device=z.device)
        for row, j in zip(clamp, nodes, strict=True):
            row[:, 0, j] = values
        return self.solve(z.expand(len(nodes), len(values), *z.shape), gain, clamp)

    def forward(self, z: Tensor, gain: Tensor | None = None) -> Tensor:
        """The Pyro program: site ``c``, and ``c_<node>`` for each node that a handler names.

        A node's own site holds its natural value (what it would have been under the interventions before it); what a
        handler makes of that value is imposed on the solution. ``c`` holds the variables after all interventions.
        """
        c = self.solve(z, gain)
        do: Tensor | None = None
        for name in addressed(self.sites):
            j = self.sites.index(name)
            value = pyro.deterministic(name, c[..., j], event_dim=0)
            do = _impose(do, j, value, c)
            c = self.solve(z, gain, do)
        result: Tensor = pyro.deterministic(C, c, event_dim=1)
        return result


def _sort_key(node: Any) -> tuple[int, Any]:
    return (0, node) if isinstance(node, int) else (1, str(node))


def _impose(do: Tensor | None, j: int, value: Tensor, c: Tensor) -> Tensor:
    """Adds a value to the clamp, which stays ``(d,)`` as long as values are scalars: one matrix then serves all."""
    d = c.shape[-1]
    do = torch.full((d,), torch.nan, dtype=c.dtype, device=c.device) if do is None else do
    value = torch.as_tensor(value, dtype=c.dtype, device=c.device)
    do = do.expand(*torch.broadcast_shapes(do.shape[:-1], value.shape), d)
    return torch.where(torch.arange(d, device=c.device) == j, value.unsqueeze(-1), do)


class IndependentSCM(LatentSCM):
    """c = z."""

    def __init__(self, latent: int) -> None:
        super().__init__(graphs.independent(latent))

    def _solve(self, z: Tensor, gain: Tensor | None) -> Tensor:
        return z

    def effects(self, c: Tensor) -> Tensor:
        """None."""
        return torch.zeros_like(c)


class LinearSCM(LatentSCM):
    """c = A c + z, so c = (I - A)^-1 z with A strictly lower-triangular in the order of the nodes.

    With noise interventions and a flexible decoder A is not identified: the decoder's first layer absorbs it. Hard
    interventions identify it (Squires et al. 2023).

    Args:
        graph: the edges that A may have.
        initial: standard deviation of A's initial entries.
    """

    def __init__(self, graph: nx.DiGraph, initial: float = 0.1) -> None:
        super().__init__(graph)
        self.initial = initial
        self.mask: Tensor
        self.register_buffer("mask", self.adjacency())
        self.weight = nn.Parameter(torch.empty(self.latent, self.latent))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal entries: the model starts near c = z."""
        with torch.no_grad():
            self.weight.normal_().mul_(self.initial * self.mask)

    @property
    def matrix(self) -> Tensor:
        """A ``(d, d)``; A[j, i] is the effect of node i on node j."""
        return self.weight * self.mask

    def effects(self, c: Tensor) -> Tensor:
        """A c."""
        return c @ self.matrix.mT

    def _solve(self, z: Tensor, gain: Tensor | None) -> Tensor:
        a = self.matrix
        if gain is not None:
            a = a * gain.unsqueeze(-1)
        eye = torch.eye(self.latent, dtype=a.dtype, device=a.device)
        if a.dim() == 2:  # one system, all cells as its right-hand sides: no batch of matrices
            columns = z.reshape(-1, self.latent).mT
            c = torch.linalg.solve_triangular(eye - a, columns, upper=False, unitriangular=True)
            return torch.as_tensor(c.mT.reshape(z.shape))
        assert gain is not None
        z = z.expand(torch.broadcast_shapes(z.shape, gain.shape))
        if gain.shape[-2] == 1:  # likewise one system for all cells of each intervention
            c = torch.linalg.solve_triangular((eye - a).squeeze(-3), z.mT, upper=False, unitriangular=True)
            return torch.as_tensor(c.mT)
        c = torch.linalg.solve_triangular(eye - a, z.unsqueeze(-1), upper=False, unitriangular=True)
        return torch.as_tensor(c.squeeze(-1))

    def solve_each(self, z: Tensor, nodes: Sequence[int], values: Tensor, gain: Tensor | None = None) -> Tensor:
        """As `LatentSCM.solve_each`; without a gain, c + (v - c_j) times column j of (I - A)^-1."""
        if gain is not None:
            return super().solve_each(z, nodes, values, gain)
        a = self.matrix
        eye = torch.eye(self.latent, dtype=a.dtype, device=a.device)
        effects = torch.linalg.solve_triangular(eye - a, eye, upper=False, unitriangular=True)
        c = self._solve(z, None)
        columns = effects[:, list(nodes)].mT[:, None, None, :]
        step = values[None, :, None] - c[:, list(nodes)].mT[:, None, :]
        return torch.addcmul(c, step.unsqueeze(-1), columns)


class MechanismSCM(LatentSCM):
    """c_j = f_j(PA_j) + z_j with f_j a small network, one topological generation at a time.

    Args:
        graph: any networkx DAG; the cost grows with its longest path, not with its number of nodes.
        hidden: hidden units of each f_j.
    """

    def __init__(self, graph: nx.DiGraph, hidden: int = 16) -> None:
        graphs.checked(graph)
        generations = [sorted(g, key=_sort_key) for g in nx.topological_generations(graph)]
        super().__init__(graph, tuple(n for generation in generations for n in generation))
        self.widths = [len(generation) for generation in generations]
        adjacency = self.adjacency()
        self.mechanisms = nn.ModuleList()
        start = self.widths[0]
        for width in self.widths[1:]:
            self.mechanisms.append(MaskedMLP(adjacency[start : start + width, :start], hidden))
            start += width

    def effects(self, c: Tensor) -> Tensor:
        """f_j(PA_j) of every node: no mechanism waits for another."""
        parts, start = [torch.zeros_like(c[..., : self.widths[0]])], self.widths[0]
        for mechanism, width in zip(self.mechanisms, self.widths[1:], strict=True):
            parts.append(mechanism(c[..., :start]))
            start += width
        return torch.cat(parts, -1)

    def _solve(self, z: Tensor, gain: Tensor | None) -> Tensor:
        if gain is not None:
            shape = torch.broadcast_shapes(z.shape, gain.shape)
            z, gain = z.expand(shape), gain.expand(shape)
        c = z[..., : self.widths[0]]
        start = self.widths[0]
        for mechanism, width in zip(self.mechanisms, self.widths[1:], strict=True):
            part = slice(start, start + width)
            effect = mechanism(c)
            if gain is not None:
                effect = effect * gain[..., part]
            c = torch.cat((c, effect + z[..., part]), -1)
            start += width
        return c
