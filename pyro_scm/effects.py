"""What a fitted run says its environments do to the latents: shifts, attention, probabilities of learnt masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_scm.attention import AttentivePrior
from pyro_scm.errors import DataError, ModelError
from pyro_scm.masks import MaskedEffects, MaskedPrior, MaskedShift
from pyro_scm.run import Run, members
from pyro_scm.shifts import mover

__all__ = ["attention", "groups", "inclusion", "mask", "probabilities", "shifts"]


FloatArray = NDArray[np.float64]

_APART = 3.0  # times the null's spread: a group that is not wider is not one of moved latents
_EM_STEPS = 200
_OFFSET_STEPS = 5


def shifts(run: Run) -> pd.DataFrame:
    """How far each environment moves the mean of each latent's noise, in standard deviations of the reference's noise.

    Args:
        run: from `fit` or `load`, of a model with an environment prior or an environment shift.

    Returns:
        One row a member and environment, one column a latent; 0 in reference environments. Latents of two members are
        not the same variables.

    Raises:
        ModelError: a model whose environments move nothing.

    Example:
        >>> table = shifts(run)
        >>> table.shape, bool((table.xs("control", level=1) == 0).all(axis=None))  # 0 in the reference
        ((18, 2), True)
    """

    def read(model: Any, r: Tensor, perturbed: Tensor) -> Tensor:
        loc: Tensor = mover(model).moments(r, perturbed)[0]
        return loc

    return _table(run, read)


def inclusion(run: Run, *, offset: bool = False) -> pd.DataFrame:
    """Posterior probability that an environment moves a latent, from the shifts of all environments together.

    The shifts of a latent are a mixture: N(0, s0^2 + 1/n_e + 1/n_0) in environments that do not move it, where n_e and
    n_0 are the numbers of cells of the environment and of the references, and s0 is whatever else keeps estimates from
    0 (a decoder that is not quite right); and N(+-m, s1^2) with equal signs in the
    others, with m = 0 unless the shifts say otherwise (BIC). Their share, m, s0 and s1 are fitted to each latent's
    shifts by expectation maximisation: nothing has to be said of sizes.
    Efron, "Large-scale simultaneous hypothesis testing: the choice of a null hypothesis", JASA 2004.

    Meant for latents in sparse coordinates (`pyro_scm.unmix`) and ten environments or more; a latent that more than
    half of the environments move has no null to compare with.

    Args:
        run: from `fit`, `load`, `unmix` or `refine`.
        offset: whether perturbed environments that do not move a latent have N(o, s0^2) instead, o an offset of each
            latent that is fitted too: on real screens untreated cells differ from those of null perturbations.

    Returns:
        As of `shifts`; 0 in reference environments.

    Raises:
        ModelError: a model whose environments move nothing.
        DataError: fewer than 4 perturbed environments that were trained on.
    """
    table = shifts(run)
    values, error, asked = _trained(run)
    out = np.zeros_like(values)
    perturbed = ~run.environments.table["is_reference"].to_numpy(dtype=bool)
    for k in range(len(values)):
        if offset:
            values[k] -= [_offset(m, error[asked]) for m in values[k, asked].T]
        fits = _fits(values[k, asked].T, error[asked])
        out[k, perturbed] = _read(fits, values[k, perturbed], error[perturbed])
    return pd.DataFrame(out.reshape(table.shape), index=table.index, columns=table.columns)


def probabilities(values: FloatArray, error: FloatArray | None = None) -> FloatArray:
    """Inclusion probabilities of effects that come from no run, as `inclusion` has them.

    Args:
        values: ``[E, d]`` of perturbed environments.
        error: ``[E]`` known standard deviations of an environment's effects; 0 by default.

    Returns:
        ``[E, d]``.
    """
    known = np.zeros(len(values)) if error is None else error
    return _read(_fits(values.T, known), values, known)


def groups(run: Run) -> dict[str, float]:
    """Share, spike, size and spread (with errors) of the two groups of `inclusion`, medians over latents and members.

    First values of `EffectSpikeSlab`.

    Args:
        run: see `inclusion`.

    Raises:
        ModelError, DataError: see `inclusion`.
    """
    values, error, asked = _trained(run)
    fits = [g for member in values for g in _fits(member[asked].T, error[asked])]
    usual = float(np.median(error[asked]))
    middle = {
        name: float(np.median([getattr(g, name) for g in fits])) for name in ("share", "null", "centre", "spread")
    }
    spike, spread = (float(np.hypot(middle[name], usual)) for name in ("null", "spread"))
    return {"share": middle["share"], "spike": spike, "size": middle["centre"], "spread": spread}


def _trained(run: Run) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Shifts ``[K, E, d]``, their errors ``[E]``, and which environments are perturbed and were trained on."""
    environments = run.environments.table
    asked = (environments["trained"] & ~environments["is_reference"]).to_numpy(dtype=bool)
    if asked.sum() < 4:
        raise DataError(f"{int(asked.sum())} perturbed environments: give at least 4, among which some move a latent")
    values = shifts(run).to_numpy(np.float64).reshape(len(run), len(environments), -1)
    return values, _errors(environments), asked


def _errors(environments: pd.DataFrame) -> FloatArray:
    """``[E]`` sd of a difference of means of noise, of an environment's cells and the references'.

    Their least even for a decoder that is right. 0 where numbers of cells are not known.
    """
    if "cells" not in environments:
        return np.zeros(len(environments))
    number = pd.to_numeric(environments["cells"]).fillna(0).to_numpy(dtype=np.float64)
    own = np.divide(1.0, number, out=np.zeros_like(number), where=number > 0)
    references = number[environments["is_reference"].to_numpy(dtype=bool)].sum()
    result: FloatArray = np.sqrt(own + (1 / references if references else 0.0))
    return result


def _fits(shown: FloatArray, error: FloatArray) -> "list[_TwoGroups]":
    """Groups of each latent's shifts ``[d, E]``."""
    around = [[_TwoGroups.of(m, error, spread_out) for m in shown] for spread_out in (True, False)]
    # a size of its own has to be worth its parameters (BIC), judged by all latents together
    worth = [sum(g.log_likelihood(m, error) for g, m in zip(fits, shown, strict=True)) for fits in around]
    return around[int(worth[1] - worth[0] > 0.5 * len(shown) * np.log(len(shown[0])))]


def _read(fits: "Sequence[_TwoGroups]", values: FloatArray, error: FloatArray) -> FloatArray:
    """Probabilities ``[E, d]``, each latent by its own groups."""
    return np.stack([g.probability(m, error) for g, m in zip(fits, values.T, strict=True)], 1)


def _offset(m: FloatArray, error: FloatArray) -> float:
    """Mean of the shifts that are not moved, each by its probability."""
    found = float(np.median(m))
    for _ in range(_OFFSET_STEPS):
        off = 1 - _TwoGroups.of(m - found, error, spread_out=True).probability(m - found, error)
        found = float(off @ m / off.sum())
    return found


@dataclass(frozen=True)
class _TwoGroups:
    """share of N(+-centre, spread^2 + error_e^2), the rest N(0, null^2 + error_e^2), in environment e."""

    share: float
    null: float
    centre: float
    spread: float

    def _densities(self, m: FloatArray, error: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Log densities, weighted, of the null and of both signs of the moved."""

        def normal(centre: float, spread: float) -> FloatArray:
            sd = np.hypot(spread, error)
            result: FloatArray = -0.5 * ((m - centre) / sd) ** 2 - np.log(sd)
            return result

        moved = np.log(self.share / 2)
        return (
            np.log1p(-self.share) + normal(0, self.null),
            moved + normal(self.centre, self.spread),
            moved + normal(-self.centre, self.spread),
        )

    def probability(self, m: FloatArray, error: FloatArray) -> FloatArray:
        """P(moved | m)."""
        null, plus, minus = self._densities(m, error)
        odds = np.logaddexp(plus, minus) - null
        return 1 / (1 + np.exp(-np.clip(odds, -700, 700)))

    def log_likelihood(self, m: FloatArray, error: FloatArray) -> float:
        """Of all shifts, up to a constant."""
        null, plus, minus = self._densities(m, error)
        return float(np.logaddexp(null, np.logaddexp(plus, minus)).sum())

    @staticmethod
    def of(m: FloatArray, error: FloatArray, spread_out: bool) -> "_TwoGroups":
        """By expectation maximisation.

        Args:
            m: ``[E]``.
            error: ``[E]`` known sd of each.
            spread_out: whether the moved are around 0 too, only wider.
        """
        size = np.sort(np.abs(m))
        least = max(1e-3 * float(size[-1]), 1e-12)
        usual = float(np.median(error))
        large = size[-max(len(m) // 5, 1) :]
        null = max(float(np.median(size)) / 0.6745, least)
        centre = 0.0 if spread_out else float(large.mean())
        fit = _TwoGroups(0.2, null, centre, max(float(np.sqrt(np.mean((large - centre) ** 2))), null, least))
        for _ in range(_EM_STEPS):
            null_, plus, minus = fit._densities(m, error)
            total = np.logaddexp(null_, np.logaddexp(plus, minus))
            off, up, down = (np.exp(v - total) for v in (null_, plus, minus))
            on = max(float((up + down).sum()), 1e-12)
            centre = 0.0 if spread_out else abs(float(((up - down) * m).sum())) / on
            # moments less the known errors: near the maximum of the likelihood, and never below 0
            beyond = up * ((m - centre) ** 2 - error**2) + down * ((m + centre) ** 2 - error**2)
            null = float(np.sqrt(max((off * (m**2 - error**2)).sum() / max(off.sum(), 1.0), least**2)))
            # what blurs the null blurs the others too
            spread = max(float(np.sqrt(max(beyond.sum() / on, 0.0))), null)
            apart = (_APART * float(np.hypot(null, usual))) ** 2 - usual**2
            if centre**2 + spread**2 < apart:  # one group in truth: keep the other apart from it
                spread = max(spread, float(np.sqrt(max(apart - centre**2, 0.0))))
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
        for part in (model.prior, model.shift, getattr(model.shift, "effects", None)):
            if isinstance(part, MaskedPrior | MaskedShift | MaskedEffects):
                return part.probability(r, perturbed)
        raise ModelError("this model has no learnt mask: build it with sparsity='spike-slab' or 'one-of', or sams_vae")

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
