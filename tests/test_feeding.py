import os
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pyro_scm import feeding
from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, ModelError
from pyro_scm.feeding import BLOCK, Feeder
from pyro_scm.infer import fit
from tests.screens import make

CPU = torch.device("cpu")
CELLS, GENES = 5 * BLOCK + 300, 6


def write(folder: Path, form: Any = sp.csr_matrix, cells: int = CELLS, drugs: int = 5) -> Path:
    rng = np.random.default_rng(0)
    drug = rng.integers(drugs, size=cells)
    drug[0] = 0
    obs = pd.DataFrame(
        {"drug": [f"d{i:03d}" for i in drug], "plate": rng.choice(["x", "y"], cells)},
        index=[f"c{i}" for i in range(cells)],
    )
    x = rng.poisson(1.0, (cells, GENES)).astype(np.float32)
    x[:, 0] += 1
    adata = anndata.AnnData(form(x), obs=obs)
    adata.obsm["surface"] = rng.poisson(2.0, (cells, 2)).astype(np.float32)
    adata.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def open_cells(path: Path) -> EnvironmentDataset:
    return EnvironmentDataset.open(
        path, environment="drug", control="d000", covariates=["plate"], proteins="surface", representation="one-hot"
    )


def feeders(cells: EnvironmentDataset, buffer: int = 2) -> tuple[Feeder, Feeder]:
    """One that reads its cells from disk, and one of the same cells in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeding, "_RESIDENT_BYTES", 0)
        streamed = Feeder(cells, CPU, buffer)
    resident = Feeder(cells, CPU, buffer)
    assert streamed.streams
    assert streamed.resident is None
    assert not resident.streams
    assert resident.resident is not None
    return streamed, resident


def assert_equal(a: Batch, b: Batch) -> None:
    for name in ("index", "env", "row", "r", "perturbed", "x", "y", "size"):
        one, other = getattr(a, name), getattr(b, name)
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name
    assert torch.equal(a.covariates["plate"], b.covariates["plate"])
    assert a.total == b.total


# ---------------------------------------------------------------------- the order
@pytest.mark.parametrize("number", [1, 300, BLOCK, 3 * BLOCK, CELLS])
@pytest.mark.parametrize("shuffle", feeding.SHUFFLES)
def test_an_order_has_every_cell_once_and_each_epoch_its_own(tmp_path: Path, number: int, shuffle: str) -> None:
    feeder = Feeder(open_cells(write(tmp_path, cells=number)), CPU, 2)
    first, second = feeder.order(0, shuffle), feeder.order(1, shuffle)
    assert sorted(first.tolist()) == list(range(number))
    assert sorted(second.tolist()) == list(range(number))
    assert first.tolist() == feeder.order(0, shuffle).tolist()
    assert number == 1 or first.tolist() != second.tolist()


def test_cells_are_shuffled_as_one(tmp_path: Path) -> None:
    feeder = Feeder(open_cells(write(tmp_path)), CPU)
    assert feeder.order(3, "cells").tolist() == np.random.default_rng(3).permutation(CELLS).tolist()


def test_blocks_stay_within_a_buffer_and_are_mixed_there(tmp_path: Path) -> None:
    feeder = Feeder(open_cells(write(tmp_path)), CPU, 2)
    last = set()
    for epoch in range(8):
        order = feeder.order(epoch, "blocks")
        for start in range(0, CELLS, 2 * BLOCK):
            part = np.sort(order[start : start + 2 * BLOCK])
            gaps = np.diff(np.append(part, part[0] + CELLS))  # the cells follow one another as on a ring
            assert (gaps > 1).sum() <= 2
            assert np.abs(np.diff(order[start : start + 2 * BLOCK])).mean() > 100
        last.add(tuple(np.sort(order[-300:]).tolist()))
    assert len(last) == 8


def test_blocks_are_for_cells_on_disk_unless_asked_for(tmp_path: Path) -> None:
    streamed, resident = feeders(open_cells(write(tmp_path)))
    assert streamed.order(2).tolist() == streamed.order(2, "blocks").tolist() == resident.order(2, "blocks").tolist()
    assert resident.order(2).tolist() == resident.order(2, "cells").tolist() == streamed.order(2, "cells").tolist()
    with pytest.raises(ModelError, match="unknown shuffle 'rows': use one of auto, cells, blocks"):
        resident.order(0, "rows")


# ---------------------------------------------------------------------- the batches
@pytest.mark.parametrize("form", [sp.csr_matrix, np.asarray])
@pytest.mark.parametrize("shuffle", ["blocks", "cells", "none"])
@pytest.mark.parametrize("part", [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_cells_on_disk_come_as_those_in_memory(form: Any, shuffle: str, part: tuple[int, int], tmp_path: Path) -> None:
    streamed, resident = feeders(open_cells(write(tmp_path, form)))
    order = None if shuffle == "none" else streamed.order(1, shuffle)
    for size in (700, 5000):  # batches across two buffers, and of more than two
        count = 0
        for a, b in zip(streamed.batches(size, order, part), resident.batches(size, order, part), strict=True):
            assert_equal(a, b)
            count += 1
        assert count == -(-CELLS // size)


@pytest.mark.parametrize("drugs", [5, 200])
def test_batches_are_those_of_the_data_set(drugs: int, tmp_path: Path) -> None:
    cells = open_cells(write(tmp_path, drugs=drugs))
    feeder, _ = feeders(cells)
    for size in (150, 4096):
        order = feeder.order(0)
        batches = list(feeder.batches(size, order))
        assert [b.index.tolist() for b in batches] == [order[s : s + size].tolist() for s in range(0, len(order), size)]
        found, expected = batches[1], cells.batch(order[size : 2 * size])
        if drugs > size:  # a few rows more, so that few shapes occur
            assert len(expected.r) <= len(found.r) < len(expected.r) + 8
            assert len(found.r) % 8 == 0
            for name in ("r", "perturbed"):
                assert torch.equal(getattr(found, name)[found.row], getattr(expected, name)[expected.row])
            found = replace(found, r=expected.r, perturbed=expected.perturbed, row=expected.row)
        assert_equal(found, expected)


def test_ranks_share_each_batch_of_one_process(tmp_path: Path) -> None:
    cells = open_cells(write(tmp_path, cells=1030))
    loaded = cells.load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeding, "_RESIDENT_BYTES", 0)
        kinds = [Feeder(cells, CPU), Feeder(loaded, CPU)]  # on disk, and in memory but not on the device
    kinds.append(Feeder(loaded, CPU))
    order = kinds[0].order(5, "cells")
    for feeder in kinds:
        for size, world in ((100, 3), (64, 4), (2, 3), (1029, 2)):
            parts = [list(feeder.batches(size, order, (rank, world))) for rank in range(world)]
            assert len({len(part) for part in parts}) == 1
            for i, start in enumerate(range(0, len(order), size)):
                rows = order[start : start + size]
                for rank, share in enumerate(np.array_split(rows, world)):
                    expected = share if len(share) else rows[:1]
                    assert parts[rank][i].index.tolist() == expected.tolist(), (size, world, i, rank)
            x = parts[-1][-1].x
            assert x is not None
            np.testing.assert_array_equal(x, loaded.x[parts[-1][-1].index.numpy()].toarray())


def test_an_order_may_leave_cells_out_and_repeat_others(tmp_path: Path) -> None:
    streamed, resident = feeders(open_cells(write(tmp_path)))
    order = np.array([5, 5, 4000, 2, 5, 3999, 3999])
    for a, b in zip(streamed.batches(3, order), resident.batches(3, order), strict=True):
        assert_equal(a, b)
    assert list(streamed.batches(3, order[:0])) == []


def test_a_part_of_the_cells_is_streamed_as_it_is_in_memory(tmp_path: Path) -> None:
    cells = open_cells(write(tmp_path))
    rows = np.random.default_rng(0).permutation(CELLS)[:3000]
    streamed, resident = feeders(cells.subset(rows), buffer=1)
    order = streamed.order(0)
    for a, b in zip(streamed.batches(500, order), resident.batches(500, order), strict=True):
        assert_equal(a, b)


# ---------------------------------------------------------------------- reading
def watch(cells: EnvironmentDataset, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[Any]]:
    """Numbers of rows that are read from now on, and references to what is read."""
    numbers, held = [], []
    read = type(cells.x).read

    def reading(self: Any, rows: Any) -> Any:
        values = read(self, rows)
        numbers.append(len(rows))
        held.append(weakref.ref(values))
        return values

    monkeypatch.setattr(type(cells.x), "read", reading)
    return numbers, held


def test_each_cell_is_read_once_and_two_buffers_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = open_cells(write(tmp_path, np.asarray))
    feeder, _ = feeders(cells, buffer=1)
    numbers, held = watch(cells, monkeypatch)
    for _ in feeder.batches(300, feeder.order(0)):
        assert sum(ref() is not None for ref in held) <= 2
    assert numbers == [BLOCK] * 5 + [300]
    assert all(ref() is None for ref in held)


def test_a_rank_reads_its_own_cells_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = open_cells(write(tmp_path))
    feeder, _ = feeders(cells, buffer=2)
    numbers, _ = watch(cells, monkeypatch)
    list(feeder.batches(256, feeder.order(0), (1, 2)))
    assert numbers == [BLOCK, BLOCK, (BLOCK + 300) // 2]


def test_blocks_are_read_as_slices_of_the_file(tmp_path: Path) -> None:
    cells: Any = open_cells(write(tmp_path, np.asarray))
    feeder, _ = feeders(cells, buffer=2)
    slices = []

    class Counting:
        def __init__(self, array: Any) -> None:
            self.array, self.dtype = array, array.dtype

        def __getitem__(self, key: Any) -> Any:
            slices.append(key[0].stop - key[0].start)
            return self.array[key]

    cells.x._source._opened = (os.getpid(), tuple(Counting(array) for array in cells.x._source.arrays))
    for _ in feeder.batches(128, feeder.order(1)):
        pass
    assert sum(slices) == CELLS
    assert len(slices) <= 9  # 6 blocks, of which one goes over the end, cut where they lie side by side


def test_the_next_buffer_is_read_while_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = open_cells(write(tmp_path))
    feeder, _ = feeders(cells, buffer=1)
    numbers, _ = watch(cells, monkeypatch)
    batches = feeder.batches(BLOCK, feeder.order(0))
    next(batches)
    deadline = time.monotonic() + 10
    while len(numbers) < 2 and time.monotonic() < deadline:  # the reader goes on of its own accord
        time.sleep(0.01)
    assert len(numbers) == 2
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def test_a_file_that_changes_during_training_is_an_error_there(tmp_path: Path) -> None:
    path = write(tmp_path)
    feeder, _ = feeders(open_cells(path), buffer=1)
    os.utime(path, ns=(0, 1))
    with pytest.raises(DataError, match=r"cells\.h5ad has changed since it was opened"):
        list(feeder.batches(100))


# ---------------------------------------------------------------------- training
def test_training_from_disk_gives_what_training_in_memory_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = open_cells(write(tmp_path, cells=2 * BLOCK + 100))

    def parameters() -> dict[str, torch.Tensor]:
        model, guide = make("environment_vae", cells.schema)
        run = fit(model, guide, cells, validation=cells.subset(np.arange(50)), epochs=2, batch_size=512,
                  shuffle="blocks", progress=False)  # fmt: skip
        return run.parameters

    resident = parameters()
    monkeypatch.setattr(feeding, "_RESIDENT_BYTES", 0)
    streamed = parameters()
    assert resident.keys() == streamed.keys()
    for name, value in resident.items():
        assert torch.equal(value, streamed[name]), name
