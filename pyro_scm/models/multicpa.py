"""MultiCPA: CPA of expression and surface proteins (Inecik et al., 2022)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.composition import CompositionShift, CovariateShift, DosedShift
from pyro_scm.errors import ModelError
from pyro_scm.likelihoods import ProteinMixture
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, recorded
from pyro_scm.nn import mlp
from pyro_scm.priors import StandardPrior


@recorded
def multicpa(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    protein_hidden: Sequence[int] = (64,),
    doser: str = "linear",
    doser_hidden: int = 32,
    covariates: Sequence[str] = (),
    likelihood: str | None = None,
    shortcut: bool = False,
) -> LatentModel:
    """z ~ N(0, I);  c = z + sum_m f_m(a_em) V[m] + sum_j V_cov_j[cov_j];  x | c ~ NB;  y | c ~ two NB.

    Proteins y are a mixture of two negative binomials, background and foreground, see `ProteinMixture`. The guide reads
    both modalities, counts as log(1 + count): side by side (``family="normal"``, ``inputs=("x", "y", "e")``), or as a
    product of an expert each and the prior (``family="product"``), which leaves out what was not measured in a cell.
    Proteins may be missing in any of the cells (rows of NaN), in training too; ``counterfactual(..., site="y")``
    predicts them.

    Args:
        schema: of the training cells, read with ``proteins=KEY``.
        latent: d.
        hidden: widths of the hidden layers of the decoder of expression.
        protein_hidden: of the decoder of proteins.
        doser: see `cpa`.
        doser_hidden: see `cpa`.
        covariates: names of the cells' covariates that have an effect.
        likelihood: of expression, see `likelihood_for`: negative binomial for counts.
        shortcut: whether the decoder of expression adds a linear map to its network.

    Raises:
        ModelError: cells without proteins.
    """
    if not schema.proteins:
        raise ModelError("the cells have no proteins: name the obsm entry that holds them (proteins=KEY)")
    shift = CompositionShift(
        DosedShift(schema, latent, doser, doser_hidden), CovariateShift(schema, latent, covariates)
    )
    genes = decoder(schema, latent, hidden, likelihood, shortcut=shortcut)
    proteins = ProteinMixture(mlp(latent, protein_hidden, 2 * len(schema.proteins)), schema)
    return LatentModel(StandardPrior(latent), [genes, proteins], shift=shift)
