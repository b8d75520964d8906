"""CPA, the compositional perturbation autoencoder (Lotfollahi et al., Mol. Syst. Biol. 2023)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.composition import CompositionShift, CovariateShift, DosedShift
from pyro_scm.model import LatentModel
from pyro_scm.models.building import basal_prior, decoder, recorded


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
    `objectives.compositional`, which do not let z tell the perturbation. They are off unless asked for: in one held-out
    cell type of Kang's stimulated blood cells (5 seeds, experiments/adversary_helps.py) the predicted change had a
    Pearson correlation of .88 without and .78 with them; as published .37 and .47, no difference over seeds, and with
    ``independence`` (HSIC) in their place .59.

    Identified: V up to a rotation that the decoder takes back; see `unmix`.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers.
        doser: f_m: ``"linear"``, ``"sigmoid"``, ``"log-sigmoid"``, ``"hill"`` or ``"mlp"``; see `dosers`.
        doser_hidden: units of each perturbation's network, for ``"mlp"``.
        covariates: names of the cells' covariates that have an effect.
        prior: ``"standard"``, or ``"flat"`` for a point guide without regularisation.
        likelihood: see `likelihood_for`. As published ``"normal-per-cell"``: with a variance for each cell and gene the
            changes of held-out pairs (Norman et al. 2019) had a Pearson correlation of .42 (sd .19 over 5 seeds), with
            one for each gene .63 (.04 over 3 seeds).
        shortcut: whether the decoder adds a linear map to its network.
    """
    shift = CompositionShift(
        DosedShift(schema, latent, doser, doser_hidden), CovariateShift(schema, latent, covariates)
    )
    decoded = decoder(schema, latent, hidden, likelihood, shortcut=shortcut)
    return LatentModel(basal_prior(prior, latent), decoded, shift=shift)
