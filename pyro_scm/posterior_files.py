"""Draws as InferenceData, in memory or piece by piece into a netCDF file."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyro_scm.errors import DataError

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["Layout", "Variable", "in_file", "in_memory"]

Key: TypeAlias = tuple[str, str]
Pieces: TypeAlias = Iterable[tuple[Key, tuple[Any, ...], NDArray[Any]]]

_CHUNK = 1 << 18  # numbers of a chunk of the file


class Variable(NamedTuple):
    """Of a group: names and sizes of its dimensions."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class Layout:
    """What will be held.

    Args:
        variables: (group, name) -> sizes of what comes in pieces.
        constant: (group, name) -> dimensions and values of what is known at once.
        coords: dimension -> labels.
        attributes: of every group.
    """

    variables: Mapping[Key, Variable]
    constant: Mapping[Key, tuple[tuple[str, ...], NDArray[Any]]]
    coords: Mapping[str, NDArray[Any]]
    attributes: Mapping[str, str]

    @property
    def groups(self) -> list[str]:
        """In the order of ArviZ."""
        order = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "prior", "prior_predictive")
        held = {group for group, _ in (*self.variables, *self.constant)}
        return [group for group in (*order, "observed_data", "constant_data") if group in held]

    def labels(self, dims: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Coordinates of those dimensions that have names."""
        return {name: self.coords[name] for name in dims if name in self.coords}


def in_memory(layout: Layout, pieces: Pieces) -> "InferenceData":
    """All pieces as arrays.

    Args:
        layout: what they make up.
        pieces: (group, name), place, values.
    """
    import arviz as az
    import xarray as xr

    held = {key: np.empty(v.shape, v.dtype) for key, v in layout.variables.items()}
    for key, place, value in pieces:
        held[key][place] = value
    groups: dict[str, Any] = {}
    for group in layout.groups:
        own = {n: (v.dims, held[g, n]) for (g, n), v in layout.variables.items() if g == group}
        own |= {n: v for (g, n), v in layout.constant.items() if g == group}
        dims = {name for found in own.values() for name in found[0]}
        groups[group] = xr.Dataset(own, coords=layout.labels(dims), attrs=dict(layout.attributes))
    return az.InferenceData(**groups)


def in_file(layout: Layout, pieces: Pieces, path: str | Path) -> "InferenceData":
    """The same in a netCDF file, of which no more than a piece is ever in memory; written whole or not at all.

    Args:
        layout: what they make up.
        pieces: see `in_memory`.
        path: of the file.

    Raises:
        DataError: it cannot be written.
    """
    import arviz as az

    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        _write(part, layout, pieces)
        os.replace(part, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{target}: cannot be written ({reason}): choose a folder with room for the draws") from error
    finally:
        part.unlink(missing_ok=True)
    return az.from_netcdf(str(target))


def _write(path: Path, layout: Layout, pieces: Pieces) -> None:
    import h5netcdf  # type: ignore[import-untyped]

    with h5netcdf.File(path, "w") as file:
        held: dict[Key, Any] = {}
        for name in layout.groups:
            group = file.create_group(name)
            for attribute, text in layout.attributes.items():
                group.attrs[attribute] = text
            own = {n: (v.dims, v.shape) for (g, n), v in layout.variables.items() if g == name}
            own |= {n: (dims, v.shape) for (g, n), (dims, v) in layout.constant.items() if g == name}
            sizes = {d: s for dims, shape in own.values() for d, s in zip(dims, shape, strict=True)}
            group.dimensions = sizes
            for dimension, labels in layout.labels(sizes).items():
                _constant(group, dimension, (dimension,), labels)
            for (g, n), v in layout.variables.items():
                if g == name:
                    held[g, n] = group.create_variable(n, v.dims, v.dtype, chunks=_chunks(v.shape))
            for (g, n), (dims, values) in layout.constant.items():
                if g == name:
                    _constant(group, n, dims, values)
        for key, place, value in pieces:
            held[key][place] = value


def _constant(group: Any, name: str, dims: tuple[str, ...], values: NDArray[Any]) -> None:
    import h5py

    text = values.dtype == object
    variable = group.create_variable(name, dims, h5py.string_dtype() if text else values.dtype)
    variable[...] = values


def _chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """All draws of a few cells of one member."""
    chain, *rest = shape
    inner = max(1, int(np.prod(rest)))
    if len(rest) < 2 or inner <= _CHUNK:
        return (min(chain, 1), *(max(1, n) for n in rest))
    draws, cells, *last = rest
    each = max(1, _CHUNK // max(1, draws * int(np.prod(last))))
    return (1, draws, min(cells, each), *last)
