"""`Feeder`: cells in mini-batches, on the device of the training."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset

__all__ = ["Feeder"]

_RESIDENT_BYTES = 2 << 30


class Feeder:
    """Cells on the training's device: resident where they fit, else dense one batch at a time."""

    def __init__(self, cells: EnvironmentDataset, device: torch.device) -> None:
        self.cells, self.device = cells, device
        fits = len(cells) * len(cells.genes) * 4 <= _RESIDENT_BYTES
        self.resident = cells.batch().to(device) if fits else None

    def __len__(self) -> int:
        return len(self.cells)

    def batches(self, size: int, order: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        """All cells in mini-batches of `size`, in the given order."""
        if self.resident is None:
            for batch in self.cells.batches(size, order):
                yield batch.to(self.device)
            return
        rows = torch.as_tensor(np.arange(len(self.cells)) if order is None else order, device=self.device)
        for part in rows.split(size):
            yield _take(self.resident, part)


def _take(cells: Batch, rows: Tensor) -> Batch:
    """Some cells of a resident batch, and of its environments no more than are needed."""

    def pick(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.index_select(0, rows)

    row, r, perturbed = cells.row.index_select(0, rows), cells.r, cells.perturbed
    if len(r) > len(rows):  # evaluating a whole large table would cost more than finding the distinct rows
        distinct, row = torch.unique(row, return_inverse=True)
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
