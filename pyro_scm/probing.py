"""Are the latents of held-out cells free of what they should be free of: environments, cell lines, batches?"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pyro_scm import metrics
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, listing
from pyro_scm.query import embed
from pyro_scm.run import Run

__all__ = ["disentanglement"]


def disentanglement(
    run: Run,
    cells: EnvironmentDataset,
    covariates: Sequence[str] | None = None,
    *,
    kind: Literal["linear", "network"] = "linear",
    permutations: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """Balanced accuracy of a trained probe of each member's noise z, beside chance and a probe of leaked labels.

    A probe is a classifier trained on some of the cells and scored on the others (`metrics.environment_probe`). That
    it finds nothing counts only where it finds a label that was put among the latents.

    Args:
        run: fitted; its z is what the model holds to be free of environment and covariates.
        cells: to be probed, best those held out.
        covariates: names of covariates; by default all of the cells'.
        kind: ``"linear"`` or ``"network"``.
        permutations: of the level of chance.
        seed: of the probe.

    Returns:
        One row for each member and label ("environment", or the covariate): seed, label, values (how many), accuracy,
        chance, upper (of chance), p_value, leaked, and verdict: ``"entangled"`` (above all permutations),
        ``"at chance"``, or ``"probe does not learn"``. Labels with a single value are left out.

    Raises:
        DataError: an unknown covariate, or nothing to probe.

    Example:
        >>> disentanglement(run, cells, permutations=2)["label"].tolist()
        ['environment', 'environment']
    """
    names = tuple(cells.covariates) if covariates is None else tuple(covariates)
    unknown = [name for name in names if name not in cells.covariates]
    if unknown:
        raise DataError(f"no covariate {listing(unknown)}: these cells have {listing(cells.covariates) or 'none'}")
    labels: Mapping[str, ArrayLike] = {"environment": cells.env} | {n: cells.covariates[n] for n in names}
    rows: list[dict[str, Any]] = []
    for member, z in zip(run.seeds, embed(run, cells)["z"], strict=True):
        found = metrics.probes(z, labels, kind=kind, permutations=permutations, seed=seed)
        for name, probe in found.items():
            word = "entangled" if probe.accuracy > probe.upper else "at chance"
            rows.append(
                {
                    "seed": member,
                    "label": name,
                    "values": len(np.unique(np.asarray(labels[name]))),
                    **probe._asdict(),
                    "verdict": word if probe.learns or word == "entangled" else "probe does not learn",
                }
            )
    if not rows:
        raise DataError("these cells have one environment and one value of each covariate: give cells that differ")
    return pd.DataFrame(rows)
