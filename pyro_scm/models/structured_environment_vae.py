"""Structured Environment VAE (seed sections 4.5 and 4.9)."""

from collections.abc import Sequence

import networkx as nx
from torch import nn

from pyro_scm.batch import Schema
from pyro_scm.model import LatentModel
from pyro_scm.models.building import causal_layer, decoder, environment_prior, recorded
from pyro_scm.nn import mlp
from pyro_scm.priors import Dense
from pyro_scm.regimes import TargetedPrior, regime_for


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
    edges: str = "all",
    cut: float = 0.05,
    interventions: str = "noise",
    targets: Sequence[str | None] | None = None,
    sparsity: str = "softmax",
    temperature: float = 1.0,
    k: int = 1,
    scale: bool = True,
    likelihood: str | None = None,
    shortcut: bool = False,
) -> LatentModel:
    """z | e ~ N(mu_bar_e, diag sigma_bar_e^2);  c_j = f_j(PA_j) + z_j;  x | c ~ p(x | decoder(c));  q(z | x, r_e).

    The Environment VAE's prior on the noise of a structural causal model: an environment moves one noise term and its
    descendants follow.

    Identified: the noise z as in the Environment VAE. The graph is not, as long as environments are noise
    interventions and the decoder is flexible (the decoder absorbs it); hard interventions identify it.
    `pyro_scm.identify` says which holds.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers; empty for a linear decoder.
        environment_hidden: widths of the environment network's hidden layers.
        mechanism: ``"linear"`` or ``"network"``.
        depth: layers of the default graph, each fully connected to the next.
        graph: any DAG of d nodes instead.
        edges: ``"all"`` of that graph, ``"gated"`` (learnt among them) or ``"order-free"`` (any DAG, linear); train
            with `EdgeSparsity` of `objectives.structure`, order-free ones with its `Acyclicity` too.
        cut: learnt edges not stronger than this are absent.
        interventions: what environments do to their targets: ``"noise"`` (its law), ``"hard"`` (parents cut, a law of
            its own) or ``"mechanism"`` (f_j rescaled, and its law).
        targets: of each environment of the schema where they are known: see `regimes.target_labels`; None for all
            unknown. Unknown ones are learnt by a sparse gate on r_e, except for ``"noise"``, where the prior is sparse.
        sparsity: ``"softmax"``, ``"top-k"`` or ``"dense"`` (for `unmix`); ``"one-of"`` or ``"spike-slab"``.
        temperature: T of the softmax; `fit(..., temperature=...)` may schedule it.
        k: latents that an environment may move, of top-k.
        scale: whether an environment also changes the scale of the noise.
        likelihood: see `likelihood_for`.
        shortcut: whether the decoder adds a linear map to its network, which keeps the latents' order: see `unmix`.
    """
    scm = causal_layer(latent, mechanism, depth, graph, edges, cut)
    acted, regime = regime_for(schema, scm.nodes, interventions, targets, environment_hidden, temperature)
    prior: nn.Module
    if acted is None:
        prior = environment_prior(schema, latent, environment_hidden, sparsity, temperature, k, scale)
    else:
        net = mlp(len(schema.features), environment_hidden, 2 * latent)
        prior = TargetedPrior(net, latent, acted, Dense(), scale, owner=regime is None)
    return LatentModel(prior, decoder(schema, latent, hidden, likelihood, shortcut=shortcut), scm=scm, regime=regime)
