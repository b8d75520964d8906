"""Structured Translation VAE (seed sections 4.8 and 4.9)."""

from collections.abc import Sequence

import networkx as nx
from torch import nn

from pyro_scm.batch import Schema
from pyro_scm.model import LatentModel
from pyro_scm.models.building import causal_layer, decoder, environment_shift, recorded
from pyro_scm.nn import mlp
from pyro_scm.priors import Dense, StandardPrior
from pyro_scm.regimes import TargetedShift, regime_for
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
    edges: str = "all",
    cut: float = 0.05,
    interventions: str = "noise",
    targets: Sequence[str | None] | None = None,
    sparsity: str = "softmax",
    temperature: float = 1.0,
    k: int = 1,
    likelihood: str | None = None,
    shortcut: bool = False,
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
        likelihood: see `likelihood_for`.
        shortcut: whether the decoder adds a linear map to its network, which keeps the latents' order: see `unmix`.
    """
    scm = causal_layer(latent, mechanism, depth, graph, edges, cut)
    acted, regime = regime_for(schema, scm.nodes, interventions, targets, environment_hidden, temperature)
    shift: nn.Module
    if acted is None:
        shift = environment_shift(schema, latent, environment_hidden, sparsity, temperature, k)
    else:
        net = mlp(len(schema.features), environment_hidden, latent)
        shift = TargetedShift(EnvironmentShift(net, Dense()), acted, owner=regime is None)
    likelihoods = decoder(schema, latent, hidden, likelihood, shortcut=shortcut)
    return LatentModel(StandardPrior(latent), likelihoods, scm=scm, shift=shift, regime=regime)
