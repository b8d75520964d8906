"""What importance weights log p(x, z) - log q(z | x) say of the guide, and what LOO says of the model."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.criticism.ranks import pit, uniformity
from pyro_scm.criticism.verdicts import OWN, Check, canvas, graded, skipped
from pyro_scm.posterior import warnings_of_arviz
from pyro_scm.sites import X

if TYPE_CHECKING:
    from arviz import InferenceData
    from matplotlib.figure import Figure

__all__ = ["bound_gap", "guide_khat", "held_out_density", "loo", "loo_pit"]

Array = NDArray[np.float64]

_NO_DENSITY = "This model's encoder gives points, or its prior is flat: there is no density to weigh draws with."
_ROUNDING = 0.01  # of log weights that are sums over thousands of genes in single precision
_FEWEST = 25  # draws of which a fifth is a tail of five
_SMALL_SHIFT, _LARGE_SHIFT = 0.3, 1.0  # in posterior standard deviations of each latent


def _log_weights(data: "InferenceData") -> Array | None:
    """``[K, S, n]``."""
    if "lp" not in data.sample_stats:
        return None
    found: Array = (data.sample_stats["lp"] - data.sample_stats["log_q"]).to_numpy().astype(np.float64)
    return found


def smoothed(log_weights: Array) -> tuple[Array, Array]:
    """Pareto-smoothed normalised log weights ``[n, S]`` and their k-hat ``[n]``.

    Weights that differ by no more than rounding have no tail, to which ArviZ would fit one of any shape: k-hat is 0.

    Args:
        log_weights: ``[n, S]``.
    """
    with warnings_of_arviz():
        import arviz as az

        with np.errstate(all="ignore"):
            values, k = az.psislw(log_weights)
    alike = np.ptp(log_weights, axis=-1) < _ROUNDING
    return np.where(alike[:, None], -np.log(log_weights.shape[-1]), values), np.where(alike, 0.0, k)


def guide_khat(data: "InferenceData") -> Check:
    """PSIS k-hat of every cell's posterior: how heavy the tail of p(x, z) / q(z | x) over draws of the guide is.

    Args:
        data: from `to_arviz`, with 100 draws or more.

    Source: Yao, Vehtari, Simpson and Gelman, "Yes, but did it work?", ICML 2018.
    """
    name = "guide: PSIS k-hat"
    weights = _log_weights(data)
    if weights is None:
        return skipped(name, _NO_DENSITY)
    if weights.shape[1] < _FEWEST:
        return skipped(name, f"A tail needs {_FEWEST} draws or more, and hundreds to be seen well: give more draws.")
    _, k = smoothed(np.moveaxis(weights, 1, -1).reshape(-1, weights.shape[1]))
    value = float(np.quantile(k, 0.95, method="higher"))
    verdict = "bad" if np.median(k) > 0.7 else graded(value, 0.7, float("inf"))
    share = float((k > 0.7).mean())
    words = {
        "good": "The encoder's posterior is close enough to the true one for importance weights to correct the rest.",
        "look": f"The encoder's posterior misses much of the true one in {share:.0%} of the cells: intervals of these "
        "are not to be trusted (longer training, a wider encoder, or fewer latents help).",
        "bad": "The encoder's posterior is far from the true one in most cells: do not use its draws as uncertainty.",
    }
    return Check(
        name,
        value,
        "95 % quantile over cells: good up to 0.7; bad if the median is above 0.7",
        "Yao et al. 2018",
        verdict,
        words[verdict],
        lambda: _histogram(k, "k-hat of a cell", (0.5, 0.7)),
        pd.DataFrame({"k-hat": np.quantile(k, [0.05, 0.5, 0.95], method="higher")}, index=["5 %", "median", "95 %"]),
    )


def bound_gap(data: "InferenceData") -> Check:
    """Importance-weighted bound with ever more particles: what the ELBO misses of log p(x).

    The gap is at least KL(q(z | x) || p(z | x)) as far as the largest number of particles reaches. It is judged by that
    KL of two unit normals whose means differ by 0.3 (1) standard deviations in each latent.

    Args:
        data: from `to_arviz`.

    Source: Burda, Grosse and Salakhutdinov, ICLR 2016.
    """
    name = "guide: gap of the bound"
    weights = _log_weights(data)
    if weights is None:
        return skipped(name, _NO_DENSITY)
    chains, draws, _ = weights.shape
    latent = data.posterior.sizes["node"]
    numbers = sorted({m for m in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, draws) if m <= draws})
    bounds = [_bound(weights, m) for m in numbers]
    gap = float(bounds[-1].mean() - bounds[0].mean())
    good, look = (latent * shift**2 / 2 for shift in (_SMALL_SHIFT, _LARGE_SHIFT))
    detail = pd.DataFrame({"nats per cell": [b.mean() for b in bounds]}, index=pd.Index(numbers, name="particles"))
    detail["sd over members"] = [b.std(ddof=1) if chains > 1 else np.nan for b in bounds]
    verdict = graded(gap, good, look)
    words = {
        "good": f"The ELBO is within {gap:.2g} nats per cell of the marginal likelihood: little is lost by the guide.",
        "look": f"The ELBO misses {gap:.2g} nats per cell of the marginal likelihood: compare models by the "
        "importance-weighted bound, not by the ELBO.",
        "bad": f"The ELBO misses {gap:.2g} nats per cell: the encoder's posterior is far from the true one.",
    }
    return Check(
        name,
        gap,
        f"nats per cell: good up to {good:.2g}, bad above {look:.2g}",
        f"{OWN}: the KL of posteriors {_SMALL_SHIFT} and {_LARGE_SHIFT:g} sd off in each of {latent} latents",
        verdict,
        words[verdict],
        lambda: _curve(numbers, np.array(bounds)),
        detail,
    )


def _bound(weights: Array, particles: int) -> Array:
    """Of each member ``[K]``, draws split into groups of so many particles."""
    chains, draws, cells = weights.shape
    groups = draws // particles
    each = weights[:, : groups * particles].reshape(chains, groups, particles, cells)
    found: Array = (np.logaddexp.reduce(each, axis=2) - np.log(particles)).mean((1, 2))
    return found


def loo(data: "InferenceData") -> Check:
    """PSIS-LOO of cells, latents integrated out; see `to_arviz` for what is left out and what is not.

    Members of an ensemble, each fitted to these cells, stand for draws of the parameters: what LOO takes off is what
    the members disagree about, not what all of them have learnt by heart. `held_out_density` sees that too.

    Args:
        data: from `to_arviz`.

    Source: Vehtari, Gelman and Gabry, Statistics and Computing 2017; thresholds of Vehtari et al., JMLR 2024.
    """
    name = "model: LOO"
    if "log_likelihood" not in data.groups():
        return skipped(name, _NO_DENSITY)
    log_p = _log_likelihood(data)
    if len(log_p) < _FEWEST:
        return skipped(name, f"A tail needs {_FEWEST} draws or more: give more draws.")
    weights, k = smoothed(-log_p.T)
    elpd = np.logaddexp.reduce(weights.T + log_p, axis=0)
    n, limit = len(k), min(1 - 1 / np.log10(len(log_p)), 0.7)
    share, mean, se = float((k > limit).mean()), float(elpd.mean()), float(elpd.std() / len(k) ** 0.5)
    detail = pd.DataFrame(
        {"nats per cell": [mean, se, float((_mixture(data) - elpd).mean())]}, index=["elpd_loo", "se", "p_loo"]
    )
    verdict = graded(share, 0.01, 0.1)
    several = data.posterior.sizes["chain"] > 1
    words = {
        "good": f"elpd {mean:.4g} ± {se:.2g} nats per cell ({n} cells) can be compared with other models'.",
        "look": f"elpd {mean:.4g} nats per cell, but {share:.0%} of the cells weigh so much that their "
        "terms are uncertain: compare models on held-out cells.",
        "bad": f"{share:.0%} of the cells cannot be left out by weighting (members disagree too much about them, or "
        "the estimates of their density are too noisy: give more particles): compare models on held-out cells.",
    }
    note = "" if several else " One member says nothing of the parameters' uncertainty: fit several seeds."
    return Check(
        name,
        share,
        f"share of cells with k-hat above {limit:.2f}: good up to 0.01, bad above 0.1",
        f"k-hat: Vehtari et al. 2024; the shares: {OWN}",
        verdict,
        words[verdict] + note,
        lambda: _khat_figure(k),
        detail,
    )


def held_out_density(data: "InferenceData", held_out: "InferenceData") -> Check:
    """Mean log p(x) of held-out cells beside that of the training cells, ensemble against ensemble.

    Args:
        data: of cells that were trained on.
        held_out: of cells that were not.
    """
    name = "model: held-out density"
    if "log_likelihood" not in data.groups() or "log_likelihood" not in held_out.groups():
        return skipped(name, _NO_DENSITY)
    own, other = (_mixture(d) for d in (data, held_out))
    difference = float(own.mean() - other.mean())
    se = float(np.hypot(own.std() / len(own) ** 0.5, other.std() / len(other) ** 0.5))
    value, number = difference / float(own.std()), 2 * se / float(own.std())
    verdict = graded(value, max(0.2, number), max(1.0, number))
    words = {
        "good": "Cells that the model has not seen are as probable as those it has.",
        "look": f"Unseen cells are {difference:.3g} nats per cell less probable than the training cells: it has learnt "
        "some of these by heart, or the held-out environments are not like them.",
        "bad": f"Unseen cells are {difference:.3g} nats per cell less probable than the training cells: predictions "
        "of what was held out are not to be trusted.",
    }
    detail = pd.DataFrame(
        {"nats per cell": [own.mean(), other.mean(), difference, se]},
        index=["training cells", "held out", "difference", "se"],
    )
    return Check(
        name,
        value,
        f"difference, in sd over training cells: good up to {max(0.2, number):.2f}, bad above {max(1.0, number):.2g}",
        f"{OWN}: a small and a large effect in units of the sd (Cohen 1988), never below two standard errors",
        verdict,
        words[verdict],
        None,
        detail,
    )


def _mixture(data: "InferenceData") -> Array:
    """Log p(x) of each cell under all members and draws together."""
    values = _log_likelihood(data)
    found: Array = np.logaddexp.reduce(values, axis=0) - np.log(len(values))
    return found


def _log_likelihood(data: "InferenceData") -> Array:
    """``[K S, n]``."""
    values = next(iter(data.log_likelihood.data_vars.values())).to_numpy().astype(np.float64)
    return np.reshape(values, (-1, values.shape[-1]))


def loo_pit(data: "InferenceData", seed: int = 0) -> Check:
    """Where each cell's expression lies in what the model would predict had it not seen this cell.

    Without the cell nothing is known of its latents but p(z | e): the draws are those of `prior_predictive`, members
    weighted by Pareto-smoothed 1 / p(x | member). Replicates of the cell itself would know its expression already.

    Args:
        data: from `to_arviz`.
        seed: of the ties of counts.

    Source: Gelfand, Dey and Chang 1992; Gabry et al., J. R. Stat. Soc. A 2019.
    """
    name = "model: LOO-PIT"
    if "log_likelihood" not in data.groups():
        return skipped(name, _NO_DENSITY)
    weights = np.exp(smoothed(-_log_likelihood(data).T)[0]).T
    draws = data.prior_predictive[X].to_numpy()
    values = pit(data.observed_data[X].to_numpy(), draws.reshape(-1, *draws.shape[2:]), weights, seed)
    words = {
        "good": "Predicted distributions of unseen cells of the same environments are calibrated, gene by gene.",
        "look": "Predicted distributions of single genes are somewhat off: see which, and whether they matter to you.",
        "bad": "Predicted distributions of many genes are wrong: do not use predictive intervals of single cells.",
    }
    return uniformity(name, values, [str(g) for g in data.observed_data["gene"].values], words, 0.9)


# ---------------------------------------------------------------------- figures
def _histogram(values: Array, label: str, lines: tuple[float, ...]) -> "Figure":
    figure, axes = canvas()
    ax = axes[0, 0]
    ax.hist(values[np.isfinite(values)], 40, color="#1f5fa8")
    for line in lines:
        ax.axvline(line, color="#b03a2e", linestyle="--", linewidth=0.9)
    ax.set(xlabel=label, ylabel="cells")
    return figure


def _curve(numbers: list[int], bounds: Array) -> "Figure":
    figure, axes = canvas()
    ax = axes[0, 0]
    ax.plot(numbers, bounds, color="#9bb8d9", linewidth=0.8)
    ax.plot(numbers, bounds.mean(1), "o-", color="#1f5fa8")
    ax.set(xscale="log", xlabel="particles", ylabel="bound, nats per cell")
    return figure


def _khat_figure(k: Array) -> "Figure":
    with warnings_of_arviz():
        import arviz as az

        figure, axes = canvas(size=(6, 3.2))
        az.plot_khat(k, ax=axes[0, 0])
    return figure
