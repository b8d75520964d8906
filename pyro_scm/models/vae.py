"""Variational autoencoder."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, recorded
from pyro_scm.priors import StandardPrior


@recorded
def vae(
    schema: Schema, *, latent: int = 20, hidden: Sequence[int] = (128,), likelihood: str | None = None
) -> LatentModel:
    """z ~ N(0, I);  c = z;  x | c ~ p(x | decoder(c));  guide q(z | x).

    Knows nothing of environments; its latents come out rotated at random (seed section 6.1, figure 6).

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers; empty for a linear decoder.
        likelihood: see `likelihood_for`.
    """
    return LatentModel(StandardPrior(latent), decoder(schema, latent, hidden, likelihood))
