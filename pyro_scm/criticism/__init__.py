"""Checks of a fitted model, each with a verdict: can its posterior, its predictions and its intervals be trusted?

- `weights`: is the guide's posterior usable (k-hat, gap of the bound); LOO and LOO-PIT, density of held-out cells.
- `simulation`: simulation-based calibration of latents and predictions.
- `members`: active latents; whether the members of an ensemble agree.
- `predictive`: are simulated cells like the real ones. `coverage`: do intervals cover held-out environments.
- `suite`: all of them at once. `verdicts`: what a check says, and the page.
"""

from pyro_scm.criticism.coverage import LEVELS, coverage, interval_coverage
from pyro_scm.criticism.members import active_units, latents_agree, predictions_agree
from pyro_scm.criticism.predictive import ppc_figure, predictive_checks
from pyro_scm.criticism.ranks import ecdf_figure, pit
from pyro_scm.criticism.simulation import sbc, sbc_ranks
from pyro_scm.criticism.suite import checks
from pyro_scm.criticism.verdicts import Check, Checks
from pyro_scm.criticism.weights import bound_gap, guide_khat, held_out_density, loo, loo_pit

__all__ = [
    "LEVELS",
    "Check",
    "Checks",
    "active_units",
    "bound_gap",
    "checks",
    "coverage",
    "ecdf_figure",
    "guide_khat",
    "held_out_density",
    "interval_coverage",
    "latents_agree",
    "loo",
    "loo_pit",
    "pit",
    "ppc_figure",
    "predictions_agree",
    "predictive_checks",
    "sbc",
    "sbc_ranks",
]
