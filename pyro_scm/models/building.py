"""What the named models share: networks of the usual sizes, and a record of how a model was built."""

import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, cast

import networkx as nx

from pyro_scm import graphs
from pyro_scm.batch import Schema
from pyro_scm.errors import ModelError
from pyro_scm.likelihoods import Likelihood, likelihood_for
from pyro_scm.model import LatentModel
from pyro_scm.nn import mlp, reset_parameters
from pyro_scm.priors import Dense, SparseSoftmax, Sparsifier, TopK
from pyro_scm.scm import LatentSCM, LinearSCM, MechanismSCM

__all__ = ["causal_layer", "decoder", "recorded", "sparsifier_for"]

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
    schema: Schema, latent: int, hidden: Sequence[int], likelihood: str | None, conditional: bool = False
) -> Likelihood:
    """A likelihood with a fully connected decoder; linear where `hidden` is empty."""
    inputs = latent + (len(schema.features) if conditional else 0)
    return likelihood_for(schema, mlp(inputs, hidden, len(schema.genes)), conditional, likelihood)


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
    raise ModelError(f"unknown sparsity {kind!r}: use 'softmax', 'top-k' or 'dense'")


def causal_layer(latent: int, mechanism: str, depth: int, graph: nx.DiGraph | None) -> LatentSCM:
    """A causal layer over a given graph, or over `depth` layers each fully connected to the next.

    Raises:
        ModelError: an unknown mechanism, or a graph of another size.
    """
    graph = graphs.layered(latent, min(depth, latent)) if graph is None else graph
    if len(graph) != latent:
        raise ModelError(f"the graph has {len(graph)} nodes and latent is {latent}: make them equal")
    if mechanism == "linear":
        return LinearSCM(graph)
    if mechanism == "network":
        return MechanismSCM(graph)
    raise ModelError(f"unknown mechanism {mechanism!r}: use 'linear' or 'network'")
