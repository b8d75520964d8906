"""Structured Translation VAE (seed sections 4.8 and 4.9)."""

from collections.abc import Sequence

import networkx as nx

from pyro_scm.batch import Schema
from pyro_scm.model import LatentModel
from pyro_scm.models.building import causal_layer, decoder, recorded, sparsifier_for
from pyro_scm.nn import mlp
from pyro_scm.priors import StandardPrior
from pyro_scm.shifts import EnvironmentShift


@recorded
def structured_translation_vae(
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
    likelihood: str | None = None,
) -> LatentModel:
    """z ~ N(0, I);  c_j = f_j(PA_j) + z_j + mu_bar_e,j;  x | c ~ p(x | decoder(c));  q(z | x, r_e).

    The Translation VAE's shift applied to the noise of a structural causal model. What is identified is said under
    `structured_environment_vae`.

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
        likelihood: see `likelihood_for`.
    """
    shift = EnvironmentShift(
        mlp(len(schema.features), environment_hidden, latent), sparsifier_for(sparsity, temperature, k)
    )
    scm = causal_layer(latent, mechanism, depth, graph)
    return LatentModel(StandardPrior(latent), decoder(schema, latent, hidden, likelihood), scm=scm, shift=shift)
