"""What a fitted run says its environments do to the latents: shifts, attention, probabilities of learnt masks."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_scm.attention import AttentivePrior
from pyro_scm.errors import DataError, ModelError
from pyro_scm.masks import MaskedPrior, MaskedShift
from pyro_scm.run import Run, members
from pyro_scm.shifts import mover

__all__ = ["attention", "inclusion", "mask", "shifts"]


_APART = 3.0  # times the null's spread: a group that is not wider is not one of moved latents
_EM_STEPS = 200


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


def inclusion(run: Run) -> pd.DataFrame:
    """Posterior probability that an environment moves a latent, from the shifts of all environments together.

    The shifts of a latent are a mixture: N(0, s0^2) in environments that do not move it, where s0 is whatever keeps
    their estimates from 0 (few cells, a decoder that is not quite right), and N(0, s1^2) in the others. The share
    of the others, s0 and s1 are fitted to each latent's shifts by expectation maximisation: no size has to be given.
    Efron, "Large-scale simultaneous hypothesis testing: the choice of a null hypothesis", JASA 2004.

    Meant for latents in sparse coordinates (`pyro_scm.unmix`) and ten environments or more; a latent that more than
    half of the environments move has no null to compare with.

    Args:
        run: from `fit`, `load`, `unmix` or `refine`.

    Returns:
        As of `shifts`; 0 in reference environments.

    Raises:
        ModelError: a model whose environments move nothing.
        DataError: fewer than 4 perturbed environments that were trained on.
    """
    table = shifts(run)
    environments = run.environments.table
    asked = (environments["trained"] & ~environments["is_reference"]).to_numpy(dtype=bool)
    if asked.sum() < 4:
        raise DataError(f"{int(asked.sum())} perturbed environments: give at least 4, among which some move a latent")
    values = table.to_numpy(np.float64).reshape(len(run), len(environments), -1)
    out = np.zeros_like(values)
    perturbed = ~environments["is_reference"].to_numpy(dtype=bool)
    for k in range(len(values)):
        for j in range(values.shape[2]):
            share, null, moved = _two_groups(values[k, asked, j])
            out[k, perturbed, j] = _responsibility(values[k, perturbed, j], share, null, moved)
    return pd.DataFrame(out.reshape(table.shape), index=table.index, columns=table.columns)


def _responsibility(m: NDArray[np.float64], share: float, null: float, moved: float) -> NDArray[np.float64]:
    """P(moved | m) where share of m ~ N(0, moved^2) and the rest ~ N(0, null^2)."""
    odds = np.log(share / (1 - share)) + np.log(null / moved) + 0.5 * m**2 * (null**-2 - moved**-2)
    result: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(odds, -700, 700)))
    return result


def _two_groups(m: NDArray[np.float64]) -> tuple[float, float, float]:
    """Share, and standard deviations of both groups."""
    size = np.abs(m)
    null = max(float(np.median(size)) / 0.6745, 1e-3 * float(size.max()), 1e-12)
    moved = max(float(np.sqrt(np.mean(np.sort(size)[-max(len(m) // 5, 1) :] ** 2))), _APART * null)
    share = 0.2
    for _ in range(_EM_STEPS):
        on = _responsibility(m, share, null, moved)
        share = float(np.clip(on.mean(), 1 / (len(m) + 2), 1 - 1 / (len(m) + 2)))
        null = max(float(np.sqrt(((1 - on) * m**2).sum() / max((1 - on).sum(), 1.0))), 1e-3 * float(size.max()), 1e-12)
        moved = max(float(np.sqrt((on * m**2).sum() / max(on.sum(), 1e-12))), _APART * null)
    return share, null, moved


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
