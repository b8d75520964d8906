"""`checks`: all checks of a fitted model at once."""

import numpy as np

from pyro_scm.criticism.coverage import LEVELS, coverage
from pyro_scm.criticism.members import active_units, latents_agree, predictions_agree
from pyro_scm.criticism.predictive import predictive_checks
from pyro_scm.criticism.simulation import sbc
from pyro_scm.criticism.verdicts import Checks, skipped
from pyro_scm.criticism.weights import bound_gap, guide_khat, held_out_density, loo, loo_pit
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.posterior import to_arviz
from pyro_scm.run import Fitted

__all__ = ["checks"]


def checks(
    fitted: Fitted,
    cells: EnvironmentDataset,
    held_out: EnvironmentDataset | None = None,
    *,
    draws: int = 200,
    particles: int = 16,
    most_cells: int = 300,
    most_genes: int = 100,
    conformal: bool = False,
    seed: int = 0,
) -> Checks:
    """Every check of a fitted model: value, threshold and its source, verdict, and what it means in plain words.

    Each is also a function of its own in `pyro_scm.criticism`, of what `to_arviz` gives (`sbc`: of the run).

    Args:
        fitted: a run, or (model, guide).
        cells: that it was fitted to.
        held_out: cells that it was not fitted to, of environments that it can predict.
        draws: of each member.
        particles: see `to_arviz`.
        most_cells: taken at random from `cells`, and from `held_out`.
        most_genes: taken at random for checks of expression; densities are of all genes.
        conformal: judge held-out intervals after recalibration; see `interval_coverage`.
        seed: of cells, genes and draws.

    Raises:
        DataError: no cells.

    Example:
        >>> found = ps.checks(run, split.train, split.test)  # doctest: +SKIP
        >>> found.table; found.write("checks.html")  # doctest: +SKIP
    """
    rng = np.random.default_rng(seed)
    genes = [cells.genes[g] for g in np.sort(rng.permutation(len(cells.genes))[:most_genes])]
    some = [_some(c, most_cells, rng) for c in (cells, held_out) if c is not None and len(c)]
    drawn = [to_arviz(fitted, c, draws=draws, particles=particles, genes=genes, seed=seed) for c in some]
    data, other = drawn[0], drawn[1] if len(drawn) > 1 else None
    found = [
        guide_khat(data),
        bound_gap(data),
        *sbc(fitted, some[0], draws=draws, most_cells=most_cells, seed=seed),
        active_units(data),
        latents_agree(data),
        predictions_agree(data, seed),
        *predictive_checks(data, "same"),
        *predictive_checks(data, "new"),
        loo(data),
        loo_pit(data, seed),
        held_out_density(data, other)
        if other is not None
        else skipped("model: held-out density", "No held-out cells were given."),
        *coverage(other, levels=LEVELS, conformal=conformal and other is not None, seed=seed),
    ]
    return Checks(found, data)


def _some(cells: EnvironmentDataset, number: int, rng: np.random.Generator) -> EnvironmentDataset:
    if len(cells) <= number:
        return cells
    return cells.subset(np.sort(rng.permutation(len(cells))[:number]))
