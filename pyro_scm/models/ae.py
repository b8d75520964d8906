"""Autoencoder."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, recorded
from pyro_scm.priors import FlatPrior


@recorded
def ae(
    schema: Schema, *, latent: int = 20, hidden: Sequence[int] = (128,), likelihood: str | None = None
) -> LatentModel:
    """z flat;  c = z;  x | c ~ p(x | decoder(c));  guide: z = encoder(x), a point.

    No prior and no noise in the code: the reference that every variational model is compared with. To be used with
    ``amortise(..., family="point")``.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers; empty for a linear decoder.
        likelihood: see `likelihood_for`.
    """
    return LatentModel(FlatPrior(latent), decoder(schema, latent, hidden, likelihood))
