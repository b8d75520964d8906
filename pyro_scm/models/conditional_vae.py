"""Conditional VAE (Sohn et al. 2015; seed section 4.6)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.errors import ModelError
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, recorded
from pyro_scm.nn import mlp
from pyro_scm.priors import Dense, EnvironmentPrior, StandardPrior


@recorded
def conditional_vae(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    environment_hidden: Sequence[int] = (128,),
    prior: str = "standard",
    likelihood: str | None = None,
) -> LatentModel:
    """z ~ N(0, I);  c = z;  x | c, e ~ p(x | decoder(c, r_e));  guide q(z | x, r_e).

    The decoder reads the environment, so the mechanism c -> x is not invariant: the comparison that shows what
    x independent of e given c is worth. With a conditional prior, z | e ~ N(mu(r_e), diag sigma(r_e)^2) in every
    environment, the reference among them, as Sohn et al. write it.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers.
        environment_hidden: widths of the conditional prior's hidden layers.
        prior: ``"standard"`` or ``"conditional"``.
        likelihood: see `likelihood_for`.

    Raises:
        ModelError: an unknown prior.
    """
    if prior not in ("standard", "conditional"):
        raise ModelError(f"unknown prior {prior!r}: use 'standard' or 'conditional'")
    law = (
        EnvironmentPrior(mlp(len(schema.features), environment_hidden, 2 * latent), latent, Dense(), anchored=False)
        if prior == "conditional"
        else StandardPrior(latent)
    )
    return LatentModel(law, decoder(schema, latent, hidden, likelihood, conditional=True))
