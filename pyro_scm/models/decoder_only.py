"""Decoder-only network (Wu et al., PerturBench, 2024)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, network_composition, recorded
from pyro_scm.priors import NarrowPrior


@recorded
def decoder_only(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    environment_hidden: Sequence[int] = (128,),
    covariates: Sequence[str] = (),
    likelihood: str | None = None,
    shortcut: bool = False,
) -> LatentModel:
    """z ~ N(0, 0.01^2 I);  c = z + net(r_e) + sum_j V_cov_j[cov_j];  x | c ~ p(x | decoder(c));  no encoder.

    A cell is its condition: all cells of an environment and covariates have one distribution. Whatever another model
    says of single cells must do better than this.

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
    return LatentModel(NarrowPrior(latent), decoded, shift=shift)
