"""Arguments of the scores, checked: dense finite arrays, arrays of one shape, options out of a list."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_scm.errors import DataError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
BoolArray = NDArray[np.bool_]


def finite(values: ArrayLike, name: str, dimensions: int) -> FloatArray:
    """`values` as finite doubles with the given number of dimensions."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} is not a dense array of numbers ({error}): pass a NumPy array; a sparse matrix needs .toarray()"
        ) from error
    if array.ndim != dimensions:
        raise DataError(f"{name} has shape {array.shape}: expected {dimensions} dimension(s)")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = tuple(int(i) for i in bad[0])
        raise DataError(
            f"{name} holds {array[place]} at position {place} and {len(bad)} non-finite value(s) in all: expected "
            "finite numbers; leave the condition out and say so, or repair the model"
        )
    return array


def matched(
    first: ArrayLike, second: ArrayLike, names: tuple[str, str], dimensions: int
) -> tuple[FloatArray, FloatArray]:
    """Two arrays of one shape, which broadcasting would hide, giving a number that means nothing."""
    a, b = finite(first, names[0], dimensions), finite(second, names[1], dimensions)
    if a.shape != b.shape:
        raise DataError(
            f"{names[0]} has shape {a.shape} and {names[1]} {b.shape}: expected equal shapes; "
            "align the two on the same conditions and genes"
        )
    return a, b


def one_of(option: str, name: str, options: tuple[str, ...]) -> None:
    """Raise for an option that is not among `options`."""
    if option not in options:
        raise DataError(f"{name} is {option!r}: expected {', '.join(map(repr, options[:-1]))} or {options[-1]!r}")
