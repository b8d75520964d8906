"""What the named models share: networks of the usual sizes, and a record of how a model was built."""

import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, cast

import networkx as nx
from torch import nn

from pyro_scm import graphs
from pyro_scm.batch import Schema
from pyro_scm.composition import CompositionShift, CovariateShift
from pyro_scm.errors import ModelError
from pyro_scm.likelihoods import Likelihood, likelihood_for, outputs_of
from pyro_scm.masks import MaskedPrior, MaskedShift, OneOf, SpikeSlab
from pyro_scm.model import LatentModel
from pyro_scm.nn import Scaled, Shortcut, mlp, reset_parameters
from pyro_scm.priors import Dense, EnvironmentPrior, FlatPrior, SparseSoftmax, Sparsifier, StandardPrior, TopK
from pyro_scm.scm import LatentSCM, LinearSCM, MechanismSCM, OrderFreeSCM
from pyro_scm.shifts import EnvironmentShift

__all__ = [
    "basal_prior",
    "causal_layer",
    "decoder",
    "environment_prior",
    "environment_shift",
    "network_composition",
    "recorded",
    "sparsifier_for",
]

P = ParamSpec("P")


def recorded(build: Callable[Concatenate[Schema, P], LatentModel]) -> Callable[Concatenate[Schema, P], LatentModel]:
    """The same function, whose models remember its name and options: a checkpoint can then build them again."""

    @functools.wraps(build)
    def wrapped(schema: Schema, *args: P.args, **options: P.kwargs) -> LatentModel:
        model = build(schema, *args, **options)
        reset_parameters(model)
        if not args and all(isinstance(v, str | int | float | bool | None | list | tuple) for v in options.values()):
            model.spec = {"name": build.__name__, "options": dict(options)}
        return model

    return cast("Callable[Concatenate[Schema, P], LatentModel]", wrapped)


def decoder(
    schema: Schema,
    latent: int,
    hidden: Sequence[int],
    likelihood: str | None,
    conditional: bool = False,
    shortcut: bool = False,
) -> Likelihood:
    """A likelihood with a fully connected decoder; linear where `hidden` is empty; see `nn.Shortcut`."""
    inputs = latent + (len(schema.features) if conditional else 0)
    outputs = outputs_of(schema, likelihood)
    net: nn.Module = mlp(inputs, hidden, outputs)
    if shortcut and hidden:
        net = Shortcut(net, inputs, outputs)
    return likelihood_for(schema, net, conditional, likelihood)


def basal_prior(kind: str, latent: int) -> StandardPrior:
    """The prior of a basal state: ``"standard"``, N(0, I), or ``"flat"``.

    Raises:
        ModelError: an unknown kind.
    """
    laws = {"flat": FlatPrior, "standard": StandardPrior}
    if kind not in laws:
        raise ModelError(f"unknown prior {kind!r}: use 'flat' or 'standard'")
    return laws[kind](latent)


def network_composition(
    schema: Schema, latent: int, hidden: Sequence[int], covariates: Sequence[str]
) -> CompositionShift:
    """net(r_e) + sum_j V_cov_j[cov_j]: dense effects of a network of the representation, and covariates."""
    effects = EnvironmentShift(mlp(len(schema.features), hidden, latent), Dense())
    return CompositionShift(effects, CovariateShift(schema, latent, covariates))


def sparsifier_for(kind: str, temperature: float, k: int) -> Sparsifier:
    """The sparsifier of a kind: ``"softmax"``, ``"top-k"`` or ``"dense"``.

    Raises:
        ModelError: an unknown kind.
    """
    if kind == "softmax":
        return SparseSoftmax(temperature)
    if kind == "top-k":
        return TopK(k)
    if kind == "dense":
        return Dense()
    raise ModelError(
        f"unknown sparsity {kind!r}: use 'softmax', 'top-k' or 'dense', or a learnt mask, 'one-of' or 'spike-slab'"
    )


def _mask(kind: str, latent: int, temperature: float, k: int) -> OneOf | SpikeSlab | None:
    """The learnt mask of a kind; None where the kind is a sparsifier's."""
    if kind == "one-of":
        return OneOf(temperature)
    if kind == "spike-slab":
        return SpikeSlab(k / latent, temperature)
    return None


def _environment_network(schema: Schema, hidden: Sequence[int], outputs: int, rate: float) -> nn.Module:
    net = mlp(len(schema.features), hidden, outputs)
    return net if rate == 1.0 else Scaled(net, rate)


def environment_prior(
    schema: Schema,
    latent: int,
    hidden: Sequence[int],
    kind: str,
    temperature: float,
    k: int,
    scale: bool,
    rate: float = 1.0,
) -> EnvironmentPrior | MaskedPrior:
    """p(z | e) with a network of r_e, sparse by a sparsifier or by a learnt mask (``"one-of"``, ``"spike-slab"``).

    Raises:
        ModelError: an unknown kind.
    """
    mask = _mask(kind, latent, temperature, k)
    if mask is None:
        net = _environment_network(schema, hidden, 2 * latent, rate)
        return EnvironmentPrior(net, latent, sparsifier_for(kind, temperature, k), scale)
    net = _environment_network(schema, hidden, (3 if scale else 2) * latent, rate)
    return MaskedPrior(net, latent, mask, len(schema.environments), scale)


def environment_shift(
    schema: Schema,
    latent: int,
    hidden: Sequence[int],
    kind: str,
    temperature: float,
    k: int,
    rate: float = 1.0,
) -> EnvironmentShift | MaskedShift:
    """A shift with a network of r_e; kinds as of `environment_prior`.

    Raises:
        ModelError: an unknown kind.
    """
    mask = _mask(kind, latent, temperature, k)
    if mask is None:
        net = _environment_network(schema, hidden, latent, rate)
        return EnvironmentShift(net, sparsifier_for(kind, temperature, k))
    net = _environment_network(schema, hidden, 2 * latent, rate)
    return MaskedShift(net, latent, mask, len(schema.environments))


def causal_layer(
    latent: int, mechanism: str, depth: int, graph: nx.DiGraph | None, edges: str = "all", cut: float = 0.05
) -> LatentSCM:
    """A causal layer over a given graph, or over `depth` layers each fully connected to the next.

    Args:
        latent: d.
        mechanism: ``"linear"`` or ``"network"``.
        depth: of the layers.
        graph: instead of the layers.
        edges: ``"all"`` of the graph; ``"gated"``: those of them that are stronger than `cut`; ``"order-free"``: any,
            the order is learnt too (linear, takes no graph).
        cut: see `edges`.

    Raises:
        ModelError: an unknown mechanism, a graph of another size, or edges that do not go with them.
    """
    if edges not in ("all", "gated", "order-free"):
        raise ModelError(f"unknown edges {edges!r}: use 'all', 'gated' or 'order-free'")
    if edges == "order-free":
        if mechanism != "linear" or graph is not None:
            raise ModelError("order-free edges are of a linear layer without a given graph: leave both options out")
        return OrderFreeSCM(latent, cut=cut)
    cut = cut if edges == "gated" else 0.0
    graph = graphs.layered(latent, min(depth, latent)) if graph is None else graph
    if len(graph) != latent:
        raise ModelError(f"the graph has {len(graph)} nodes and latent is {latent}: make them equal")
    if mechanism == "linear":
        return LinearSCM(graph, cut=cut)
    if mechanism == "network":
        return MechanismSCM(graph, cut=cut)
    raise ModelError(f"unknown mechanism {mechanism!r}: use 'linear' or 'network'")
