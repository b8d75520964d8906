"""CPA, the compositional perturbation autoencoder (Lotfollahi et al., Mol. Syst. Biol. 2023)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.composition import CompositionShift, CovariateShift, DosedShift
from pyro_scm.model import LatentModel
from pyro_scm.models.building import basal_prior, decoder, per_cell, recorded


@recorded
def cpa(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    doser: str = "linear",
    doser_hidden: int = 32,
    covariates: Sequence[str] = (),
    prior: str = "standard",
    likelihood: str | None = None,
    shortcut: bool = False,
) -> LatentModel:
    """z ~ N(0, I);  c = z + sum_m f_m(a_em) V[m] + sum_j V_cov_j[cov_j];  x | c ~ p(x | decoder(c));  guide (x, r_e).

    z is the basal state. a_em is the dose of perturbation m: take the representation ``"multi-dose"`` (uM) or
    ``"multi-hot"`` (log10(1 + uM); 1 in genetic screens); combinations add. Cell line and time that the representation
    holds, and the cells' own `covariates`, add vectors of their own.

    By default it is variational (CPA-VAE) and its guide reads the environment, without which z cannot be told from c.
    As published: ``prior="flat"``, a point guide of x alone (``family="point", inputs=("x",)``) and the adversaries of
    `objectives.compositional`, which do not let z tell the perturbation. They are off unless asked for.

    Identified: V up to a rotation that the decoder takes back; see `unmix`.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers.
        doser: f_m: ``"linear"``, ``"sigmoid"``, ``"log-sigmoid"``, ``"hill"`` or ``"mlp"``; see `dosers`.
        doser_hidden: units of each perturbation's network, for ``"mlp"``.
        covariates: names of the cells' covariates that have an effect.
        prior: ``"standard"``, or ``"flat"`` for a point guide without regularisation.
        likelihood: see `likelihood_for`; by default Normal with a variance for each cell, negative binomial for counts.
        shortcut: whether the decoder adds a linear map to its network.
    """
    shift = CompositionShift(
        DosedShift(schema, latent, doser, doser_hidden), CovariateShift(schema, latent, covariates)
    )
    decoded = decoder(schema, latent, hidden, per_cell(schema, likelihood), shortcut=shortcut)
    return LatentModel(basal_prior(prior, latent), decoded, shift=shift)
