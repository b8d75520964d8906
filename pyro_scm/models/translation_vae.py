"""Translation VAE, "env trans" (seed section 4.8)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, recorded, sparsifier_for
from pyro_scm.nn import mlp
from pyro_scm.priors import StandardPrior
from pyro_scm.shifts import EnvironmentShift


@recorded
def translation_vae(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    environment_hidden: Sequence[int] = (128,),
    sparsity: str = "softmax",
    temperature: float = 1.0,
    k: int = 1,
    likelihood: str | None = None,
) -> LatentModel:
    """Z ~ N(0, I);  c = z + mu_bar_e;  x | c ~ p(x | decoder(c));  guide q(z | x).

    The guide predicts only what does not depend on the environment. In centred coordinates c this is the Environment
    VAE with sigma_bar_e = 1.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers; empty for a linear decoder.
        environment_hidden: widths of the environment network's hidden layers.
        sparsity: ``"softmax"``, ``"top-k"`` or ``"dense"``.
        temperature: T of the softmax; `fit(..., temperature=...)` may schedule it.
        k: latents that an environment may move, of top-k.
        likelihood: see `likelihood_for`.
    """
    shift = EnvironmentShift(
        mlp(len(schema.features), environment_hidden, latent), sparsifier_for(sparsity, temperature, k)
    )
    return LatentModel(StandardPrior(latent), decoder(schema, latent, hidden, likelihood), shift=shift)
