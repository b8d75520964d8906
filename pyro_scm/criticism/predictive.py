"""Posterior predictive checks: are simulated cells like the real ones?"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.criticism.verdicts import OWN, Check, canvas, graded, skipped
from pyro_scm.posterior import warnings_of_arviz
from pyro_scm.sites import X

if TYPE_CHECKING:
    from arviz import InferenceData
    from matplotlib.figure import Figure

__all__ = ["STATISTICS", "ppc_figure", "predictive_checks"]

Array = NDArray[np.float64]

STATISTICS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda x: x.mean(-2),
    "variance": lambda x: x.var(-2),
    "dropout": lambda x: (x == 0).mean(-2),
}
"""Of each gene over cells."""


def predictive_checks(data: "InferenceData", replicates: str = "new") -> list[Check]:
    """Bayesian p-values of each gene's mean, variance and share of zeros, against cells that the model simulates.

    A p-value is the share of replicated data sets whose statistic is above the observed one; near 0 or 1 the model does
    not make such data. Replicates of the *same* cells know what was measured of them and are easily right; *new* cells
    of the same environments are what predictions are made of.

    Args:
        data: from `to_arviz`.
        replicates: ``"new"`` (the group `prior_predictive`) or ``"same"`` (`posterior_predictive`).

    Source: Gelman, Meng and Stern, Statistica Sinica 1996.
    """
    group = {"new": "prior_predictive", "same": "posterior_predictive"}[replicates]
    titles = {name: f"model: {name} of {replicates} cells" for name in STATISTICS}
    if group not in data.groups():
        return [skipped(title, "A flat prior does not say how to simulate new cells.") for title in titles.values()]
    x = data.observed_data[X].to_numpy()
    drawn = data[group][X].to_numpy()
    drawn = drawn.reshape(-1, *drawn.shape[2:])
    genes = [str(g) for g in data.observed_data["gene"].values]
    found = []
    for name, statistic in STATISTICS.items():
        if name == "dropout" and not (x == 0).any():
            found.append(skipped(titles[name], "No expression is exactly 0 in these data."))
            continue
        found.append(_check(titles[name], name, statistic(x), _each(statistic, drawn), genes, data, group))
    return found


def _each(statistic: Callable[[Any], Any], drawn: Any) -> Array:
    """``[S, G]`` without a copy of all draws."""
    return np.stack([statistic(replicate.astype(np.float64)) for replicate in drawn])


def _check(
    title: str, name: str, observed: Any, replicated: Array, genes: list[str], data: "InferenceData", group: str
) -> Check:
    p = (replicated > observed).mean(0) + 0.5 * (replicated == observed).mean(0)
    share = float(((p < 0.025) | (p > 0.975)).mean())
    middle = replicated.mean(0)
    detail = pd.DataFrame(
        {"observed": observed, "replicated": middle, "sd": replicated.std(0), "p": p},
        index=pd.Index(genes, name="gene"),
    ).sort_values("p", key=lambda v: -(v - 0.5).abs())
    typical = float(np.median(np.abs(middle - observed) / np.maximum(np.abs(observed), 1e-12)))
    verdict = graded(share, 0.1, 0.5)
    often = f"{share:.0%} of the genes have a {name} that simulated cells hardly ever have"
    words = {
        "good": f"Simulated cells have the {name} of the real ones, for nearly all genes.",
        "look": f"{often} (typically off by {typical:.1%}): see which.",
        "bad": f"{often} (typically off by {typical:.1%}): do not read the {name} of single genes off simulations.",
    }
    return Check(
        title,
        share,
        "share of genes with p < 0.025 or > 0.975: good up to 0.10, bad above 0.50",
        f"p-values: Gelman et al. 1996, 0.05 by chance; the shares: {OWN}",
        verdict,
        words[verdict],
        (lambda: ppc_figure(data, group)) if name == "mean" else (lambda: _scatter(observed, middle, name)),
        detail,
    )


def ppc_figure(data: "InferenceData", group: str = "prior_predictive", genes: int = 6) -> "Figure":
    """ArviZ's `plot_ppc` of the first genes: observed beside replicated distributions over cells.

    Args:
        data: from `to_arviz`.
        group: of the replicates.
        genes: number of panels.
    """
    with warnings_of_arviz():
        import arviz as az

    names = list(data.observed_data["gene"].values[:genes])
    every = max(1, data[group].sizes["chain"] * data[group].sizes["draw"] // 40)
    own = {"observed_data": data.observed_data[[X]].sel(gene=names)}
    own[group] = data[group][[X]].sel(gene=names).isel(draw=slice(None, None, every))
    if bool((own["observed_data"][X] % 1 == 0).all()):
        own = {name: value.astype(np.int64) for name, value in own.items()}
    columns = min(3, len(names))
    figure, axes = canvas((len(names) + columns - 1) // columns, columns, (3.8, 2.6))
    with warnings_of_arviz():
        az.plot_ppc(
            az.InferenceData(**own), group="prior" if group.startswith("prior") else "posterior", flatten=["cell"],
            ax=list(axes.flat)[: len(names)], observed=True, random_seed=0, legend=False, textsize=8,
        )  # fmt: skip
    for ax in list(axes.flat)[len(names) :]:
        ax.set_visible(False)
    return figure


def _scatter(observed: Any, replicated: Any, name: str) -> "Figure":
    figure, axes = canvas()
    ax = axes[0, 0]
    ax.plot(observed, replicated, ".", color="#1f5fa8", alpha=0.6)
    ends = [min(observed.min(), replicated.min()), max(observed.max(), replicated.max())]
    ax.plot(ends, ends, color="#888", linewidth=0.8)
    ax.set(xlabel=f"observed {name}", ylabel=f"{name} of simulated cells")
    return figure
