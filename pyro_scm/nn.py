"""Networks: plain `torch.nn.Module` parts, each able to draw its parameters anew by `reset_parameters`."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FiLM", "Joint", "MaskedMLP", "Scaled", "Shortcut", "mlp", "replicated", "reset_parameters"]


def mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear, ReLU, ..., Linear: ``(..., inputs) -> (..., outputs)``; linear where `hidden` is empty."""
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def reset_parameters(module: nn.Module) -> None:
    """Draw every parameter anew from torch's generator, children before the modules that hold them.

    A module with parameters of its own has a method `reset_parameters`, as torch's own layers do; one that adjusts its
    children's initial values does so there too, which is why children come first.
    """
    for child in module.children():
        reset_parameters(child)
    own: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if own is not None:
        own()


def replicated(module: nn.Module) -> dict[str, Tensor]:
    """What each member of an ensemble has of its own: all parameters, and the buffers that modules call `replicated`.

    A module names such buffers in a class attribute ``replicated``: numbers that a schedule changes, for example.
    """
    found: dict[str, Tensor] = dict(module.named_parameters())
    for prefix, child in module.named_modules():
        for name in getattr(child, "replicated", ()):
            found[f"{prefix}.{name}" if prefix else name] = child.get_buffer(name)
    return found


class Joint(nn.Module):
    """The `mlp` of several inputs laid side by side, with each input's part of the first layer kept by itself.

    What is known of few distinct environments is so multiplied once for each of them, not once for each cell.

    Args:
        inputs: length of each input.
        hidden: widths of the hidden layers.
        outputs: length of the result.
    """

    def __init__(self, inputs: Sequence[int], hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        width, self.total = (hidden[0] if hidden else outputs), sum(inputs)
        self.parts = nn.ModuleList(nn.Linear(n, width, bias=i == 0) for i, n in enumerate(inputs))
        self.rest: nn.Module = nn.Sequential(nn.ReLU(), mlp(width, hidden[1:], outputs)) if hidden else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch draws one layer of all inputs together."""
        bound = 1 / math.sqrt(self.total)
        with torch.no_grad():
            for part in self.parts:
                for p in part.parameters():
                    p.uniform_(-bound, bound)

    def forward(self, *inputs: Tensor, rows: Sequence[Tensor | None] | None = None) -> Tensor:
        """One tensor an input ``(n, length)`` -> ``(n, outputs)``.

        Args:
            inputs: in the order of the constructor.
            rows: for each input None, or ``(n,)`` which of its rows are meant.
        """
        total: Tensor | float = 0.0
        for part, value, row in zip(self.parts, inputs, rows or [None] * len(inputs), strict=True):
            product = part(value)
            total = total + (product if row is None else product.index_select(0, row))
        result: Tensor = self.rest(total)
        return result


class Scaled(nn.Module):
    """v -> factor * net(v): the same functions, whose outputs move `factor` times as far in a step of Adam.

    Args:
        net: any network.
        factor: see above.
    """

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, v: Tensor) -> Tensor:
        """As of `net`."""
        out: Tensor = self.factor * self.net(v)
        return out


class Shortcut(nn.Module):
    """v -> net(v) + A v + b: a network beside a linear map, which so need not be put together from its kinks.

    As a decoder it starts nearly linear. Cells of distant environments do not overlap, so that a network can
    reconstruct them with their places along a latent in any order; a line puts them in the order of their shifts.

    Args:
        net: ``(..., inputs) -> (..., outputs)``.
        inputs: length of v.
        outputs: length of the result.
    """

    def __init__(self, net: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net, self.line = net, nn.Linear(inputs, outputs)

    def forward(self, v: Tensor) -> Tensor:
        """v ``(..., inputs)`` -> ``(..., outputs)``."""
        out: Tensor = self.net(v) + self.line(v)
        return out


class FiLM(nn.Module):
    """h -> (1 + gamma(e)) * h + beta(e), one scale and one shift for each hidden unit (Perez et al. 2017).

    Args:
        inputs: length of x.
        conditions: length of e.
        hidden: widths of the hidden layers, each modulated before its ReLU.
        outputs: length of the result.
    """

    def __init__(self, inputs: int, conditions: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        sizes = [inputs, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.modulations = nn.ModuleList(nn.Linear(conditions, 2 * b) for b in hidden)
        self.last = nn.Linear(sizes[-1], outputs)

    def forward(self, x: Tensor, e: Tensor, row: Tensor | None = None) -> Tensor:
        """x ``(n, inputs)`` under e ``(n, conditions)`` -> ``(n, outputs)``.

        Args:
            x: one row a cell.
            e: one row a cell; with `row`, one a distinct environment.
            row: ``(n,)`` each cell's row of e.
        """
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            both = modulation(e)
            gamma, beta = (both if row is None else both.index_select(0, row)).chunk(2, -1)
            x = F.relu((1 + gamma) * layer(x) + beta)
        result: Tensor = self.last(x)
        return result


class MaskedMLP(nn.Module):
    """k one-hidden-layer networks evaluated at once, network i reading only the inputs that row i of the mask allows.

    Used for the mechanisms f_j of a topological generation of an SCM and for gene equations of the synthetic screens.

    Args:
        mask: ``(k, p)``, non-zero where network i reads input j.
        hidden: hidden units of each network.
        bias: whether the hidden units have one.
    """

    def __init__(self, mask: Tensor, hidden: int, bias: bool = True) -> None:
        super().__init__()
        k, p = mask.shape
        self.mask: Tensor
        self.register_buffer("mask", (mask != 0).to(torch.get_default_dtype()))
        self.first = nn.Parameter(torch.empty(k, hidden, p))
        self.offset = nn.Parameter(torch.empty(k, hidden), requires_grad=bias)
        self.second = nn.Parameter(torch.empty(k, hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform weights by each network's own number of inputs, zero offsets."""
        fan_in = self.mask.sum(1).clamp(min=1)[:, None, None]
        with torch.no_grad():
            self.first.uniform_(-1, 1).mul_((3 / fan_in).sqrt())
            self.second.uniform_(-1, 1).mul_(math.sqrt(3 / self.second.shape[1]))
            self.offset.zero_()

    def forward(self, c: Tensor) -> Tensor:
        """c ``(..., p)`` -> ``(..., k)``."""
        k, h, p = self.first.shape
        weight = (self.first * self.mask[:, None, :]).reshape(k * h, p)
        units = F.relu(F.linear(c, weight, self.offset.reshape(-1))).unflatten(-1, (k, h))
        total: Tensor = (units * self.second).sum(-1)
        return total
