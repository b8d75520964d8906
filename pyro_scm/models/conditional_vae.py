"""Conditional VAE (Sohn et al. 2015; seed section 4.6)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, recorded
from pyro_scm.priors import StandardPrior


@recorded
def conditional_vae(
    schema: Schema, *, latent: int = 20, hidden: Sequence[int] = (128,), likelihood: str | None = None
) -> LatentModel:
    """z ~ N(0, I);  c = z;  x | c, e ~ p(x | decoder(c, r_e));  guide q(z | x, r_e).

    The decoder reads the environment, so the mechanism c -> x is not invariant: the comparison that shows what
    x independent of e given c is worth.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers.
        likelihood: see `likelihood_for`.
    """
    return LatentModel(StandardPrior(latent), decoder(schema, latent, hidden, likelihood, conditional=True))
