"""Training on a GPU beside hand-written PyTorch, at float32, TF32 and bfloat16, and the CPU's numbers beside the GPU's.

Parts: ``agreement``, losses and gradients of every model on both devices, from the same parameters and noise;
``training``, the Environment VAE at the L1000 shape; ``large``, the same with 5,000 genes and a million cells;
``ensemble``, many small models together. Times are wall times of a step in the median epoch, after those in which
programs are recorded and kernels chosen; the hand-written step is also shown as a CUDA graph, which costs Python
nothing: what a step cannot be faster than. Without a GPU, ``--device cpu --small`` runs the same code at a tiny size.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from experiments.benchmarks.references import HandWritten
from experiments.launch import ROOT
from guides import amortise
from pyro_scm import models, recipes
from pyro_scm.checkpoints import write_text
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.ensemble import Ensemble, System, stack_initial
from pyro_scm.infer import fit
from pyro_scm.objectives import Objective

WARM_STEPS = 60  # more than it takes until `fit` replays recorded steps
TIMED_STEPS = 60
TOLERANCE = 1e-4  # of float32 sums over a batch in another order


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        genes: of the L1000 shape.
        latent: of both shapes.
        hidden: units of the one hidden layer of each network.
        bits: of the fingerprints.
        drugs: environments.
        cells: of the L1000 shape.
        batches: cells a step.
        large_genes: of the large shape.
        large_cells: of the large shape; fewer where memory is short.
        large_batches: cells a step.
        members: of the ensembles.
    """

    genes: int = 978
    latent: int = 200
    hidden: int = 500
    bits: int = 1024
    drugs: int = 200
    cells: int = 65_536
    batches: tuple[int, ...] = (128, 512, 2048, 8192)
    large_genes: int = 5_000
    large_cells: int = 1_000_000
    large_batches: tuple[int, ...] = (2048, 8192)
    members: tuple[int, ...] = (15, 100)


SMALL = Sizes(30, 4, 8, 16, 5, 128, (64,), 40, 256, (64,), (3,))


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured."""

    device: torch.device
    sizes: Sizes
    warm: int
    timed: int

    def wait(self) -> None:
        """Until the device has done all that it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Start the account of memory anew."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        """Largest memory of the device since then, in MiB; NaN where there is no account."""
        return torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else float("nan")


# ---------------------------------------------------------------------- cells
def screen(cells: int, genes: int, sizes: Sizes, counts: bool = False, proteins: int = 0) -> EnvironmentDataset:
    """Random cells of drugs with fingerprints; a few thousand different ones, so that they are soon made."""
    from anndata import AnnData

    rng = np.random.default_rng(0)
    few = min(cells, 4096)
    drawn = rng.poisson(2.0, (few, genes)) if counts else rng.normal(size=(few, genes))
    x = np.resize(drawn.astype(np.float32), (cells, genes))
    drug = [f"drug {d}" for d in rng.integers(sizes.drugs, size=cells)]
    bits = {f"drug {d}": (rng.random(sizes.bits) < 0.05).astype(np.float32) for d in range(sizes.drugs)}
    obs = pd.DataFrame({"drug": drug}, index=[f"cell {i}" for i in range(cells)])
    obs.iloc[0, 0] = "vehicle"
    adata = AnnData(x, obs=obs)
    if proteins:
        names = [f"protein {p}" for p in range(proteins)]
        adata.obsm["protein"] = pd.DataFrame(rng.poisson(5.0, (cells, proteins)), obs.index, names)
    return EnvironmentDataset.from_anndata(
        adata, environment="drug", control="vehicle", representation=bits, counts=counts,
        proteins="protein" if proteins else None,
    )  # fmt: skip


# ---------------------------------------------------------------------- variants: seconds of a step
def fitted(
    bench: Bench, cells: EnvironmentDataset, size: int, precision: str = "float32", seeds: Sequence[int] = (0,)
) -> float:
    """Seconds of a step of `fit` in its median epoch."""
    sizes = bench.sizes
    wide: dict[str, Any] = {"latent": sizes.latent, "hidden": (sizes.hidden,), "environment_hidden": (sizes.hidden,)}
    if len(seeds) > 1:
        wide = {"latent": 3, "hidden": (16,), "environment_hidden": (16,)}
    model = models.environment_vae(cells.schema, **wide)
    guide = amortise(model, cells, hidden=wide["hidden"])
    steps = -(-len(cells) // size)
    warm, timed = -(-bench.warm // steps), max(2, -(-bench.timed // steps))
    run = fit(
        model,
        guide,
        cells,
        seeds=seeds,
        epochs=warm + timed,
        batch_size=size,
        precision=precision,
        device=bench.device,
        progress=False,
    )
    seconds = run.history.groupby("epoch")["seconds"].first().iloc[warm:]
    return float(seconds.median()) / steps


class Reference:
    """Hand-written training: fused Adam, resident data, a new random order each epoch, never a wait for a number."""

    def __init__(
        self, bench: Bench, cells: EnvironmentDataset, size: int, shape: tuple[int, int], precision: str, graph: bool
    ) -> None:
        self.bench, self.size, self.precision = bench, size, precision
        latent, hidden = shape
        torch.manual_seed(0)
        self.model = HandWritten(len(cells.genes), len(cells.features), latent, hidden, cells.counts).to(bench.device)
        batch = cells.batch().to(bench.device)
        assert batch.x is not None
        self.x, self.r, self.row, self.library = batch.x, batch.r, batch.row, batch.size
        self.optimiser = torch.optim.Adam(self.model.parameters(), 1e-3, fused=True, capturable=graph)
        self.rows = torch.zeros(size, dtype=torch.int64, device=bench.device)
        self.graph = self._captured() if graph else None

    def step(self) -> Tensor:
        """One step on the cells `rows`; the loss stays on the device."""
        self.optimiser.zero_grad()
        library = None if self.library is None else self.library[self.rows]
        with torch.autocast(self.bench.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss: Tensor = self.model(self.x[self.rows], self.r[self.row[self.rows]], library)
        loss.backward()
        self.optimiser.step()
        return loss

    def _captured(self) -> "torch.cuda.CUDAGraph":
        """The step as one graph of kernels."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph

    def orders(self) -> Iterator[Tensor]:
        """Rows of whole batches, for ever."""
        while True:
            for rows in torch.randperm(len(self.x), device=self.bench.device).split(self.size):
                if len(rows) == self.size:
                    yield rows

    def seconds(self) -> float:
        """Of a step."""
        orders = self.orders()
        for number in (self.bench.warm, self.bench.timed):
            self.bench.wait()
            start = time.perf_counter()
            for rows in itertools.islice(orders, number):
                self.rows.copy_(rows)
                if self.graph is None:
                    self.step()
                else:
                    self.graph.replay()
            self.bench.wait()
            taken = (time.perf_counter() - start) / number
        return taken


def hand_written(
    bench: Bench, cells: EnvironmentDataset, size: int, precision: str = "float32", graph: bool = False
) -> float:
    """Seconds of a step of hand-written PyTorch."""
    shape = (bench.sizes.latent, bench.sizes.hidden)
    return Reference(bench, cells, min(size, len(cells)), shape, precision, graph).seconds()


def variants(bench: Bench, cells: EnvironmentDataset, size: int) -> Iterator[tuple[str, Callable[[], float], str]]:
    """Name, measurement and precision of matrix products; TF32 and graphs are only a GPU's."""
    gpu = bench.device.type == "cuda"
    for name, precision, products in (("", "float32", "highest"), (", TF32", "float32", "high"),
                                      (", bfloat16", "bfloat16", "highest")):  # fmt: skip
        if products == "high" and not gpu:
            continue
        yield f"hand-written{name}", lambda p=precision: hand_written(bench, cells, size, p), products
        if gpu:
            yield f"hand-written{name}, graph", lambda p=precision: hand_written(bench, cells, size, p, True), products
        yield f"fit{name}", lambda p=precision: fitted(bench, cells, size, p), products


def measured(bench: Bench, shape: str, cells: EnvironmentDataset, size: int) -> Iterator[dict[str, Any]]:
    """Rows of all variants at one shape; one that does not fit into memory says so."""
    base = float("nan")
    for name, measure, products in variants(bench, cells, size):
        torch.set_float32_matmul_precision(products)
        bench.forget()
        try:
            seconds = measure()
        except torch.OutOfMemoryError:
            seconds, name = float("nan"), f"{name} (out of memory)"
        finally:
            torch.set_float32_matmul_precision("highest")
        base = seconds if name == "hand-written" else base
        yield {
            "shape": shape,
            "variant": name,
            "ms": 1e3 * seconds,
            "cells_per_second": size / seconds,
            "ratio": seconds / base,
            "to": "hand-written",
            "peak_mib": bench.peak(),
        }


# ---------------------------------------------------------------------- parts
def training_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """The L1000 shape."""
    cells = screen(bench.sizes.cells, bench.sizes.genes, bench.sizes)
    for size in bench.sizes.batches:
        yield from measured(bench, f"{bench.sizes.genes} genes, batch {size}", cells, size)


def large_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Many genes and cells, resident for the hand-written step; `fit` decides for itself."""
    sizes = bench.sizes
    number = min(sizes.large_cells, room(bench) // (4 * sizes.large_genes))
    cells = screen(number, sizes.large_genes, sizes)
    for size in sizes.large_batches:
        yield from measured(bench, f"{sizes.large_genes} genes x {number} cells, batch {size}", cells, size)


def room(bench: Bench) -> int:
    """Bytes that a matrix may take: a quarter of the host's memory, and two thirds of what the device has free."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    if bench.device.type != "cuda":
        return host
    return min(host, torch.cuda.mem_get_info(bench.device)[0] * 2 // 3)


def ensemble_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """K small models together, against hand-written ones in turn."""
    adata = synthetic.simulate(latent=3, genes=20, environments=6, cells=214, decoder="linear")
    cells, size = synthetic.dataset(adata, "oracle"), 64
    alone = Reference(bench, cells, size, (3, 16), "float32", False).seconds()
    for number in bench.sizes.members:
        bench.forget()
        together = fitted(bench, cells, size, seeds=range(number))
        for name, seconds in (("hand-written, in turn", number * alone), ("fit, together", together)):
            yield {
                "shape": f"{number} small models, batch {size}",
                "variant": name,
                "ms": 1e3 * seconds,
                "cells_per_second": number * size / seconds,
                "ratio": seconds / (number * alone),
                "to": "hand-written, in turn",
                "peak_mib": bench.peak() if name.startswith("fit") else float("nan"),
            }


def agreement_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Loss and gradient of every model on the CPU and on the device, from the same parameters and noise."""
    sizes = bench.sizes
    for counts in (False, True):
        cells = screen(min(512, sizes.cells), sizes.genes, sizes, counts, proteins=5)
        for name in recipes.RECIPES:
            model, guide = recipes.make(name, cells.schema, latent=min(20, sizes.latent))
            system = System(model, guide, Objective())
            parameters = stack_initial(system, (0, 1))
            ensemble = Ensemble(system, parameters, [torch.Generator().manual_seed(s) for s in (0, 1)])
            noise = ensemble.noise(cells.batch())
            found = [gradients(system, cells, parameters, noise, d) for d in (torch.device("cpu"), bench.device)]
            (loss, slope), (other, others) = found
            yield {
                "shape": f"{name}, {'counts' if counts else 'continuous'}",
                "variant": "loss and gradient",
                "loss_difference": float(((other - loss) / loss).abs().max()),
                "gradient_difference": float((others - slope).norm() / slope.norm()),
            }


def gradients(
    system: System,
    cells: EnvironmentDataset,
    parameters: dict[str, Tensor],
    noise: dict[str, Tensor],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Losses ``(K,)`` and the whole gradient as one vector, in double precision on the CPU."""
    system.to(device)
    own = {name: value.to(device) for name, value in parameters.items()}
    ensemble = Ensemble(system, own, [torch.Generator(device) for _ in range(len(next(iter(own.values()))))])
    losses = ensemble.losses(cells.batch().to(device), {name: value.to(device) for name, value in noise.items()})
    trained = [p for p in ensemble.parameters.values() if p.requires_grad]
    found = torch.autograd.grad(losses["loss"].sum(), trained, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
    return losses["loss"].detach().double().cpu(), torch.cat([g.reshape(-1).double().cpu() for g in flat])


PARTS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "agreement": agreement_rows,
    "training": training_rows,
    "ensemble": ensemble_rows,
    "large": large_rows,
}


def shown(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "loss_difference" in row:
        verdict = "" if agrees(row) else "  DISAGREES"
        return (
            f"{row['shape']:44} {row['variant']:32} loss {row['loss_difference']:.1e}, "
            f"gradient {row['gradient_difference']:.1e}{verdict}"
        )
    return (
        f"{row['shape']:44} {row['variant']:32} {row['ms']:10.3f} ms {row['cells_per_second']:12,.0f} cells/s "
        f"{row['ratio']:7.3f} {row['peak_mib']:10,.0f} MiB"
    )


def agrees(row: dict[str, Any]) -> bool:
    """Whether the device computes what the CPU does."""
    return max(row.get("loss_difference", 0.0), row.get("gradient_difference", 0.0)) <= TOLERANCE


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write it as CSV.

    Returns:
        0; 1 where the devices disagree; 2 without the device.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (default: cuda)")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a test, not a result")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"what to measure (default: {','.join(PARTS)})")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "gpu.csv", help="CSV to write")
    options = parser.parse_args(argv)
    parts = options.parts.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--parts {options.parts}: choose from {', '.join(PARTS)}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "gpu: error: torch sees no GPU here: nothing was measured (--device cpu --small tests it)", file=sys.stderr
        )
        return 2
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    bench = Bench(
        device, SMALL if options.small else Sizes(), *((2, 2) if options.small else (WARM_STEPS, TIMED_STEPS))
    )
    rows = []
    for part in parts:
        for row in PARTS[part](bench):
            rows.append({"part": part, **row})
            print(shown(row), flush=True)
    write_text(options.out, pd.DataFrame(rows).to_csv(index=False))
    print(f"Table: {options.out}", file=sys.stderr)
    return 0 if all(agrees(row) for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
