"""`Feeder`: cells in mini-batches, on the device of the training."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.stored import StoredMatrix, Values
from pyro_scm.distributions import TABLE
from pyro_scm.errors import ModelError

__all__ = ["BLOCK", "SHUFFLES", "Feeder"]

BLOCK = 1024
"""Consecutive cells that ``"blocks"`` keeps together."""
SHUFFLES = ("auto", "cells", "blocks")

_RESIDENT_BYTES = 2 << 30
_ROUNDED = 8

Rows: TypeAlias = NDArray[np.int64]


class Feeder:
    """Cells on the training's device: resident where they fit, else dense one batch at a time.

    Expression that is on disk and does not fit is read a buffer at a time, while the buffer before it is used.

    Args:
        cells: to feed.
        device: to feed them to.
        buffer: blocks of 1,024 cells that are shuffled together, and read at once. Two buffers are held at most.
    """

    def __init__(self, cells: EnvironmentDataset, device: torch.device, buffer: int = 16) -> None:
        self.cells, self.device = cells, device
        self.buffer = buffer * BLOCK  # in cells
        fits = len(cells) * len(cells.genes) * 4 <= _room(device)
        self.resident = _with_large(cells.batch().to(device), cells.counts) if fits else None
        # whether expression is read from disk during training
        self.streams = not fits and isinstance(cells.x, StoredMatrix)
        self._labels = cells.labels().to(device) if self.streams else None

    def __len__(self) -> int:
        return len(self.cells)

    def order(self, epoch: int, shuffle: str = "auto") -> Rows:
        """The order of the cells in an epoch, a permutation.

        Args:
            epoch: number; each has an order of its own.
            shuffle: ``"cells"``: any cell anywhere. ``"blocks"``: blocks of 1,024 consecutive cells in random order,
                and the cells within each `buffer` of blocks; where the first block begins is random too, so that no
                cell is always in the short one at the end. ``"auto"``: blocks where the cells are read from disk.

        Raises:
            ModelError: an unknown shuffle.
        """
        if shuffle not in SHUFFLES:
            raise ModelError(f"unknown shuffle {shuffle!r}: use one of {', '.join(SHUFFLES)}")
        generator, number = np.random.default_rng(epoch), len(self)
        if shuffle == "cells" or (shuffle == "auto" and not self.streams):
            return generator.permutation(number)
        rows = np.roll(np.arange(number), int(generator.integers(number)))
        whole = number // BLOCK
        order = np.concatenate([rows[: whole * BLOCK].reshape(whole, BLOCK)[generator.permutation(whole)].ravel(),
                                rows[whole * BLOCK :]])  # fmt: skip
        for start in range(0, number, self.buffer):
            generator.shuffle(order[start : start + self.buffer])
        return order

    def batches(self, size: int, order: Rows | None = None, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """All cells in mini-batches of `size`, in the given order.

        Args:
            size: cells of a batch.
            order: row numbers; the cells' own order by default.
            part: (rank, world): of each batch, the rank-th of `world` shares of consecutive cells, as equal as can be.
                Where a batch has too few cells for a share, it is the batch's first cell.

        Raises:
            DataError: expression on disk that is damaged or has changed.
        """
        order = np.arange(len(self)) if order is None else np.asarray(order, np.int64)
        places, size = _share(len(order), size, part)
        mine = order[places]
        if self.resident is not None:
            for rows in torch.as_tensor(mine, device=self.device).split(size):
                yield _take(self.resident, rows)
        elif self.streams:
            yield from self._streamed(mine, size, np.searchsorted(places, np.arange(0, len(order), self.buffer)))
        else:
            for batch in self.cells.batches(size, mine):
                yield batch.to(self.device)

    def _streamed(self, order: Rows, size: int, starts: Rows) -> Iterator[Batch]:
        """Batches of cells on disk, which are read from one of `starts` in the order to the next."""
        labels, buffers = self._labels, self._buffers(order, starts)
        assert labels is not None
        buffer, end = None, 0
        for start in range(0, len(order), size):
            rows, done, parts = order[start : start + size], start, []
            while done < start + len(rows):
                if buffer is None or done == end:
                    buffer = None  # before the next but one is read
                    buffer, end = next(buffers)
                stop = min(end, start + len(rows))
                parts.append(buffer.dense(order[done:stop]))
                done = stop
            x = torch.as_tensor(parts[0] if len(parts) == 1 else np.concatenate(parts))
            yield replace(_take(labels, torch.as_tensor(rows, device=self.device)), x=x.to(self.device))

    def _buffers(self, order: Rows, starts: Rows) -> Iterator[tuple["_Buffer", int]]:
        """Each buffer and where in the order it ends; the next one is read meanwhile."""
        ends = [*starts[1:].tolist(), len(order)]

        def read(k: int) -> tuple[_Buffer, int]:
            rows = np.unique(order[starts[k] : ends[k]])
            return _Buffer(rows, self.cells.x.read(rows)), ends[k]  # type: ignore[union-attr]

        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(read, 0)
            for k in range(1, len(ends) + 1):
                present = coming.result()
                if k < len(ends):
                    coming = reader.submit(read, k)
                yield present
                del present


def _with_large(cells: Batch, counts: bool) -> Batch:
    if not counts or cells.x is None:
        return cells
    return replace(cells, large=(cells.x.amax(0) >= TABLE).nonzero().squeeze(1))


def _room(device: torch.device) -> float:
    """Bytes that resident cells may take: on a GPU half of what is free."""
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else _RESIDENT_BYTES


class _Buffer:
    """Rows of a matrix on disk that are in memory, ascending."""

    def __init__(self, rows: Rows, values: Values) -> None:
        self.rows, self.values = rows, values

    def dense(self, rows: Rows) -> NDArray[np.float32]:
        """Some of them, in any order."""
        found: Any = self.values[np.searchsorted(self.rows, rows)]
        dense: NDArray[Any] = found if isinstance(found, np.ndarray) else found.toarray()
        return dense.astype(np.float32, copy=False)


def _share(number: int, size: int, part: tuple[int, int]) -> tuple[Rows, int]:
    """Positions of a rank's cells among `number` in batches of `size`, and how many of them a batch has."""
    rank, world = part
    if world == 1:
        return np.arange(number), size

    def within(cells: int) -> Rows:
        own = np.array_split(np.arange(cells), world)[rank]
        return own if len(own) else np.zeros(min(cells, 1), np.int64)

    whole, rest = divmod(number, size)
    full, last = within(size), within(rest)
    places = (np.arange(whole)[:, None] * size + full).ravel()
    return np.concatenate([places, whole * size + last]), len(full) if whole else len(last)


def _take(cells: Batch, rows: Tensor) -> Batch:
    """Some cells of a resident batch, and of its environments no more than are needed."""

    def pick(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.index_select(0, rows)

    row, r, perturbed = cells.row.index_select(0, rows), cells.r, cells.perturbed
    if len(r) > len(rows):  # evaluating a whole large table would cost more than finding the distinct rows
        distinct, row = torch.unique(row, return_inverse=True)
        # their number changes from batch to batch: rounded up, few shapes occur, and steps can be recorded
        distinct = nn.functional.pad(distinct, (0, -len(distinct) % _ROUNDED))
        r, perturbed = r.index_select(0, distinct), perturbed.index_select(0, distinct)
    return replace(
        cells,
        index=rows,
        env=cells.env.index_select(0, rows),
        row=row,
        r=r,
        perturbed=perturbed,
        x=pick(cells.x),
        y=pick(cells.y),
        size=pick(cells.size),
        covariates={name: value.index_select(0, rows) for name, value in cells.covariates.items()},
    )
