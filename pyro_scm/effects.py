"""What a fitted run says its environments do to the latents: shifts, attention, probabilities of learnt masks."""

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyro_scm.attention import AttentivePrior
from pyro_scm.errors import ModelError
from pyro_scm.masks import MaskedPrior, MaskedShift
from pyro_scm.run import Run, members
from pyro_scm.shifts import mover

__all__ = ["attention", "mask", "shifts"]


def shifts(run: Run) -> pd.DataFrame:
    """How far each environment moves the mean of each latent's noise, in standard deviations of the reference's noise.

    Args:
        run: from `fit` or `load`, of a model with an environment prior or an environment shift.

    Returns:
        One row a member and environment, one column a latent; 0 in reference environments. Latents of two members are
        not the same variables.

    Raises:
        ModelError: a model whose environments move nothing.
    """

    def read(model: Any, r: Tensor, perturbed: Tensor) -> Tensor:
        loc: Tensor = mover(model).moments(r, perturbed)[0]
        return loc

    return _table(run, read)


def attention(run: Run) -> pd.DataFrame:
    """alpha(e) of an Adversarial Prior autoencoder, whose largest entry names the latent that an environment moves.

    Args:
        run: from `fit` or `load`.

    Returns:
        One row a member and environment, one column a latent; each row is non-negative and sums to 1. Latents of two
        members are not the same variables.

    Raises:
        ModelError: a model without attention.
    """

    def read(model: Any, r: Tensor, perturbed: Tensor) -> Tensor:
        if not isinstance(model.prior, AttentivePrior):
            raise ModelError("this model has no attention: models.adversarial_prior_ae has")
        weights: Tensor = model.prior.attention(r)
        return weights

    return _table(run, read)


def mask(run: Run) -> pd.DataFrame:
    """Posterior probability q(m_ej = 1) that an environment moves a latent, of a model with a learnt mask.

    Args:
        run: from `fit` or `load`.

    Returns:
        One row a member and environment, one column a latent; 0 in reference environments.

    Raises:
        ModelError: a model without a mask.
    """

    def read(model: Any, r: Tensor, perturbed: Tensor) -> Tensor:
        for part in (model.prior, model.shift):
            if isinstance(part, MaskedPrior | MaskedShift):
                return part.probability(r, perturbed)
        raise ModelError("this model has no learnt mask: build it with sparsity='spike-slab' or 'one-of'")

    return _table(run, read)


def _table(run: Run, read: Any) -> pd.DataFrame:
    table = run.environments.table
    parts = {}
    for k, (model, _) in enumerate(members(run)):
        like = next(iter(model.parameters()))
        r = torch.as_tensor(run.environments.representation).to(like)
        perturbed = torch.as_tensor(~table["is_reference"].to_numpy(dtype=bool)).to(like)
        with torch.no_grad():
            values = read(model, r, perturbed).cpu().numpy()
        parts[k] = pd.DataFrame(values, index=table.index, columns=[str(n) for n in model.scm.nodes])  # type: ignore[union-attr]
    return pd.concat(parts, names=["member", "environment"])
