"""The latent structural causal model: C_j = g_j f_j(PA_j) + Z_j over a directed acyclic graph (seed definition 1).

The gain g_j is 1 in the observational regime. It makes each kind of intervention one case of the same equation:
a mechanism change is another gain, a hard (perfect) intervention is g_j = 0, which cuts the parents and leaves c_j
its own noise, and do(c_j = v) is g_j = 0 with Z_j := v.

Edges may be learnt: among those of a given graph (`cut`), or in any order (`OrderFreeSCM`). With both go the penalties
of `pyro_scm.objectives.structure`; whether the data can tell is another matter, see `pyro_scm.identify`.
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

__all__ = ["IndependentSCM", "LatentSCM", "LinearSCM", "MechanismSCM", "OrderFreeSCM"]


class LatentSCM(nn.Module):
    """Abstract: what every causal layer shares; a subclass gives `_solve`, the equations without the clamp.

    Args:
        graph: a networkx DAG; its nodes are the d causal variables.
        nodes: their order in c, a topological one; by default the lexicographic topological order.

    Raises:
        ModelError: a cycle, no nodes, or labels that read the same.
    """

    acyclic = True  # of the graph of all edges that may be; False where the order is learnt

    def __init__(self, graph: nx.DiGraph, nodes: tuple[Hashable, ...] | None = None) -> None:
        super().__init__()
        if self.acyclic:
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

    def strength(self, gated: bool = True) -> Tensor:
        """``(d, d)``, entry [j, i] bounds how much c_j can change by a unit of its parent c_i; exactly 0: no edge.

        Args:
            gated: False for the strength that edges would have if no gate were closed.
        """
        raise NotImplementedError  # abstract

    def learnt(self, cut: float = 0.0) -> nx.DiGraph:
        """The graph of the edges stronger than `cut`; where the order is learnt, those that close a cycle left out."""
        return graphs.strongest(self.strength().detach().cpu().numpy(), self.nodes, cut)

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


def _gated(value: Tensor, closed: Tensor) -> Tensor:
    """The value, 0 where its gate is closed; the gradient passes as if it were open, so that a gate can open again."""
    return value - (value * closed).detach()


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

    def strength(self, gated: bool = True) -> Tensor:
        """Zeros."""
        return torch.zeros(self.latent, self.latent)

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
        cut: entries of A that are not larger are 0: the gate of their edge is closed; 0 for edges that always stay.
    """

    def __init__(self, graph: nx.DiGraph, initial: float = 0.1, cut: float = 0.0) -> None:
        self._build(graph, None, initial, cut)

    def _build(self, graph: nx.DiGraph, nodes: tuple[Hashable, ...] | None, initial: float, cut: float) -> None:
        super().__init__(graph, nodes)
        self.initial, self.cut = initial, _checked_cut(cut)
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
        a = self.weight * self.mask
        return a if self.cut == 0 else _gated(a, a.abs() <= self.cut)

    def strength(self, gated: bool = True) -> Tensor:
        """|A|."""
        return (self.matrix if gated else self.weight * self.mask).abs()

    def restrict(self, graph: nx.DiGraph) -> None:
        """Allow only the edges of a graph over the same nodes from now on, to fit their weights once they are chosen.

        Raises:
            ModelError: other nodes, edges that were not allowed before, or a cycle.
        """
        graphs.checked(graph)
        if set(graph) != set(self.nodes):
            raise ModelError(f"the graph has nodes {listing(graph)}, this layer {listing(self.nodes)}: give the same")
        mask = torch.as_tensor(nx.to_numpy_array(graph, nodelist=list(self.nodes), weight=None).T).to(self.mask)
        if bool((mask > self.mask).any()):
            raise ModelError("the graph has edges that this layer never had: restrict can only take edges away")
        self.graph = graph
        self.mask.copy_(mask)

    def _unmixed(self, system: Tensor, right: Tensor) -> Tensor:
        """system^-1 right for I - A with some of its rows cut."""
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        return torch.as_tensor(solved)

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
            return self._unmixed(eye - a, columns).mT.reshape(z.shape)
        assert gain is not None
        z = z.expand(torch.broadcast_shapes(z.shape, gain.shape))
        if gain.shape[-2] == 1:  # likewise one system for all cells of each intervention
            return self._unmixed((eye - a).squeeze(-3), z.mT).mT
        return self._unmixed(eye - a, z.unsqueeze(-1)).squeeze(-1)

    def solve_each(self, z: Tensor, nodes: Sequence[int], values: Tensor, gain: Tensor | None = None) -> Tensor:
        """As `LatentSCM.solve_each`; without a gain, c + (v - c_j) times column j of (I - A)^-1."""
        if gain is not None:
            return super().solve_each(z, nodes, values, gain)
        a = self.matrix
        eye = torch.eye(self.latent, dtype=a.dtype, device=a.device)
        effects = self._unmixed(eye - a, eye)
        c = self._solve(z, None)
        columns = effects[:, list(nodes)].mT[:, None, None, :]
        step = values[None, :, None] - c[:, list(nodes)].mT[:, None, :]
        return torch.addcmul(c, step.unsqueeze(-1), columns)


class OrderFreeSCM(LinearSCM):
    """c = A c + z for any A without cycles: the order of the variables is learnt too.

    While it is trained A may have cycles, where c is the equilibrium of the equations; the penalty `Acyclicity` drives
    them out. Solved by dense elimination: d^3 for each distinct gain, not for each cell. After `restrict` it is exactly
    the linear layer of the graph that was chosen.

    Args:
        latent: d; the nodes are 0..d-1.
        initial: standard deviation of A's initial entries.
        cut: see `LinearSCM`.
    """

    acyclic = False

    def __init__(self, latent: int, initial: float = 0.1, cut: float = 0.05) -> None:
        everything = nx.complete_graph(latent, create_using=nx.DiGraph)
        self._build(everything, tuple(everything), initial, cut)

    def _unmixed(self, system: Tensor, right: Tensor) -> Tensor:
        return torch.as_tensor(torch.linalg.solve(system, right))

    def solve_each(self, z: Tensor, nodes: Sequence[int], values: Tensor, gain: Tensor | None = None) -> Tensor:
        """As `LatentSCM.solve_each`: in a cycle a clamped variable no longer answers to itself."""
        return LatentSCM.solve_each(self, z, nodes, values, gain)


class _GatedMLP(MaskedMLP):
    """`MaskedMLP` whose inputs have gates: input i of network k is read if it can matter by more than `cut`."""

    def __init__(self, mask: Tensor, hidden: int, cut: float) -> None:
        self.cut = cut
        super().__init__(mask, hidden)

    def strength(self, gated: bool = True) -> Tensor:
        """``(k, p)``, sum over hidden units of |second| |first|: a bound of |d f_k / d c_i|; 0 where a gate is closed.

        Neither factor can shrink at the other's cost: the bound is that of the product.
        """
        bound = (self.second.abs().unsqueeze(-1) * self.first.abs()).sum(1) * self.mask
        return _gated(bound, bound <= self.cut) if gated and self.cut > 0 else bound

    def forward(self, c: Tensor) -> Tensor:
        """c ``(..., p)`` -> ``(..., k)``."""
        k, h, p = self.first.shape
        first = self.first * self.mask[:, None, :]
        if self.cut > 0:
            first = _gated(first, (self.strength() == 0)[:, None, :])
        units = nn.functional.relu(nn.functional.linear(c, first.reshape(k * h, p), self.offset.reshape(-1)))
        total: Tensor = (units.unflatten(-1, (k, h)) * self.second).sum(-1)
        return total


def _checked_cut(cut: float) -> float:
    if not cut >= 0:
        raise ModelError(f"cut = {cut}: give the size below which an edge is absent, 0 or more")
    return float(cut)


class MechanismSCM(LatentSCM):
    """c_j = f_j(PA_j) + z_j with f_j a small network, one topological generation at a time.

    Args:
        graph: any networkx DAG; the cost grows with its longest path, not with its number of nodes.
        hidden: hidden units of each f_j.
        cut: an edge is absent if it cannot change c_j by more, per unit of c_i (`strength`); 0 for edges that stay.
    """

    def __init__(self, graph: nx.DiGraph, hidden: int = 16, cut: float = 0.0) -> None:
        graphs.checked(graph)
        generations = [sorted(g, key=_sort_key) for g in nx.topological_generations(graph)]
        super().__init__(graph, tuple(n for generation in generations for n in generation))
        self.widths = [len(generation) for generation in generations]
        adjacency = self.adjacency()
        self.mechanisms = nn.ModuleList()
        start = self.widths[0]
        for width in self.widths[1:]:
            self.mechanisms.append(_GatedMLP(adjacency[start : start + width, :start], hidden, _checked_cut(cut)))
            start += width

    def strength(self, gated: bool = True) -> Tensor:
        """Sum over a mechanism's hidden units of the product of its weights: a bound of |d f_j / d c_i|."""
        rows = [torch.zeros(self.widths[0], self.latent)]
        for mechanism in self.mechanisms:
            part = mechanism.strength(gated)  # type: ignore[operator]
            rows.append(nn.functional.pad(part, (0, self.latent - part.shape[1])))
        return torch.cat([row.to(rows[-1]) for row in rows])

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
