"""`to_arviz`: a fitted ensemble as `arviz.InferenceData`, its members as chains."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_scm.abduction import device_of
from pyro_scm.chance import forked
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, listing
from pyro_scm.posterior_draws import Drawn, Values, array, estimates, simulated
from pyro_scm.posterior_files import Layout, Variable, in_file, in_memory
from pyro_scm.query import isolated
from pyro_scm.run import Fitted, members
from pyro_scm.sites import C, X, Y, Z

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["to_arviz", "warnings_of_arviz"]

_LARGEST = 4 << 30
_CHUNK = 1 << 24  # numbers that a decoder gives at once

IntArray: TypeAlias = NDArray[np.int64]


def to_arviz(
    fitted: Fitted,
    cells: EnvironmentDataset,
    *,
    draws: int = 100,
    particles: int = 16,
    genes: Sequence[str] | None = None,
    path: str | Path | None = None,
    seed: int = 0,
) -> "InferenceData":
    """Posterior draws of cells as InferenceData: what ArviZ's plots, LOO and diagnostics read.

    Groups, with dimensions chain (member of the ensemble), draw, cell, node, gene, protein:

    - ``posterior``: z, c, and every other latent of the model, those that all cells share included; from the guide.
    - ``posterior_predictive``: x (and y): the same cells measured once more.
    - ``prior``, ``prior_predictive``: z, c, x (and y) of new cells of the same environments: their own latents are
      drawn from p(z | e); parameters and latents that cells share are as in the posterior.
    - ``log_likelihood``: log p(x | parameters of the member) of each cell, its latents integrated out, each draw with
      an importance-weighted estimate of its own, log (1/M) sum_m p(x, z_m) / q(z_m | x), M = particles. Leaving out a
      cell then leaves out its latents too; with log p(x | z) LOO would be the harmonic mean of a posterior that has
      seen the cell, whose variance is infinite. The variable is ``x``, or ``joint`` (of x and y) with proteins. What
      varies over draws of one chain is Monte Carlo error (and latents shared by cells): it is the members that stand
      for the posterior of the parameters, each of them fitted to these cells.
    - ``sample_stats``: lp, log p(x, z); log_q, log q(z | x); log_px_z, log p(x | z); all of the cell's own latents.
    - ``observed_data``: x (and y); ``constant_data``: environment.

    Draws of a guide are independent, so effective sample sizes say nothing about it. Masks enter lp by their KL, as
    they do in the loss. An encoder that gives points has no density: ``log_likelihood``, lp and log_q are then left
    out; a flat prior has none either: so are ``prior`` and ``prior_predictive``. The attribute ``left_out`` says it.

    Args:
        fitted: a run, or (model, guide).
        cells: to infer.
        draws: S of each member.
        particles: M of each estimate of the log-likelihood; 0 leaves the group out, which is much faster.
        genes: whose expression is kept, all by default; densities are of all genes in any case.
        path: netCDF file to write to, piece by piece, instead of memory; what is returned reads from it when asked.
        seed: of the draws, which do not depend on `path`.

    Raises:
        DataError: an answer too large for memory without a path, a path that is no ``.nc`` file or cannot be written,
            no cells or draws.
    """
    with warnings_of_arviz():
        import arviz  # noqa: F401  (which announces its successor only once)

    if not len(cells) or draws < 1 or particles < 0:
        raise DataError(
            f"{len(cells)} cells, draws = {draws}, particles = {particles}: ask about some cells, with one draw or more"
        )
    kept = _kept(cells, genes)
    count = sum(1 for _ in members(fitted))
    if path is None:
        _refuse_too_large(count, draws, cells, len(kept))
    elif Path(path).suffix != ".nc":
        raise DataError(f"path = {str(path)!r}: the draws are written as netCDF: give a name that ends in .nc")
    coords = {"chain": np.arange(count), "draw": np.arange(draws), "cell": np.array(cells.cells, object)}
    coords |= {"gene": np.array(cells.genes, object)[kept]}
    if cells.y is not None:
        coords["protein"] = np.array(cells.schema.proteins, object)
    parts = _parts(fitted, cells, draws, particles, kept, seed)
    with isolated(), forked():
        first = next(parts)
        layout = _layout(first, count, cells, coords, kept)
        pieces = _assigned(first, parts)
        with warnings_of_arviz():
            return in_memory(layout, pieces) if path is None else in_file(layout, pieces, path)


class _Part(NamedTuple):
    """What one member says of some cells.

    Args:
        member: its number.
        cells: which; None for what cells share.
        own: (group, name) -> ``[S, n, ...]``.
        shared: (group, name) -> ``[S, ...]``.
        nodes: labels.
        left_out: what the model has no density for.
    """

    member: int
    cells: slice
    own: Values
    shared: Values
    nodes: tuple[str, ...]
    left_out: str


def _kept(cells: EnvironmentDataset, genes: Sequence[str] | None) -> IntArray:
    """Columns of the genes to keep."""
    if genes is None:
        return np.arange(len(cells.genes))
    column = {gene: i for i, gene in enumerate(cells.genes)}
    missing = [gene for gene in genes if gene not in column]
    if missing or not genes:
        raise DataError(f"genes = {listing(missing) or 'none'}: name some of the data set's {len(cells.genes)} genes")
    return np.array([column[gene] for gene in genes], np.int64)


def _parts(
    fitted: Fitted, cells: EnvironmentDataset, draws: int, particles: int, kept: IntArray, seed: int
) -> Iterator[_Part]:
    """Cells in pieces small enough to decode with all their particles."""
    width = len(cells.genes) + (0 if cells.y is None else cells.y.shape[1])
    size = max(1, _CHUNK // (width * draws * max(particles, 1)))
    for k, (model, guide) in enumerate(members(fitted)):
        torch.manual_seed(seed + k)  # chains must not share their noise
        device = device_of(model)
        shared: dict[str, Tensor] = {}
        for start in range(0, len(cells), size):
            rows = np.arange(start, min(start + size, len(cells)))
            batch = cells.batch(rows).to(device)
            drawn = Drawn.of(model, guide, batch, draws, shared)
            shared = drawn.shared
            own = drawn.values()
            own |= estimates(model, guide, batch, drawn, particles)
            own |= simulated(model, batch, drawn) if not drawn.flat else {}
            own |= {key: value[..., kept] for key, value in own.items() if key[1] == X and value.ndim == 3}
            both = {("posterior", n): array(v.squeeze(1)) for n, v in shared.items() if n in drawn.reported}
            nodes = tuple(str(n) for n in model.scm.nodes)
            yield _Part(k, slice(start, start + len(rows)), own, both, nodes, drawn.left_out)


# ---------------------------------------------------------------------- where it goes
def _refuse_too_large(count: int, draws: int, cells: EnvironmentDataset, genes: int) -> None:
    width = genes + (0 if cells.y is None else cells.y.shape[1])
    need = 2 * count * draws * len(cells) * width * 4  # posterior and prior predictive
    if need > _LARGEST:
        raise DataError(
            f"{count} x {draws} draws of {len(cells)} cells x {genes} genes take {need / 2**30:.1f} GiB: give a file "
            "to write them to (path='draws.nc'), fewer draws, or some of the cells (cells.subset)"
        )


def _layout(
    first: _Part, count: int, cells: EnvironmentDataset, coords: dict[str, NDArray[Any]], kept: IntArray
) -> Layout:
    """Names, dimensions and sizes of everything, read off the first part."""
    coords["node"] = np.array(first.nodes, object)
    variables: dict[tuple[str, str], Variable] = {}
    for key, value in first.own.items():
        dims = ("chain", "draw", "cell", *_rest(key[1], value.shape[2:], coords))
        variables[key] = Variable(dims, (count, value.shape[0], len(cells), *value.shape[2:]), value.dtype)
    for key, value in first.shared.items():
        dims = ("chain", "draw", *_rest(key[1], value.shape[1:], coords, shared=True))
        variables[key] = Variable(dims, (count, *value.shape), value.dtype)
    batch = cells.batch()
    known = {X: None if batch.x is None else batch.x[:, kept], Y: batch.y}
    constant: dict[tuple[str, str], tuple[tuple[str, ...], NDArray[Any]]] = {
        ("observed_data", name): (("cell", *_rest(name, value.shape[1:], coords)), value.numpy())
        for name, value in known.items()
        if value is not None and ("posterior_predictive", name) in first.own
    }
    names = cells.environments.index.astype(str).to_numpy(object)[cells.env]
    constant["constant_data", "environment"] = (("cell",), names)
    attributes = {"created_by": "pyro_scm", "left_out": first.left_out}
    return Layout(variables, constant, coords, attributes)


def _rest(name: str, shape: tuple[int, ...], coords: Mapping[str, Any], shared: bool = False) -> tuple[str, ...]:
    """Names of the dimensions behind those of draws and cells."""
    own = {Z: "node", C: "node", X: "gene", Y: "protein", "log_background": "protein"}
    if not shared and name in own and shape == (len(coords[own[name]]),):
        return (own[name],)
    return tuple(f"{name}_dim_{i}" for i in range(len(shape)))


def _assigned(first: _Part, others: Iterator[_Part]) -> Iterator[tuple[tuple[str, str], tuple[Any, ...], Any]]:
    """(group, name), place and values of every piece."""
    for parts in ((first,), others):
        for part in parts:
            for key, value in part.own.items():
                yield key, (part.member, slice(None), part.cells), value
            if part.cells.start == 0:
                for key, value in part.shared.items():
                    yield key, (part.member,), value


@contextlib.contextmanager
def warnings_of_arviz() -> Iterator[None]:
    """ArviZ 0.23 announces its successor on import and use, and takes more members than draws for a mistake."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "More chains", UserWarning)
        yield
