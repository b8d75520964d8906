"""Effect handlers: every change to a program is one of these around it, never a flag inside it."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeAlias

import pyro
import torch
from pyro.distributions import Delta, Independent, TorchDistribution
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Distribution, Transform, TransformedDistribution

from pyro_scm.errors import InterventionError, listing
from pyro_scm.sites import Z

__all__ = [
    "Do",
    "Expose",
    "HoldNoise",
    "NoiseIntervention",
    "addressed",
    "anneal",
    "imposed",
    "refuse_unknown",
    "unstored",
]

Program: TypeAlias = Callable[..., Any]


def addressed(names: Iterable[str]) -> list[str]:
    """Those of `names` that a handler now on Pyro's stack speaks of (`do`, `condition`, `expose`, ChiRho's `do`).

    A causal variable becomes a site of its own only when somebody asks for it: training never pays for it.
    """
    spoken: set[str] = set()
    for handler in _PYRO_STACK:
        for mapping in (getattr(handler, "data", None), getattr(handler, "actions", None)):
            if isinstance(mapping, Mapping):
                spoken |= {k for k in mapping if isinstance(k, str)}
    return [name for name in names if name in spoken] if spoken else []


class Do(DoMessenger):
    """`pyro.poutine.do` that also takes laws to draw from and functions of the natural value: ``lambda c: c + 1``."""

    data: dict[str, Any]

    def _pyro_sample(self, msg: Any) -> None:
        rule = self.data.get(msg["name"])
        if not callable(rule) and not isinstance(rule, Distribution):
            super()._pyro_sample(msg)
            return
        try:  # poutine.do knows numbers and tensors; the natural value is only known here
            self.data = {**self.data, msg["name"]: torch.as_tensor(imposed(rule, msg["value"]))}
            super()._pyro_sample(msg)
        finally:
            self.data = {**self.data, msg["name"].removesuffix("__CF"): rule}


def imposed(rule: Any, natural: Tensor) -> Any:
    """The value that a number, tensor, law, or function of the natural value (to one of these) stands for.

    A law is drawn from once for each natural value.
    """
    if not isinstance(rule, Distribution) and callable(rule):  # distributions of Pyro can be called too
        rule = rule(natural)
    return rule.expand(natural.shape).sample() if isinstance(rule, Distribution) else rule


FROZEN = ".*not registered in the param store"
"""What Pyro warns of when a module has frozen parameters, which is nobody's mistake."""


@contextlib.contextmanager
def unstored() -> Iterator[None]:
    """Runs of a PyroModule leave nothing in Pyro's parameter store: it would shadow later models of the same class."""
    with pyro.get_param_store().scope(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", FROZEN)
        yield


class Expose(Messenger):
    """Makes the named deterministic sites appear in the trace, unchanged."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.data: dict[str, None] = dict.fromkeys(names)


class _Patched(TorchDistribution):  # type: ignore[misc]
    """A diagonal Normal over z with some components replaced: by laws of their own, values, or functions of them."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Independent, rules: Mapping[int, Any]) -> None:
        self.base, self.rules = base, rules
        self.has_rsample = base.has_rsample
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Patched":
        return _Patched(self.base.expand(batch_shape), self.rules)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return _patch(self.base.sample(torch.Size(sample_shape)), self.rules)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return _patch(self.base.rsample(torch.Size(sample_shape)), self.rules)

    def log_prob(self, value: Tensor) -> Tensor:
        flat = getattr(self.base, "_mask", None) is False  # a prior whose density is left out; a new law's is not
        terms = torch.zeros_like(value) if flat else diagonal(self.base).log_prob(value).clone()
        for j, rule in self.rules.items():
            if callable(rule) and not isinstance(rule, Distribution):
                raise InterventionError(
                    f"z_{j} is a function of its natural value: it can be drawn, but its density is not known"
                )
            law = rule if isinstance(rule, Distribution) else Delta(torch.as_tensor(rule, dtype=value.dtype))
            terms[..., j] = law.log_prob(value[..., j])
        total: Tensor = terms.sum(-1)
        return total


def _patch(z: Tensor, rules: Mapping[int, Any]) -> Tensor:
    z = z.clone()
    for j, rule in rules.items():
        z[..., j] = torch.as_tensor(imposed(rule, z[..., j]))
    return z


class NoiseIntervention(Messenger):
    """Replaces single components of the noise z (seed definition 2): mechanisms stay as they are.

    Around a program whose z is already given (abducted), the named components are replaced and the others kept.

    Args:
        rules: index of the component -> its new distribution over scalars, a number, one value a cell, or a function
            of the natural noise.
    """

    def __init__(self, rules: Mapping[int, Any]) -> None:
        super().__init__()
        self.rules = dict(rules)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != Z:
            return
        size = msg["fn"].event_shape[-1]
        bad = [j for j in self.rules if not 0 <= j < size]
        if bad:
            raise InterventionError(f"no noise component {listing(bad)}: z has components 0 to {size - 1}")
        if msg["value"] is None:
            msg["fn"] = _Patched(msg["fn"], self.rules)
        else:
            msg["value"] = _patch(msg["value"], self.rules)


def diagonal(law: Any) -> Any:
    """The Normal inside `Independent` and mask wrappers: it has loc and scale ``(..., n, d)``."""
    while hasattr(law, "base_dist"):
        law = law.base_dist
    return law


def reparametrised(law: Any) -> tuple[Any, list[Transform]]:
    """The distribution that a law is a transform of, and the transforms from it to the law's values, in order."""
    transforms: list[Transform] = []
    while hasattr(law, "base_dist"):
        if isinstance(law, TransformedDistribution):
            transforms = [*law.transforms, *transforms]
        law = law.base_dist
    return law, transforms


class HoldNoise(Messenger):
    """z = mu + sigma * epsilon with the given standardised noise, whatever mu and sigma the program's environment has.

    In these coordinates an Environment VAE is a Translation VAE: what abduction holds fixed when the environment
    changes is epsilon, not z.

    Args:
        epsilon: ``(..., n, d)`` standardised noise of each cell.
    """

    def __init__(self, epsilon: Tensor) -> None:
        super().__init__()
        self.epsilon = epsilon

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == Z:
            law = diagonal(msg["fn"])
            msg["value"] = law.loc + law.scale * self.epsilon
            msg["done"] = True


class _Anneal(Messenger):
    def __init__(self, weight: float | Tensor) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight


def anneal(program: Program, weight: float | Tensor) -> Program:
    """Multiplies the log-density of latent sites by `weight` (KL warm-up when put around both model and guide)."""
    annealed: Program = _Anneal(weight)(program)
    return annealed


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse interventions on sites that a model does not have; Pyro itself ignores them in silence.

    Raises:
        InterventionError: names them and what there is.
    """
    known = list(known)
    bad = [name for name in given if name not in known]
    if bad:
        raise InterventionError(f"no causal variable {listing(bad)}: this model has {listing(known, 8)}")
