"""sVAE+, the sparse mechanism shift VAE (Lopez et al., CLeaR 2023)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.masks import LearntShare, MaskedPrior
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, recorded
from pyro_scm.nn import mlp


@recorded
def svae_plus(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    environment_hidden: Sequence[int] = (),
    concentration: float = 10.0,
    temperature: float = 1.0,
    opening: float = 5.0,
    likelihood: str | None = None,
    shortcut: bool = False,
) -> LatentModel:
    """w_j ~ Beta(1, K), m_ej ~ Bernoulli(w_j);  z_j | e ~ N(m_ej mu_ej, 1);  c = z;  x | c ~ p(x | decoder(c)).

    With a one-hot representation and no hidden layer mu and the masks' posterior are tables, as published; then nothing
    can be said of an unseen environment, and combinations do not compose (see `sams_vae`). A network of a molecule's
    features can.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers.
        environment_hidden: widths of the hidden layers of the network that gives mu_e and the masks' logits.
        concentration: K; the larger, the fewer environments move a latent.
        temperature: of the masks' relaxation.
        opening: added to the masks' logits, so that they start open.
        likelihood: see `likelihood_for`.
        shortcut: whether the decoder adds a linear map to its network.
    """
    mask = LearntShare(latent, concentration, temperature, opening)
    net = mlp(len(schema.features), environment_hidden, 2 * latent)
    prior = MaskedPrior(net, latent, mask, len(schema.environments), scale=False)
    return LatentModel(prior, decoder(schema, latent, hidden, likelihood, shortcut=shortcut))
