"""Environment VAE, "env prior" (seed section 4.5)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, environment_prior, recorded


@recorded
def environment_vae(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    environment_hidden: Sequence[int] = (128,),
    sparsity: str = "softmax",
    temperature: float = 1.0,
    k: int = 1,
    scale: bool = True,
    likelihood: str | None = None,
    shortcut: bool = False,
    effect_rate: float = 1.0,
) -> LatentModel:
    """z | e ~ N(mu_bar_e, diag sigma_bar_e^2);  c = z;  x | c ~ p(x | decoder(c));  guide q(z | x, r_e).

    mu_bar_e = mu_e * softmax(|mu_e| / T) and log sigma_bar_e = log sigma_e * softmax(|log sigma_e| / T), with mu_e and
    log sigma_e a network of r_e; a reference environment has N(0, I). In non-centred coordinates
    epsilon = (z - mu_bar_e) / sigma_bar_e this is the Translation VAE (sigma_bar_e = 1): the two differ in their guide.

    Identified: with sparse shifts of every latent, z up to permutation and scale; never a graph over it.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers; empty for a linear decoder.
        environment_hidden: widths of the environment network's hidden layers.
        sparsity: ``"softmax"``, ``"top-k"`` or ``"dense"`` (for `unmix`); or a mask learnt with its uncertainty:
            ``"one-of"`` (one latent an environment, a categorical target) or ``"spike-slab"`` (each latent by itself).
        temperature: T of the softmax, which `fit(..., temperature=...)` may schedule, or of a mask's relaxation.
        k: latents that an environment may move: of top-k; of spike-slab the number expected a priori.
        scale: whether an environment also changes the scale of the noise.
        likelihood: see `likelihood_for`.
        shortcut: whether the decoder adds a linear map to its network, which keeps the latents' order: see `unmix`.
        effect_rate: how many times as far the environments' effects move in a step of Adam as other outputs do. Effects
            of several standard deviations otherwise lag behind a decoder that is quick to put up with small ones.
    """
    prior = environment_prior(schema, latent, environment_hidden, sparsity, temperature, k, scale, effect_rate)
    return LatentModel(prior, decoder(schema, latent, hidden, likelihood, shortcut=shortcut))
