"""Time of a training step beside hand-written PyTorch and usual Pyro, and of ensembles, causal layers and do-sweeps.

Every figure is a ratio measured side by side in this one run: variants take turns, times are processor times of one
pinned thread, and the median over rounds is shown.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pyro
import torch

from experiments.benchmarks.references import hand_written, textbook_do, usual_pyro
from experiments.launch import ROOT
from guides import amortise
from pyro_scm import models
from pyro_scm.checkpoints import write_text
from pyro_scm.coordinates import InCausalVariables
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.infer import fit
from pyro_scm.objectives import ImportanceWeighted, Objective
from pyro_scm.query import sweep
from pyro_scm.training import Trainer

GENES, LATENT, HIDDEN, BITS, DRUGS = 978, 200, 500, 1024, 200

Training = Iterator[float]


def screen(cells: int, counts: bool = False) -> EnvironmentDataset:
    """Cells of the L1000 shape: 978 genes, 200 drugs with 1024 fingerprint bits."""
    from anndata import AnnData

    rng = np.random.default_rng(0)
    x = rng.poisson(2.0, (cells, GENES)) if counts else rng.normal(size=(cells, GENES))
    drug = [f"drug {d}" for d in rng.integers(DRUGS, size=cells)]
    bits = {f"drug {d}": (rng.random(BITS) < 0.05).astype(np.float32) for d in range(DRUGS)}
    obs = pd.DataFrame({"drug": drug}, index=[f"cell {i}" for i in range(cells)])
    obs.iloc[0, 0] = "vehicle"
    return EnvironmentDataset.from_anndata(
        AnnData(x.astype(np.float32), obs=obs),
        environment="drug",
        control="vehicle",
        representation=bits,
        counts=counts,
    )


def steps(
    cells: EnvironmentDataset,
    size: int,
    name: str = "environment_vae",
    precision: str = "float32",
    latent: int = LATENT,
    hidden: int = HIDDEN,
    seeds: Sequence[int] = (0,),
    objective: Objective | None = None,
    causal: bool = False,
    **options: object,
) -> Callable[[int], float]:
    """A function: epochs -> median processor seconds of a step of `fit`, once its steps have been recorded."""

    def timed(epochs: int) -> float:
        model = getattr(models, name)(
            cells.schema, latent=latent, hidden=(hidden,), environment_hidden=(hidden,), **options
        )
        model = InCausalVariables(model) if causal else model
        guide = amortise(model, cells, hidden=(hidden,))
        number = -(-len(cells) // size)
        # with more environments than cells in a batch their number differs, and each needs some steps to be recorded
        warm = -(-(400 if len(cells.environments) > size else 60) // number)
        with epoch_clock() as clocks:
            fit(
                model, guide, cells, seeds=seeds, epochs=warm + epochs, batch_size=size, precision=precision,
                objective=objective, progress=False,
            )  # fmt: skip
        return float(np.median(clocks[warm:])) / number

    return timed


@contextmanager
def epoch_clock() -> Iterator[list[float]]:
    """Processor seconds of each epoch that is trained inside."""
    clocks: list[float] = []
    one_epoch = Trainer._one_epoch

    def timed(self: Trainer) -> None:
        start = time.process_time()
        one_epoch(self)
        clocks.append(time.process_time() - start)

    with mock.patch.object(Trainer, "_one_epoch", timed):
        yield clocks


def reference(training: Training, number: int, repeats: int = 4) -> float:
    """Median processor seconds of a step of a reference over some epochs of so many steps, after one to warm up."""
    clocks = []
    for _ in range(1 + repeats):
        start = time.process_time()
        list(itertools.islice(training, number))
        clocks.append(time.process_time() - start)
    return float(np.median(clocks[1:])) / number


def rounds(variants: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant, measured in turn."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, measure in variants.items():
            found[name].append(measure())
    return {name: float(np.median(values)) for name, values in found.items()}


def training_rows(repeats: int, sizes: Sequence[int]) -> Iterator[dict[str, object]]:
    """The Environment VAE at the L1000 shape, against hand-written PyTorch and usual Pyro."""
    for size in sizes:
        number = max(2, 2048 // size)
        cells = screen(size * number)
        times = rounds(
            {
                "hand-written": lambda c=cells, s=size, n=number: reference(hand_written(c, LATENT, HIDDEN, s), n),
                "usual Pyro": lambda c=cells, s=size, n=number: reference(usual_pyro(c, LATENT, HIDDEN, s), n),
                "fit": lambda c=cells, s=size: steps(c, s)(4),
                "fit, bfloat16": lambda c=cells, s=size: steps(c, s, precision="bfloat16")(4),
            },
            repeats,
        )
        for name, seconds in times.items():
            yield _row(f"Environment VAE, batch {size}", name, seconds, "hand-written", times)


def part_rows(repeats: int) -> Iterator[dict[str, object]]:
    """Counts against continuous values, and causal layers against none."""
    cells, counts = screen(2048), screen(2048, counts=True)
    structured = "structured_environment_vae"
    times = rounds(
        {
            "Normal": lambda: steps(cells, 512)(2),
            "negative binomial": lambda: steps(counts, 512)(2),
            "linear SCM": lambda: steps(cells, 512, structured)(2),
            "layered networks, depth 5": lambda: steps(cells, 512, structured, mechanism="network", depth=5)(2),
            "the same, guide proposes c": lambda: steps(
                cells, 512, structured, causal=True, mechanism="network", depth=5
            )(2),
            "5 particles": lambda: steps(cells, 512, objective=Objective(particles=5))(2),
            "5 importance-weighted": lambda: steps(cells, 512, objective=ImportanceWeighted(5))(2),
        },
        repeats,
    )
    for name, seconds in times.items():
        yield _row("parts, batch 512, d = 200", name, seconds, "Normal", times)


def ensemble_rows(repeats: int, numbers: Sequence[int]) -> Iterator[dict[str, object]]:
    """K small models together, against usual Pyro in turn."""
    adata = synthetic.simulate(latent=3, genes=20, environments=6, cells=214, decoder="linear")
    cells = synthetic.dataset(adata, "oracle")
    small = {"latent": 3, "hidden": 16}
    for number in numbers:
        seeds = range(number)
        times = rounds(
            {
                "usual Pyro, in turn": lambda n=number: n * reference(usual_pyro(cells, 3, 16, 64), 20),
                "fit, together": lambda s=seeds: steps(cells, 64, seeds=s, **small)(4),  # type: ignore[arg-type]
            },
            repeats,
        )
        for name, seconds in times.items():
            yield _row(f"{number} small models, batch 64", name, seconds, "usual Pyro, in turn", times)


def sweep_rows(repeats: int) -> Iterator[dict[str, object]]:
    """do(c_j := 1) for all 200 nodes on 1,000 cells."""
    cells = screen(1000)
    model = models.structured_environment_vae(cells.schema, latent=LATENT, hidden=(HIDDEN,))
    guide = amortise(model, cells, hidden=(HIDDEN,))
    batch = cells.batch()

    def one_by_one() -> float:
        start = time.process_time()
        with torch.no_grad(), pyro.validation_enabled(False):
            for site in model.sites:
                textbook_do(model, batch, site, 1.0)
        return time.process_time() - start

    def together(expression: bool) -> float:
        start = time.process_time()
        sweep((model, guide), cells, [1.0], expression=expression)
        return time.process_time() - start

    variants = {
        "poutine.do, one by one": one_by_one,
        "sweep of c and mean x": lambda: together(True),
        "sweep of c": lambda: together(False),
    }
    times = rounds(variants, repeats)
    for name, seconds in times.items():
        yield _row("do-sweep, 200 nodes x 1,000 cells", name, seconds, "poutine.do, one by one", times)


def _row(shape: str, variant: str, seconds: float, base: str, times: dict[str, float]) -> dict[str, object]:
    return {"shape": shape, "variant": variant, "ms": 1e3 * seconds, "ratio": seconds / times[base], "to": base}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--parts", default="training,parts,ensemble,sweep", help="what to measure (default: all)")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512, 2048], help="batch sizes")
    parser.add_argument("--members", type=int, nargs="+", default=[15, 100], help="sizes of ensembles")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "speed.csv", help="CSV to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    made = {
        "training": lambda: training_rows(options.rounds, options.batches),
        "parts": lambda: part_rows(options.rounds),
        "ensemble": lambda: ensemble_rows(options.rounds, options.members),
        "sweep": lambda: sweep_rows(options.rounds),
    }
    rows = []
    for part in options.parts.split(","):
        if part not in made:
            parser.error(f"--parts {part}: choose from {', '.join(made)}")
        for row in made[part]():
            rows.append(row)
            print(f"{row['shape']:36} {row['variant']:28} {row['ms']:10.2f} ms {row['ratio']:7.3f}", flush=True)
    write_text(options.out, pd.DataFrame(rows).to_csv(index=False))
    print(f"Table: {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
