"""chemCPA: CPA whose perturbations are molecules (Hetzel et al., NeurIPS 2022)."""

from collections.abc import Sequence

from pyro_scm.batch import Schema
from pyro_scm.composition import CompositionShift, CovariateShift, MoleculeShift
from pyro_scm.errors import ModelError
from pyro_scm.model import LatentModel
from pyro_scm.models.building import basal_prior, decoder, recorded


@recorded
def chemcpa(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    molecule: str = "features",
    molecule_hidden: Sequence[int] = (128, 64),
    doser: str = "sigmoid",
    covariates: Sequence[str] = (),
    prior: str = "standard",
    likelihood: str | None = None,
    shortcut: bool = False,
) -> LatentModel:
    """z ~ N(0, I);  c = z + sum_p S(h_p, a_p) M(h_p) + sum_j V_cov_j[cov_j];  x | c ~ p(x | decoder(c));  h = G(drug).

    As `cpa`, but what a drug does is a function of its molecule, so that unseen drugs are predicted from SMILES alone:
    take the representation ``"molecules"`` (Morgan fingerprint, RDKit descriptors and dose of each part p of a
    combination), or ``("morgan", "descriptors", "dose")``, or rows of your own. A drug without SMILES is an error
    unless the cells are read with ``missing_smiles="zero"``. S is 0 at dose 0, which the published S is not.

    To pre-train on one data set and go on with another of other genes, see `transfer`.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers.
        molecule: ``"features"``, or ``"embedding"`` for a free h of each perturbation, which an unseen drug lacks.
        molecule_hidden: widths of G's layers; the last is the length of h.
        doser: S: ``"linear"``, ``"sigmoid"``, ``"log-sigmoid"``, ``"hill"`` or ``"mlp"``; see `dosers.AmortisedDoser`.
        covariates: names of the cells' covariates that have an effect.
        prior: ``"standard"``, or ``"flat"`` for a point guide without regularisation.
        likelihood: see `likelihood_for`; by default Normal with a variance for each cell and gene, as published, and
            negative binomial for counts. With ``"normal"`` changes under unseen drugs (TG-GATEs) correlated more (.23
            instead of .20, 5 seeds), but were far too large (R2 -1.2 instead of -.1).
        shortcut: whether the decoder adds a linear map to its network.

    Raises:
        ModelError: an unknown kind of molecule, or a representation that describes none.
    """
    if molecule not in ("features", "embedding"):
        raise ModelError(f"unknown kind of molecule {molecule!r}: use 'features' or 'embedding'")
    effects = MoleculeShift(schema, latent, molecule_hidden, doser, embedding=molecule == "embedding")
    shift = CompositionShift(effects, CovariateShift(schema, latent, covariates))
    kind = likelihood or (None if schema.counts else "normal-per-cell")
    decoded = decoder(schema, latent, hidden, kind, shortcut=shortcut)
    return LatentModel(basal_prior(prior, latent), decoded, shift=shift)
