"""SAMS-VAE, the sparse additive mechanism shift VAE (Bereket and Karaletsos, NeurIPS 2023)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.composition import CompositionShift, CovariateShift
from pyro_scm.masks import MaskedEffects, SpikeSlab
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, recorded
from pyro_scm.priors import StandardPrior


@recorded
def sams_vae(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    share: float = 0.1,
    width: float = 1.0,
    temperature: float = 1.0,
    opening: float = 2.0,
    covariates: Sequence[str] = (),
    likelihood: str | None = None,
    shortcut: bool = False,
) -> LatentModel:
    """z ~ N(0, I);  m_tj ~ Bernoulli(p), e_t ~ N(0, s^2 I);  c = z + sum_t a_t m_t * e_t;  x | c ~ p(x | decoder(c)).

    Each perturbation t moves few latents; combinations add. Masks and effects have a factorised posterior and are drawn
    once a step. The KL of a mask is that of its hard value, and counts once for the data set, not once a cell.

    Masks do not become sparse by themselves: the fitted latents are rotated. Fit `cpa` instead, `unmix` it, and read
    the targets off its effects, where it is the targets that are asked for.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers.
        share: p, the prior probability that a perturbation moves a latent.
        width: s, the prior scale of effects.
        temperature: of the masks' relaxation.
        opening: added to the masks' logits, so that they start open.
        covariates: names of the cells' covariates that have an effect.
        likelihood: see `likelihood_for`.
        shortcut: whether the decoder adds a linear map to its network.
    """
    effects = MaskedEffects(schema, latent, SpikeSlab(share, temperature, opening), width)
    shift = CompositionShift(effects, CovariateShift(schema, latent, covariates))
    decoded = decoder(schema, latent, hidden, likelihood, shortcut=shortcut)
    return LatentModel(StandardPrior(latent), decoded, shift=shift)
