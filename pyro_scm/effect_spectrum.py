"""How many latents do effects have, as far as the cells can tell? Asked of the data, before a model is fitted."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.directions import centre
from pyro_scm.errors import DataError

__all__ = ["effect_rank", "halves_errors", "pseudobulk"]

FloatArray = NDArray[np.float64]


def effect_rank(cells: EnvironmentDataset, *, largest: int = 20, draws: int = 20, seed: int = 0) -> int:
    """The number of components of one half of the cells' mean changes that predicts the other half best.

    For `pyro_scm.unmix(run, cells, rank=...)` where expression is close to linear in the latents or effects are small,
    as on CRISPR screens of a few hundred cells a target. It counts components of *expression*: strong effects through a
    bent decoder have more of these than there are latents (simulated screens of 15 latents: more than 40), and then it
    answers `largest`; choose the number by `pyro_scm.stability` there.

    Args:
        cells: two or more cells in two perturbed environments or more; counts are normalised and logged.
        largest: number that is tried.
        draws: of random halves.
        seed: of the halves.

    Returns:
        1 to `largest`.

    Raises:
        DataError: fewer than two perturbed environments with two cells each.

    Example:
        >>> effect_rank(cells, largest=3) in (1, 2, 3)
        True
    """
    x = np.concatenate([_dense(values) for _, values in cells.normalised_blocks(cells.schema.summary.depth)])
    rows = [int(e) for e in cells.present if not cells.reference[e] and (cells.env == e).sum() >= 2]
    if len(rows) < 2:
        raise DataError(f"{len(rows)} perturbed environments have two cells or more: two are needed to compare halves")
    return max(int(halves_errors(x, cells.env, rows, draws, largest, seed).argmin()), 1)


def _dense(values: object) -> FloatArray:
    dense = values.toarray() if hasattr(values, "toarray") else values
    return np.asarray(dense, np.float64)


def pseudobulk(x: FloatArray, env: NDArray[np.int64], rows: list[int]) -> tuple[FloatArray, FloatArray]:
    """Mean ``[len(rows), G]`` and number of cells of the environments in `rows`, from their robust centre."""
    count = np.array([(env == e).sum() for e in rows], np.float64)
    means = np.stack([x[env == e].mean(0) for e in rows])
    return means - centre(means, np.sqrt(count)), count


def halves_errors(
    x: FloatArray, env: NDArray[np.int64], rows: list[int], draws: int, largest: int, seed: int = 0
) -> FloatArray:
    """Error of predicting one half's mean changes by r components of the other half's, for r = 0 to `largest`.

    Environments are halved at random, mean changes (in standard deviations of each gene, times the root of the number
    of cells) taken from each half's robust centre, and those of one half cut to r components are compared with those
    of the other.

    Args:
        x: ``[N, G]``.
        env: ``[N]``.
        rows: perturbed environments.
        draws: of halves.
        largest: r that is tried.
        seed: of the halves.

    Returns:
        ``[largest + 1]`` mean squared errors as shares of the changes' squares; infinite where there are fewer
        components than r.
    """
    rng = np.random.default_rng(seed)
    unit = x / np.maximum(x.std(0), 1e-9)
    kept = [e for e in rows if (env == e).sum() >= 2]
    errors = np.zeros(largest + 1)
    for _ in range(draws):
        order = rng.permutation(len(x))
        place = pd.Series(np.arange(len(x))).groupby(env[order]).cumcount().to_numpy()
        half = np.zeros(len(x), bool)
        half[order] = place % 2 == 0
        (one, m), (two, n) = (pseudobulk(unit[h], env[h], kept) for h in (half, ~half))
        weight = np.sqrt(m + n)[:, None]
        for first, second in ((one * weight, two * weight), (two * weight, one * weight)):
            left, singular, right = np.linalg.svd(first, full_matrices=False)
            for r in range(largest + 1):
                cut = (left[:, :r] * singular[:r]) @ right[:r]
                errors[r] += np.square(second - cut).sum() / np.square(second).sum() / (2 * draws)
            errors[len(singular) + 1 :] = np.inf
    return errors
