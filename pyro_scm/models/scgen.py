"""scGen: latent arithmetic (Lotfollahi et al., Nat. Methods 2019)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.composition import CompositionShift, CovariateShift, DosedShift, ShiftedPrior
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, recorded


@recorded
def scgen(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    covariates: Sequence[str] = (),
    likelihood: str | None = None,
    shortcut: bool = False,
) -> LatentModel:
    """z | e ~ N(delta_e + sum_j V_cov_j[cov_j], I);  c = z;  x | c ~ p(x | decoder(c));  guide of x alone.

    scGen encodes control and perturbed cells, and adds the difference of their means, delta, to the codes of the cells
    that are to be predicted. Here the means are parameters of the prior: KL(q || p) is least where delta is the mean
    difference of the codes, so that ``counterfactual(environment=...)``, which holds z - delta, is that arithmetic. A
    KL weight as small as scGen's (5e-5) leaves codes to the reconstruction; with covariates the difference is that of
    cells alike in them, as scGen balances cell types. It knows no unseen perturbation.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers.
        covariates: names of the cells' covariates that move the codes too, such as the cell type.
        likelihood: see `likelihood_for`.
        shortcut: whether the decoder adds a linear map to its network.
    """
    means = CompositionShift(DosedShift(schema, latent), CovariateShift(schema, latent, covariates))
    return LatentModel(ShiftedPrior(means, latent), decoder(schema, latent, hidden, likelihood, shortcut=shortcut))
