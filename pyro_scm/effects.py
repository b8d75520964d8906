"""What a fitted run says its environments do to the latents: shifts, attention, probabilities of learnt masks."""

from dataclasses import dataclass
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


FloatArray = NDArray[np.float64]

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
    their estimates from 0 (few cells, a decoder that is not quite right), and N(+-m, s1^2) with equal signs in the
    others, with m = 0 unless the shifts say otherwise (BIC). Their share, m, s0 and s1 are fitted to each latent's
    shifts by expectation maximisation: nothing has to be said of sizes.
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
        shown = values[k, asked].T
        around = [[_TwoGroups.of(m, spread_out) for m in shown] for spread_out in (True, False)]
        # a size of its own has to be worth its parameters (BIC), judged by all latents together
        worth = [sum(g.log_likelihood(m) for g, m in zip(groups, shown, strict=True)) for groups in around]
        chosen = around[int(worth[1] - worth[0] > 0.5 * len(shown) * np.log(len(shown[0])))]
        out[k, perturbed] = np.stack([g.probability(values[k, perturbed, j]) for j, g in enumerate(chosen)], 1)
    return pd.DataFrame(out.reshape(table.shape), index=table.index, columns=table.columns)


@dataclass(frozen=True)
class _TwoGroups:
    """share of N(+-centre, spread^2), the rest N(0, null^2)."""

    share: float
    null: float
    centre: float
    spread: float

    def _densities(self, m: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Log densities, weighted, of the null and of both signs of the moved."""

        def normal(centre: float, spread: float) -> FloatArray:
            result: FloatArray = -0.5 * ((m - centre) / spread) ** 2 - np.log(spread)
            return result

        moved = np.log(self.share / 2)
        return (
            np.log1p(-self.share) + normal(0, self.null),
            moved + normal(self.centre, self.spread),
            moved + normal(-self.centre, self.spread),
        )

    def probability(self, m: FloatArray) -> FloatArray:
        """P(moved | m)."""
        null, plus, minus = self._densities(m)
        odds = np.logaddexp(plus, minus) - null
        return 1 / (1 + np.exp(-np.clip(odds, -700, 700)))

    def log_likelihood(self, m: FloatArray) -> float:
        """Of all shifts, up to a constant."""
        null, plus, minus = self._densities(m)
        return float(np.logaddexp(null, np.logaddexp(plus, minus)).sum())

    @staticmethod
    def of(m: FloatArray, spread_out: bool) -> "_TwoGroups":
        """By expectation maximisation.

        Args:
            m: ``[E]``.
            spread_out: whether the moved are around 0 too, only wider.
        """
        size = np.sort(np.abs(m))
        least = max(1e-3 * float(size[-1]), 1e-12)
        large = size[-max(len(m) // 5, 1) :]
        null = max(float(np.median(size)) / 0.6745, least)
        centre = 0.0 if spread_out else float(large.mean())
        fit = _TwoGroups(0.2, null, centre, max(float(np.sqrt(np.mean((large - centre) ** 2))), null, least))
        for _ in range(_EM_STEPS):
            null_, plus, minus = fit._densities(m)
            total = np.logaddexp(null_, np.logaddexp(plus, minus))
            off, up, down = (np.exp(v - total) for v in (null_, plus, minus))
            on = max(float((up + down).sum()), 1e-12)
            centre = 0.0 if spread_out else abs(float(((up - down) * m).sum())) / on
            variance = float((up * (m - centre) ** 2 + down * (m + centre) ** 2).sum()) / on
            null = max(float(np.sqrt((off * m**2).sum() / max(off.sum(), 1.0))), least)
            spread = max(float(np.sqrt(variance)), null)  # what blurs the null blurs the others too
            if centre**2 + spread**2 < (_APART * null) ** 2:  # one group in truth: keep the other apart from it
                spread = max(spread, float(np.sqrt((_APART * null) ** 2 - centre**2)))
            share = float(np.clip(on / len(m), 1 / (len(m) + 2), 1 - 1 / (len(m) + 2)))
            fit = _TwoGroups(share, null, centre, spread)
        return fit


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
