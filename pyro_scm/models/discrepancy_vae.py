"""Discrepancy-VAE (Zhang et al., NeurIPS 2023)."""

from collections.abc import Sequence

from pyro_scm import graphs
from pyro_scm.attention import TargetedShift
from pyro_scm.batch import Schema
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder, recorded
from pyro_scm.priors import StandardPrior
from pyro_scm.scm import LinearSCM


@recorded
def discrepancy_vae(
    schema: Schema,
    *,
    latent: int = 20,
    hidden: Sequence[int] = (128,),
    environment_hidden: Sequence[int] = (128,),
    temperature: float = 1.0,
    cut: float = 0.0,
    likelihood: str | None = None,
    shortcut: bool = False,
) -> LatentModel:
    """z ~ N(0, I);  c = A c + z + sum_m a_em size_m softmax(t_m / T);  x | c ~ p(x | decoder(c));  guide of (x, r_e).

    An intervention encoder tells from the perturbation which latent it moves (softmax, softly one) and how far. A is
    strictly lower-triangular in the order of the latents, which are named by it. Train it with the objective that
    `objectives.discrepancy` makes: virtual intervened cells are to be distributed as real ones.

    Here all cells are reconstructed, by a guide that knows their environment; the published model reconstructs controls
    alone and sees perturbed cells only through the discrepancy.

    Identified: z up to permutation and scale where each latent is moved; A is not, under shifts of the noise and a
    flexible decoder, which absorbs it.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of the decoder's hidden layers.
        environment_hidden: widths of the intervention encoder's hidden layers.
        temperature: T; `fit(..., temperature=(1.0, 0.2))` anneals it as published.
        cut: entries of A that are not larger are 0.
        likelihood: see `likelihood_for`.
        shortcut: whether the decoder adds a linear map to its network.
    """
    return LatentModel(
        StandardPrior(latent),
        decoder(schema, latent, hidden, likelihood, shortcut=shortcut),
        scm=LinearSCM(graphs.full(latent), cut=cut),
        shift=TargetedShift(schema, latent, environment_hidden, temperature),
    )
