"""Structured Environment VAE (seed sections 4.5 and 4.9)."""

from collections.abc import Sequence

import networkx as nx

from pyro_scm.batch import Schema
from pyro_scm.model import LatentModel
from pyro_scm.models.building import causal_layer, decoder, recorded, sparsifier_for
from pyro_scm.nn import mlp
from pyro_scm.priors import EnvironmentPrior


@recorded
def structured_environment_vae(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    environment_hidden: Sequence[int] = (128,),
    mechanism: str = "linear",
    depth: int = 4,
    graph: nx.DiGraph | None = None,
    sparsity: str = "softmax",
    temperature: float = 1.0,
    k: int = 1,
    scale: bool = True,
    likelihood: str | None = None,
) -> LatentModel:
    """z | e ~ N(mu_bar_e, diag sigma_bar_e^2);  c_j = f_j(PA_j) + z_j;  x | c ~ p(x | decoder(c));  q(z | x, r_e).

    The Environment VAE's prior on the noise of a structural causal model: an environment moves one noise term and its
    descendants follow.

    Identified: the noise z as in the Environment VAE. The graph is not, as long as environments are noise
    interventions and the decoder is flexible (the decoder absorbs it); hard interventions identify it.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers; empty for a linear decoder.
        environment_hidden: widths of the environment network's hidden layers.
        mechanism: ``"linear"`` or ``"network"``.
        depth: layers of the default graph, each fully connected to the next.
        graph: any DAG of d nodes instead.
        sparsity: ``"softmax"``, ``"top-k"`` or ``"dense"``.
        temperature: T of the softmax; `fit(..., temperature=...)` may schedule it.
        k: latents that an environment may move, of top-k.
        scale: whether an environment also changes the scale of the noise.
        likelihood: see `likelihood_for`.
    """
    net = mlp(len(schema.features), environment_hidden, 2 * latent)
    prior = EnvironmentPrior(net, latent, sparsifier_for(sparsity, temperature, k), scale)
    scm = causal_layer(latent, mechanism, depth, graph)
    return LatentModel(prior, decoder(schema, latent, hidden, likelihood), scm=scm)
