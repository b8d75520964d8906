"""Dosers: how strongly a perturbation acts at a dose, f(0) = 0 exactly.

A curve is a function of the amount a >= 0 that an environment's representation holds: uM with ``"multi-dose"``,
log10(1 + uM) with ``"multi-hot"`` (1 where no dose is known, as in genetic screens). Its parameters are free, one set a
perturbation (CPA: Lotfollahi et al., Mol. Syst. Biol. 2023), or a network's of the molecule (chemCPA: Hetzel et al.,
NeurIPS 2022, whose S(h, s) does not vanish at s = 0; here it does).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.errors import ModelError
from pyro_scm.nn import mlp

__all__ = ["DOSERS", "MONOTONE", "AmortisedDoser", "Doser", "MLPDoser", "doser_for"]

_ONE = math.log(math.e - 1)  # softplus^-1(1)
_SMALLEST = 1e-12  # amount whose logarithm a Hill curve takes at 0, where its value is set to 0


def _linear(a: Tensor, raw: Tensor) -> Tensor:
    return a


def _sigmoid(a: Tensor, raw: Tensor) -> Tensor:
    """(s(beta a + b) - s(b)) / s(-b), without the difference of two numbers close to 1."""
    return -torch.expm1(F.logsigmoid(-F.softplus(raw[0]) * a - raw[1]) - F.logsigmoid(-raw[1]))


def _log_sigmoid(a: Tensor, raw: Tensor) -> Tensor:
    return _sigmoid(a.sign() * a.abs().log1p(), raw)


def _hill(a: Tensor, raw: Tensor) -> Tensor:
    """a^n / (a^n + k^n) with log k = raw[0] and n = softplus(raw[1]); 0 for amounts that are not positive."""
    power = F.softplus(raw[1]) * (a.clamp(min=_SMALLEST).log() - raw[0])
    return torch.where(a > 0, torch.sigmoid(power), 0.0)


# kind -> initial raw parameters, curve (a (...), raw (k, ...)) -> (...)
_CURVES: dict[str, tuple[tuple[float, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": ((), _linear),
    "sigmoid": ((_ONE, 0.0), _sigmoid),
    "log-sigmoid": ((_ONE, 0.0), _log_sigmoid),
    "hill": ((0.0, _ONE), _hill),
}
DOSERS = (*_CURVES, "mlp")
"""Kinds of curves."""
MONOTONE = tuple(_CURVES)
"""Those that never fall."""


def _checked(kind: str) -> str:
    if kind not in DOSERS:
        raise ModelError(f"unknown doser {kind!r}: use one of {', '.join(DOSERS)}")
    return kind


class Doser(nn.Module):
    """One curve of a kind for each perturbation, with free parameters.

    - linear: f(a) = a.
    - sigmoid: f(a) = (s(beta a + b) - s(b)) / (1 - s(b)), s the logistic function, beta > 0; 1 and 0 at first. CPA
      leaves the denominator to V; with it, V is the effect of a dose without end.
    - log-sigmoid: the same of log(1 + a).
    - hill: f(a) = a^n / (a^n + k^n): half of its maximum at a = k; 1 and 1 at first.

    Args:
        perturbations: M.
        kind: of `MONOTONE`.
    """

    def __init__(self, perturbations: int, kind: str = "linear") -> None:
        super().__init__()
        self.initial, self.curve = _CURVES[kind]
        if self.initial:
            self.raw = nn.Parameter(torch.empty(len(self.initial), perturbations))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The same curve for every perturbation."""
        with torch.no_grad():
            for row, value in zip(self.raw if self.initial else (), self.initial, strict=True):
                row.fill_(value)

    def forward(self, amounts: Tensor) -> Tensor:
        """``(..., M)`` amounts -> strengths."""
        return self.curve(amounts, self.raw if self.initial else amounts)


class MLPDoser(nn.Module):
    """f_m(a) = g_m(a) - g_m(0), g_m a network of one hidden layer for each perturbation: any curve through 0.

    Args:
        perturbations: M.
        hidden: its units.
    """

    def __init__(self, perturbations: int, hidden: int = 32) -> None:
        super().__init__()
        self.first, self.offset, self.second = (nn.Parameter(torch.empty(perturbations, hidden)) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kinks between 0 and some units of dose; rising on average, as the other curves do."""
        with torch.no_grad():
            self.first.uniform_(-1, 1)
            self.offset.uniform_(-1, 1)
            self.second.uniform_(-1, 1).mul_(math.sqrt(3 / self.second.shape[1])).add_(
                self.first.sign() / self.second.shape[1]
            )

    def forward(self, amounts: Tensor) -> Tensor:
        """``(..., M)`` amounts -> strengths."""
        units = F.relu(amounts.unsqueeze(-1) * self.first + self.offset) - F.relu(self.offset)
        return (units * self.second).sum(-1)


class AmortisedDoser(nn.Module):
    """S(h, a): a curve whose parameters are a network's of the molecule h.

    - linear, sigmoid, log-sigmoid and hill: as `Doser`.
    - mlp: s(g(h, a)) - s(g(h, 0)), in (-1, 1), not monotone.

    Args:
        features: length of h.
        kind: of `DOSERS`.
        hidden: widths of the network's hidden layers.

    Raises:
        ModelError: an unknown kind.
    """

    def __init__(self, features: int, kind: str = "sigmoid", hidden: Sequence[int] = (64,)) -> None:
        super().__init__()
        self.kind = _checked(kind)
        initial = () if kind == "mlp" else _CURVES[kind][0]
        self.initial: Tensor
        self.register_buffer("initial", torch.tensor(initial), persistent=False)
        if kind == "mlp":
            self.net = mlp(features + 1, hidden, 1)
        elif initial:
            self.net = mlp(features, hidden, len(initial))

    def forward(self, h: Tensor, amounts: Tensor) -> Tensor:
        """h ``(..., H)`` at amounts ``(...)`` -> strengths ``(...)``."""
        if self.kind == "linear":
            return amounts
        if self.kind == "mlp":
            h = h.expand(*torch.broadcast_shapes(h.shape[:-1], amounts.shape), h.shape[-1])
            a = amounts.expand(h.shape[:-1]).unsqueeze(-1)
            at, zero = (torch.sigmoid(self.net(torch.cat((h, v), -1))).squeeze(-1) for v in (a, torch.zeros_like(a)))
            return torch.where(a.squeeze(-1) == 0, 0.0, (at - zero).to(amounts.dtype))
        raw = (self.net(h).to(amounts.dtype) + self.initial).movedim(-1, 0)
        return _CURVES[self.kind][1](amounts, raw)


def doser_for(kind: str, perturbations: int, hidden: int = 32) -> nn.Module:
    """Free curves of a kind, one a perturbation.

    Args:
        kind: of `DOSERS`.
        perturbations: M.
        hidden: units of each perturbation's network, for ``"mlp"``.

    Raises:
        ModelError: an unknown kind.
    """
    return MLPDoser(perturbations, hidden) if _checked(kind) == "mlp" else Doser(perturbations, kind)
