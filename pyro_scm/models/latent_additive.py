"""Latent-additive network (Wu et al., PerturBench, 2024)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, network_composition, recorded
from pyro_scm.priors import StandardPrior


@recorded
def latent_additive(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    environment_hidden: Sequence[int] = (128,),
    covariates: Sequence[str] = (),
    likelihood: str | None = None,
    shortcut: bool = False,
) -> LatentModel:
    """z ~ N(0, I);  c = z + net(r_e) + sum_j V_cov_j[cov_j];  x | c ~ p(x | decoder(c));  guide reads control cells.

    The published network maps a control cell, matched at random, and a perturbation to a perturbed cell. What such a
    match tells of the perturbed cell is its covariates, so here the state z of perturbed cells is drawn from the prior
    and that of control cells inferred (guide family ``"reference"``): unlike in `cpa`, it cannot take over what the
    perturbation does, and nothing has to keep it from that.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers.
        environment_hidden: widths of the perturbation encoder's hidden layers.
        covariates: names of the cells' covariates that have an effect.
        likelihood: see `likelihood_for`.
        shortcut: whether the decoder adds a linear map to its network.
    """
    shift = network_composition(schema, latent, environment_hidden, covariates)
    decoded = decoder(schema, latent, hidden, likelihood, shortcut=shortcut)
    return LatentModel(StandardPrior(latent), decoded, shift=shift)
