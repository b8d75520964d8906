"""Training throughput and memory of `pyro_scm.fit` beside other programs' own training loops, on like models.

Cells a second of processor time (and of wall-clock time) on one thread, data loading included as each program does it
by default. Start-up and warm-up are left out: a peer's first epoch, and of `fit` the epochs in which it records its
steps (60 steps, 400 where a batch holds fewer cells than there are environments). Memory is the peak resident memory
of a process that does nothing else. Every training runs in a process of its own; programs take turns, and the median
over rounds is shown. All see the same simulated cells: 978 genes, 200 drugs; log1p of counts, or counts.

What each peer needs, each in an environment of its own:

  scvi      pip install scvi-tools                  --python scvi=VENV/bin/python
  chemcpa   a checkout of theislab/chemCPA, and     --python chemcpa=VENV/bin/python --source chemcpa=CHECKOUT
            torch lightning torchmetrics hydra-core scanpy rdkit scikit-learn h5py
  sams-vae  a checkout of insitro/sams-vae, and     --python sams-vae=VENV/bin/python --source sams-vae=CHECKOUT
            torch pytorch-lightning pyro-ppl anndata scikit-learn tqdm
  cpa       a checkout of facebookresearch/CPA, and --python cpa=VENV/bin/python --source cpa=CHECKOUT
            torch

A peer that is not given, or that cannot be imported, is listed as not installed. What is changed of a peer so that it
runs on a processor and from memory is said in `peer_models.py`, at the function of its name.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.launch import ROOT
from pyro_scm.checkpoints import write_text

CHILD = Path(__file__).with_name("peer_models.py")
LATENT, HIDDEN, SEED = 200, 500, 0
TIME_LIMIT = 1200.0
OURS = "pyro_scm"

Result = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """A program and what it is asked to train.

    Args:
        name: as the table shows it.
        peer: which function of `peer_models.py`.
        options: for that function.
    """

    name: str
    peer: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A peer and the models of this suite that are like it.

    Args:
        name: short.
        peer: the peer.
        ours: like models, the likest first.
        target: how many times as many cells a second are wanted of the first.
    """

    name: str
    peer: Program
    ours: tuple[Program, ...]
    target: float | None = None


def _ours(name: str, model: str, architecture: str, inputs: Sequence[str] = ("x",), **options: Any) -> Program:
    guide = {"inputs": list(inputs), "conditioning": options.pop("conditioning", "concatenate")}
    rest = {"model_options": {}, "environments": "one-hot", **options}
    return Program(name, OURS, {"model": model, "architecture": architecture, "guide": guide, **rest})


_ENCODER, _DECODER = f"x 978-{HIDDEN}-2x{LATENT}", f"decoder {LATENT}-{HIDDEN}-978"
_NORMAL = _ours("vae, normal", "vae", f"{_ENCODER}; {_DECODER}; normal")
_COUNTS = _ours("vae, nb", "vae", f"{_ENCODER}; {_DECODER}; nb", counts=True)
_FINGERPRINTS: dict[str, Any] = {
    "environments": "fingerprints",
    "model_options": {"sparsity": "dense", "environment_hidden": [HIDDEN]},
}
_SHIFT = f"fingerprint 1024-{HIDDEN}-{LATENT}; {_DECODER}; normal"
_TABLE: dict[str, Any] = {"model_options": {"environment_hidden": []}}
_ONE_HOT = f"(x, drug) 1177-{HIDDEN}-2x{LATENT}; table of 199 sparse shifts; {_DECODER}"
_EMBEDDING = _ours("translation VAE", "translation_vae", f"{_ONE_HOT}; normal", ("x", "e"), **_TABLE)

COMPARISONS = (
    Comparison("SCVI, normal", Program("SCVI", "scvi", {"plain": False}), (_NORMAL,), 1.3),
    Comparison("SCVI, normal, plain", Program("SCVI, no batch norm or dropout", "scvi", {"plain": True}), (_NORMAL,)),
    Comparison("SCVI, nb", Program("SCVI", "scvi", {"plain": False, "counts": True}), (_COUNTS,), 1.3),
    Comparison(
        "SCVI, nb, plain",
        Program("SCVI, no batch norm or dropout", "scvi", {"plain": True, "counts": True}),
        (_COUNTS,),
    ),
    Comparison(
        "chemCPA",
        Program("chemCPA", "chemcpa"),
        (
            _ours("translation VAE", "translation_vae", f"{_ENCODER}; {_SHIFT}", **_FINGERPRINTS),
            _ours(
                "translation VAE, FiLM guide",
                "translation_vae",
                f"{_ENCODER}, FiLM by fingerprint; {_SHIFT}",
                ("x", "e"),
                conditioning="film",
                **_FINGERPRINTS,
            ),
            _ours(
                "translation VAE, adversary",
                "translation_vae",
                f"{_ENCODER}; {_SHIFT}; adversary 3 x 128, in every step",
                adversary=True,
                **_FINGERPRINTS,
            ),
        ),
        2.0,
    ),
    Comparison("SAMS-VAE, normal", Program("SAMS-VAE", "sams-vae"), (_EMBEDDING,), 4.0),
    Comparison(
        "SAMS-VAE, normal, its default",
        Program("SAMS-VAE, variances decoded", "sams-vae", {"likelihood": "normal"}),
        (_EMBEDDING,),
    ),
    Comparison(
        "SAMS-VAE, nb",
        Program("SAMS-VAE", "sams-vae", {"counts": True}),
        (_ours("translation VAE", "translation_vae", f"{_ONE_HOT}; nb", ("x", "e"), counts=True, **_TABLE),),
        4.0,
    ),
    Comparison(
        "SAMS-VAE, normal, 5 particles",
        Program("SAMS-VAE, 5 particles", "sams-vae", {"particles": 5}),
        (
            _ours(
                "translation VAE, 5 particles",
                "translation_vae",
                f"{_ONE_HOT}; normal",
                ("x", "e"),
                particles=5,
                **_TABLE,
            ),
        ),
    ),
    Comparison(
        "CPA",
        Program("CPA", "cpa"),
        (
            _ours(
                "translation VAE",
                "translation_vae",
                f"{_ENCODER}; table of 199 sparse shifts; {_DECODER}; normal",
                **_TABLE,
            ),
        ),
    ),
)
"""The default comparisons; widths, depths and likelihoods are matched as far as the peer allows."""


@dataclass(frozen=True)
class Places:
    """Where the programs are.

    Args:
        pythons: peer -> interpreter.
        sources: peer -> checkout.
    """

    pythons: Mapping[str, str]
    sources: Mapping[str, str]


def measure(program: Program, places: Places, **sizes: int) -> Result:
    """One training in a process of its own.

    Args:
        program: what to train.
        places: where it is.
        sizes: ``cells``, ``batch``, ``epochs``.

    Returns:
        what the child printed, or ``{"missing": reason}`` or ``{"failed": reason}``.
    """
    python = sys.executable if program.peer == OURS else places.pythons.get(program.peer)
    if python is None:
        return {"missing": f"no interpreter given: --python {program.peer}=PATH"}
    source = str(ROOT) if program.peer == OURS else places.sources.get(program.peer)
    job = {
        "peer": program.peer,
        "options": dict(program.options),
        "source": source,
        "latent": LATENT,
        "hidden": HIDDEN,
        "seed": SEED,
        **sizes,
    }
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    try:
        done = subprocess.run(
            [python, str(CHILD), json.dumps(job)],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIME_LIMIT,
            env={**os.environ, **threads},
        )
    except OSError as error:
        return {"missing": f"{python}: {error.strerror}"}
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {TIME_LIMIT:.0f} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"failed": said[-1] if said else f"exit status {done.returncode}"}
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def rounds(
    comparisons: Sequence[Comparison],
    places: Places,
    precisions: Sequence[str],
    repeats: int,
    **sizes: int,
) -> dict[str, list[Result]]:
    """Results of every program, measured in turn; a peer that is missing is tried once, with nothing beside it.

    Returns:
        `key` of a program -> results.
    """
    found: dict[str, list[Result]] = {}
    for repeat in range(repeats):
        for comparison in comparisons:
            print(f"round {repeat + 1} of {repeats}, batch {sizes['batch']}: {comparison.name}", file=sys.stderr)
            peer = found.setdefault(key(comparison.peer), [])
            if repeat == 0 or _ran(peer):
                peer.append(measure(comparison.peer, places, **sizes))
            if not _ran(peer):
                continue
            for program in _variants(comparison, precisions):
                own = found.setdefault(key(program), [])
                if len(own) <= repeat:  # comparisons that share a model share its measurement
                    own.append(measure(program, places, **sizes))
    return found


def key(program: Program) -> str:
    """What tells one program from another."""
    return json.dumps([program.peer, dict(program.options)], sort_keys=True)


def rows(
    comparisons: Sequence[Comparison], precisions: Sequence[str], batch: int, found: Mapping[str, list[Result]]
) -> Iterator[dict[str, Any]]:
    """The table: medians over rounds, of ratios too: a round's measurements lie close together in time."""
    for comparison in comparisons:
        results = found[key(comparison.peer)]
        peer = _median(results)
        first = {"comparison": comparison.name, "batch": batch}
        yield {**first, "program": comparison.peer.name, **peer, "speed_ratio": 1.0, "memory_ratio": 1.0}
        if peer["status"] != "measured":
            continue
        for program in _variants(comparison, precisions):
            own = found[key(program)]
            likest = program.options["precision"] == "float32" and program.name == comparison.ours[0].name
            yield {
                **first,
                "program": f"{program.name}, {program.options['precision']}",
                **_median(own),
                "speed_ratio": _ratio("cells_per_second", own, results),
                "memory_ratio": _ratio("peak_rss_mb", own, results),
                "target": comparison.target if likest else None,
            }


def _variants(comparison: Comparison, precisions: Sequence[str]) -> Iterator[Program]:
    for program in comparison.ours:
        for precision in precisions:
            yield Program(program.name, program.peer, {**program.options, "precision": precision})


def _ran(results: Sequence[Result]) -> bool:
    return all("cells_per_second" in result for result in results)


def _ratio(name: str, own: Sequence[Result], peer: Sequence[Result]) -> float:
    pairs = zip(own, peer, strict=True)
    return float(pd.Series([a[name] / b[name] for a, b in pairs if name in a]).median())


def _median(results: Sequence[Result]) -> dict[str, Any]:
    for result in results:
        for word, status in (("missing", "not installed"), ("failed", "failed")):
            if word in result:
                return {"status": f"{status}: {result[word]}"}
    names = ("cells_per_second", "wall_cells_per_second", "peak_rss_mb")
    last = results[-1]
    return {
        **{name: float(pd.Series([r[name] for r in results]).median()) for name in names},
        "parameters": last["parameters"],
        "architecture": last["architecture"],
        "versions": " ".join(f"{name} {number}" for name, number in last["versions"].items()),
        "status": "measured",
    }


def _line(row: Mapping[str, Any]) -> str:
    head = f"{row['comparison']:30} {row['batch']:5} {row['program']:38}"
    if row["status"] != "measured":
        return f"{head} {row['status']}"
    wanted = f" (target {row['target']:g})" if row.get("target") else ""
    return (
        f"{head} {row['cells_per_second']:8.0f} cells/s {row['speed_ratio']:6.2f}x{wanted}"
        f" {row['peak_rss_mb']:6.0f} MB {row['memory_ratio']:5.2f}x"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH", help="a peer's interpreter")
    parser.add_argument("--source", action="append", default=[], metavar="PEER=PATH", help="a peer's checkout")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 128], help="batch sizes (default: 512 128)")
    parser.add_argument("--cells", type=int, default=8192, help="cells an epoch (default: 8192)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs that are timed (default: 2)")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["float32", "bfloat16"],
        help="of this suite's models; peers train in float32, their default (default: both)",
    )
    parser.add_argument("--peers", nargs="+", default=None, metavar="PEER", help="only these (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "peers.csv", help="CSV to write")
    options = parser.parse_args(argv)
    known = list(dict.fromkeys(comparison.peer.peer for comparison in COMPARISONS))
    places = Places(
        _pairs(parser, "--python", options.python, known), _pairs(parser, "--source", options.source, known)
    )
    for name in options.peers or []:
        if name not in known:
            parser.error(f"--peers {name}: choose from {', '.join(known)}")
    chosen = [c for c in COMPARISONS if c.peer.peer in (options.peers or known)]
    table = []
    for batch in options.batches:
        sizes = {"cells": options.cells, "batch": batch, "epochs": options.epochs}
        found = rounds(chosen, places, options.precisions, options.rounds, **sizes)
        for row in rows(chosen, options.precisions, batch, found):
            table.append(row)
            print(_line(row), flush=True)
    write_text(options.out, pd.DataFrame(table).to_csv(index=False))
    print(f"Table: {options.out}", file=sys.stderr)
    return 0


def _pairs(parser: argparse.ArgumentParser, flag: str, words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, equals, path = word.partition("=")
        if name not in known or not equals or not path:
            parser.error(f"{flag} {word}: write PEER=PATH, PEER one of {', '.join(known)}")
        pairs[name] = str(Path(path).expanduser().absolute())
    return pairs


if __name__ == "__main__":
    raise SystemExit(main())
