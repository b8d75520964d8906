"""Training from disk beside training from memory: cells a second, and the memory that it takes.

A synthetic screen of counts is written block by block where it is not there yet. A fresh process opens all of it,
trains on some of its blocks and reports its peak resident memory. Then training from disk and from memory take turns
on the same cells, which lie all over the file; the page cache is warm if it can hold the file, which opening has read.
Times are wall times of an epoch, with one thread for the computation and one that reads ahead; of a fit's epochs the
first does not count. The median over all is shown, and the best, which other work on the machine disturbs least.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from experiments.launch import ROOT
from guides import amortise
from pyro_scm import feeding, models
from pyro_scm.checkpoints import write_text
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.feeding import BLOCK, Feeder
from pyro_scm.infer import fit

LATENT, HIDDEN, BITS, DRUGS = 200, 500, 1024, 200
ROWS = 4096  # written at once


def write(path: Path, cells: int, genes: int, density: float) -> None:
    """A screen of counts as AnnData stores it, CSR in float32; never more than a block of it in memory."""
    from anndata.io import write_elem

    rng = np.random.default_rng(0)
    share = rng.beta(2.0, 2.0 / density - 2.0, genes).astype(np.float32)  # of the cells that have a count of a gene
    share[0] = 1  # so that no cell is empty
    amount = np.ceil(-np.log1p(-(np.arange(256) + 0.5) / 256) * 3).astype(np.float32)  # geometric, by 256 quantiles
    names = pd.Index(["vehicle", *(f"drug {d}" for d in range(DRUGS))])
    drug = pd.Categorical.from_codes(rng.integers(len(names), size=cells), names)
    part = path.with_suffix(".part" + path.suffix)
    part.parent.mkdir(parents=True, exist_ok=True)
    root = _create(part)
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    write_elem(root, "obs", pd.DataFrame({"drug": drug}, index=[f"cell {i}" for i in range(cells)]))
    write_elem(root, "var", pd.DataFrame(index=[f"gene {j}" for j in range(genes)]))
    x = root.create_group("X")
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [cells, genes]})
    starts = np.zeros(cells + 1, np.int64)
    data, indices = (_column(x, name, dtype) for name, dtype in (("data", "f4"), ("indices", "i4")))
    for start in range(0, cells, ROWS):
        there = rng.random((min(ROWS, cells - start), genes), np.float32) < share
        columns = (np.flatnonzero(there) % genes).astype(np.int32)
        begin, end = int(starts[start]), int(starts[start]) + len(columns)
        starts[start + 1 : start + len(there) + 1] = begin + np.cumsum(there.sum(1))
        for array, values in ((data, amount[rng.integers(256, size=len(columns), dtype=np.uint8)]), (indices, columns)):
            array.resize((end,))
            array[begin:end] = values
    write_elem(x, "indptr", starts)
    if path.suffix == ".h5ad":
        root.close()
    part.rename(path)


def _create(path: Path) -> Any:
    if path.suffix == ".h5ad":
        import h5py

        return h5py.File(path, "w")
    import zarr

    return zarr.open_group(str(path), mode="w")


def _column(group: Any, name: str, dtype: str) -> Any:
    """An array that grows."""
    if hasattr(group, "create_array"):
        return group.create_array(name, shape=(0,), dtype=dtype, chunks=(1 << 18,))
    return group.create_dataset(name, shape=(0,), dtype=dtype, chunks=(1 << 18,), maxshape=(None,))


def screen(path: Path) -> EnvironmentDataset:
    """The whole screen, its counts on disk."""
    rng = np.random.default_rng(1)
    bits = {f"drug {d}": (rng.random(BITS) < 0.05).astype(np.float32) for d in range(DRUGS)}
    return EnvironmentDataset.open(path, environment="drug", control="vehicle", representation=bits)


def spread(cells: EnvironmentDataset, number: int) -> EnvironmentDataset:
    """About so many cells, in blocks that lie evenly over all of them."""
    blocks = max(1, number // BLOCK)
    starts = np.linspace(0, max(len(cells) - BLOCK, 0), blocks).astype(np.int64)
    return cells.subset(np.unique((starts[:, None] + np.arange(min(BLOCK, len(cells)))).ravel()))


def train(cells: EnvironmentDataset, size: int, epochs: int, streamed: bool) -> pd.DataFrame:
    """History of a training of the Environment VAE, from disk or from memory."""
    model = models.environment_vae(cells.schema, latent=LATENT, hidden=(HIDDEN,), environment_hidden=(HIDDEN,))
    guide = amortise(model, cells, hidden=(HIDDEN,))
    limit = feeding._RESIDENT_BYTES
    feeding._RESIDENT_BYTES = 0 if streamed else limit  # these few cells would fit into memory
    try:
        return fit(model, guide, cells, epochs=epochs, batch_size=size, shuffle="blocks", progress=False).history
    finally:
        feeding._RESIDENT_BYTES = limit


def memory(path: Path, size: int, steps: int) -> dict[str, float]:
    """Peak resident memory in GB of this process after each stage, and seconds of each.

    The whole screen is opened, summarised and fed as a training on all of it would, for three buffers.
    """
    found: dict[str, float] = {}
    started = time.perf_counter()

    def note(stage: str) -> None:
        nonlocal started
        now = time.perf_counter()
        found[f"{stage}, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        found[f"{stage}, s"] = now - started
        started = now

    note("imports")
    cells = screen(path)
    note("all cells opened")
    cells.schema  # noqa: B018  # a pass over all cells
    note("all cells summarised")
    train(spread(cells, steps * size), size, 1, streamed=True)
    note("trained")
    feeder = Feeder(cells, torch.device("cpu"))
    for i, _ in enumerate(feeder.batches(size, feeder.order(0, "blocks"))):
        if i * size > 3 * feeder.buffer:
            break
    note("all cells fed")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "benchmarks", help="of the screen")
    parser.add_argument("--format", choices=("h5ad", "zarr"), default="h5ad", help="of the screen (default: h5ad)")
    parser.add_argument("--cells", type=int, default=1_000_000, help="of the screen (default: 1000000)")
    parser.add_argument("--genes", type=int, default=2500, help="of the screen (default: 2500)")
    parser.add_argument(
        "--density", type=float, default=0.5, help="share of values that are not 0 (default: 0.5: 10 GB)"
    )
    parser.add_argument("--batch", type=int, default=512, help="cells of a batch (default: 512)")
    parser.add_argument("--steps", type=int, default=48, help="steps of an epoch (default: 48)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in turn (default: 3)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "streaming.csv", help="CSV")
    parser.add_argument("--memory", action="store_true", help="measure the memory of this process and nothing else")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    path: Path = options.folder / f"screen_{options.cells}x{options.genes}_{options.density:g}.{options.format}"
    if options.memory:
        print(json.dumps(memory(path, options.batch, options.steps)))
        return 0
    if not path.exists():
        print(f"Writing {path}", file=sys.stderr)
        write(path, options.cells, options.genes, options.density)
    # before this process grows: a child's peak begins at its parent's
    given = list(sys.argv[1:] if argv is None else argv)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.streaming", *given, "--memory"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    rows = [{"what": what, "value": value} for what, value in json.loads(done.stdout).items()]
    for row in rows:
        print(f"{row['what']:32} {row['value']:12.2f}", flush=True)
    part = spread(screen(path), options.steps * options.batch)
    loaded = part.load()
    speeds: dict[str, list[float]] = {"from disk": [], "from memory": []}
    for _ in range(options.rounds):
        for kind, cells in (("from disk", part), ("from memory", loaded)):
            history = train(cells, options.batch, 3, streamed=kind == "from disk")
            speeds[kind] += (len(cells) / history["seconds"].iloc[1:]).tolist()
            print(f"{kind:32} {speeds[kind][-1]:12.0f} cells/s", flush=True)
    for name, of in (("median", np.median), ("best", np.max)):
        disk, resident = (float(of(values)) for values in speeds.values())
        for what, value in (("from disk", disk), ("from memory", resident), ("ratio", disk / resident)):
            rows.append({"what": f"{name} cells/s {what}", "value": value})
            print(f"{rows[-1]['what']:32} {value:12.2f}", flush=True)
    write_text(options.out, pd.DataFrame(rows).assign(screen=path.name, batch=options.batch).to_csv(index=False))
    print(f"Table: {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
