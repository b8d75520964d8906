"""Scores of predictions, of recovered latents and graphs, and their uncertainty: one function a metric.

- `prediction`: means of conditions: R2, correlations, changes from control, errors, ranks, overlap of DEGs.
- `distances`: sets of cells: energy distance, maximum mean discrepancy, variances, marginals.
- `recovery`: latents, targets and effects of environments: matching, regressions, DCI, changed latents.
- `graph`: adjacency matrices: structural Hamming distance, edges, order. `rotation`: decoders of two latents.
- `probe`: how well environments or covariates can be read off latents, by a trained classifier on held-out cells.
- `uncertainty`: bootstrap intervals over conditions or seeds. `intervals`: coverage of predicted intervals.

Conventions that hold for every function here:

- the truth is the first argument, the prediction the second; several scores change when the two are swapped;
- a score that is not defined for its input (a constant vector, no gene, one cell) is NaN, never a warning and never a
  number that looks like a score, so that a table can count such conditions;
- nothing is clipped: a coefficient of determination of -70 is reported as -70;
- an argument that is not what its description says (shape, range, one of the options) raises `DataError`, and so does
  NaN or infinity *in the input*, because a diverged model must not leave a table unseen;
- adjacency matrices have entry [i, j] for the edge i -> j, any non-zero value being an edge.

The mean expression of a condition is close to that of its control, so `r2` and `pearson` of absolute means flatter
every model, including the one that predicts no change: report them beside the `delta_` scores, a subset of
differentially expressed genes and a rank metric.
"""

from pyro_scm.metrics.distances import energy_distance, gene_wasserstein, median_bandwidth, mmd, variance_r2
from pyro_scm.metrics.graph import ancestral_violations, edge_scores, shd
from pyro_scm.metrics.intervals import Calibration, calibration, coverage, interval_score
from pyro_scm.metrics.prediction import (
    cosine,
    degs_overlap,
    degs_recall,
    delta_pearson,
    delta_r2,
    discrimination,
    mae,
    mse,
    pearson,
    perturbation_rank,
    r2,
    rmse,
    squared_pearson,
    top_recall,
)
from pyro_scm.metrics.probe import Probe, environment_probe, probes
from pyro_scm.metrics.recovery import (
    DCI,
    Detection,
    Matching,
    changed_latents,
    dci,
    effect_concentration,
    linear_r2,
    mcc,
    permuted_r2,
    target_scores,
)
from pyro_scm.metrics.rotation import Angle, angle_to_axis, optimal_angle, row_cosine_distances
from pyro_scm.metrics.uncertainty import Interval, bootstrap_interval, paired_difference

__all__ = [
    "DCI",
    "Angle",
    "Calibration",
    "Detection",
    "Interval",
    "Matching",
    "Probe",
    "ancestral_violations",
    "angle_to_axis",
    "bootstrap_interval",
    "calibration",
    "changed_latents",
    "cosine",
    "coverage",
    "dci",
    "degs_overlap",
    "degs_recall",
    "delta_pearson",
    "delta_r2",
    "discrimination",
    "edge_scores",
    "effect_concentration",
    "energy_distance",
    "environment_probe",
    "gene_wasserstein",
    "interval_score",
    "linear_r2",
    "mae",
    "mcc",
    "median_bandwidth",
    "mmd",
    "mse",
    "optimal_angle",
    "paired_difference",
    "pearson",
    "permuted_r2",
    "perturbation_rank",
    "probes",
    "r2",
    "rmse",
    "row_cosine_distances",
    "shd",
    "squared_pearson",
    "target_scores",
    "top_recall",
    "variance_r2",
]
