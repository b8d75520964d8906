"""Which latents are used, and whether the members of an ensemble say the same."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyro_scm import metrics
from pyro_scm.criticism.verdicts import OWN, Check, canvas, graded, skipped
from pyro_scm.posterior import warnings_of_arviz
from pyro_scm.sites import X, Z

if TYPE_CHECKING:
    from arviz import InferenceData
    from matplotlib.figure import Figure

__all__ = ["active_units", "latents_agree", "predictions_agree"]

_ACTIVE = 0.01
_MOST_SERIES = 500


def active_units(data: "InferenceData") -> Check:
    """Latents whose posterior mean differs between cells; the others have collapsed to their prior.

    Args:
        data: from `to_arviz`.

    Source: Burda, Grosse and Salakhutdinov, ICLR 2016: Var_x E[z | x] > 0.01.
    """
    variance = data.posterior[Z].mean("draw").var("cell").to_numpy()  # [K, d]
    active = (variance > _ACTIVE).sum(1)
    total = variance.shape[1]
    value = float(active.mean() / total)
    verdict = graded(value, 0.99, 1 / total if total > 1 else 0.99)
    words = {
        "good": f"All {total} latents carry information about cells.",
        "look": f"{active.mean():.3g} of {total} latents (mean over members) carry information: the others have "
        "collapsed to their prior, which harms nothing; fewer latents do the same.",
        "bad": "No latent depends on the cell: the decoder does without them (posterior collapse). Anneal the KL "
        "(kl_warmup), or use fewer decoder layers.",
    }
    detail = pd.DataFrame(np.sort(variance, 1)[:, ::-1], index=pd.RangeIndex(len(variance), name="member"))
    return Check(
        "latents: active units",
        value,
        f"share of latents with Var E[z | x] above {_ACTIVE}: good above 0.99, bad below {1 / total:.2g}",
        f"0.01: Burda et al. 2016; the shares: {OWN}",
        verdict,
        words[verdict],
        lambda: _bars(np.sort(variance, 1)[:, ::-1]),
        detail,
    )


def predictions_agree(data: "InferenceData", seed: int = 0) -> Check:
    """R-hat over members of replicated expression, per cell and gene (split, rank-normalised).

    Latents of two members are different variables (order, sign, rotation), so their R-hat means nothing; the expression
    that each member expects of the same cell, its noise included, is comparable. R-hat near 1: which member one asks
    matters little beside what all of them leave open.

    Args:
        data: from `to_arviz`, of two members or more.
        seed: of the cells and genes where there are more than 500 pairs.

    Source: Vehtari, Gelman, Simpson, Carpenter and Bürkner, Bayesian Analysis 2021; Gelman and Rubin 1992 (1.1).
    """
    name = "ensemble: R-hat of predictions"
    draws = data.posterior_predictive[X].to_numpy()
    if draws.shape[0] < 2 or draws.shape[1] < 4:
        return skipped(name, "One member (or fewer than four draws): fit several seeds, fit(..., seeds=range(5)).")
    with warnings_of_arviz():
        import arviz as az

        series = draws.reshape(*draws.shape[:2], -1)
        chosen = np.random.default_rng(seed).permutation(series.shape[2])[:_MOST_SERIES]
        values = az.rhat(az.convert_to_dataset({X: series[..., chosen]}))[X].to_numpy()
    values = values[np.isfinite(values)]
    value = float(np.median(values)) if len(values) else 1.0
    verdict = graded(value, 1.01, 1.1)
    words = {
        "good": "The members predict the same distribution for a cell: its noise, not the choice of seed, is what "
        "is uncertain.",
        "look": "The members differ in what they predict for a cell: use all of them, and their spread.",
        "bad": "The members contradict each other about the same cells: train longer, or use more cells; a single "
        "member says nothing.",
    }
    return Check(
        name,
        value,
        "median over cells and genes: good up to 1.01, bad above 1.1",
        "Vehtari et al. 2021 (1.01); Gelman and Rubin 1992 (1.1)",
        verdict,
        words[verdict],
        None,
        pd.DataFrame({"R-hat": np.quantile(values, [0.05, 0.5, 0.95])}, index=["5 %", "median", "95 %"]),
    )


def latents_agree(data: "InferenceData") -> Check:
    """Mean correlation of the members' latents after matching them one to one (order, sign and scale are free).

    Args:
        data: from `to_arviz`, of two members or more.

    Source: the mean correlation coefficient of Hyvärinen and Morioka, NeurIPS 2016, between members.
    """
    name = "ensemble: latents found again"
    means = data.posterior[Z].mean("draw").to_numpy()
    if len(means) < 2:
        return skipped(name, "One member: fit several seeds to see which latents are found again.")
    pairs = [(a, b) for a in range(len(means)) for b in range(a)]
    score = np.array([metrics.mcc(means[a], means[b]).score for a, b in pairs])
    score = score[np.isfinite(score)]
    value = float(score.mean()) if len(score) else float("nan")
    verdict = graded(value, 0.95, 0.7)
    words = {
        "good": "The members find the same latents: single latents can be read.",
        "look": "The members find some latents again: read only those that they share (`stability`).",
        "bad": "Each member has latents of its own (rotated, say): do not read single latents; predictions are not "
        "affected.",
    }
    return Check(
        name,
        value,
        "mean correlation of matched latents: good above 0.95, bad below 0.7",
        f"{OWN}; 0.7: half of a latent's variance is found again",
        verdict,
        words[verdict],
    )


def _bars(variance: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> "Figure":
    figure, axes = canvas()
    ax = axes[0, 0]
    ax.plot(np.arange(1, variance.shape[1] + 1), np.maximum(variance, 1e-6).T, ".-", color="#1f5fa8", alpha=0.6)
    ax.axhline(_ACTIVE, color="#b03a2e", linestyle="--", linewidth=0.9)
    ax.set(yscale="log", xlabel="latent, by its variance", ylabel="Var E[z | x]")
    return figure
