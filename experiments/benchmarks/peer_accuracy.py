"""Accuracy of published programs and of this suite's models on the same cells, split and scores.

Every fit of a peer is a process in the peer's own environment (`peer_worker.py`), which is given training cells and the
conditions that are asked for, and answers with means, or with latents. What a peer answers is scored by the functions
that score this suite's own models: `pyro_scm.evaluation.compare` takes a peer as it takes a simple baseline, so that
both train on the same half of the controls and are scored against the other.

  recovery   a screen of the SAMS-VAE simulator: latents and targets (SAMS-VAE, sVAE+)
  norman     pairs of gene activations whose parts are known (CPA, SAMS-VAE); needs PYRO_SCM_DATA with norman_k562/
  tggates    unseen drugs, high dose, 24 h (chemCPA); needs tggates_hepatocytes/

Peers keep their published settings but for what `PEERS` says: sizes are those of this suite's models where the
publication searched over them, and epochs are capped so that a fit takes minutes on one thread of a processor.
What the environments of their own need is said in `peers.py`; a peer that is not given is left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias
from unittest import mock

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

import pyro_scm as ps
from experiments import recover_truth
from experiments.known_answers_pairs import Pairs
from experiments.known_answers_pairs import read as norman_cells
from experiments.launch import ROOT, data_folder
from pyro_scm import effects, evaluation, metrics
from pyro_scm.baselines import BASELINES, Baseline
from pyro_scm.checkpoints import write_text
from pyro_scm.data import splits, synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.splits import Split
from pyro_scm.errors import PyroScmError
from pyro_scm.metrics.recovery import detection
from pyro_scm.run import Run

if TYPE_CHECKING:
    from anndata import AnnData

FloatArray: TypeAlias = NDArray[np.float64]
Row: TypeAlias = dict[str, Any]

CHILD = Path(__file__).with_name("peer_worker.py")
TIME_LIMIT = 1500.0
_SEPARATOR = "+"


@dataclass(frozen=True)
class Program:
    """A peer and how it is trained.

    Args:
        name: as tables show it.
        peer: which function of `peer_worker.py`.
        epochs: of its training.
        options: for that function.
    """

    name: str
    peer: str
    epochs: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def package(self) -> str:
        """What has to be installed: SAMS-VAE's repository holds an sVAE+ too."""
        return "sams-vae" if self.peer == "svae+" else self.peer


# one particle instead of 5, so that a fit takes a minute: the same bound with noisier gradients
_SCREEN = {
    "latent": 15, "layers": 2, "hidden": 200, "likelihood": "normal_fixed_variance", "share": 2 / 15, "particles": 1,
}  # fmt: skip
# its learning rate falls tenfold every 6 epochs, which on these few wells is every 12 steps
_STEADY = {"hparams": {"step_size_lr": 10_000}}
PEERS: dict[str, tuple[Program, ...]] = {
    "recovery": (Program("SAMS-VAE", "sams-vae", 80, _SCREEN), Program("sVAE+", "svae+", 80, _SCREEN)),
    "norman": (Program("CPA", "cpa", 400), Program("SAMS-VAE", "sams-vae", 200)),
    "tggates": (Program("chemCPA", "chemcpa", 201), Program("chemCPA, steady rate", "chemcpa", 201, _STEADY)),
}
_FASTER = {"lr": 1e-2, "schedule": "cosine"}  # as `experiments.known_answers_pairs` trains on the same cells
_GENE = {"likelihood": "normal"}  # one variance a gene, where CPA decodes one for each cell too
OURS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "norman": {
        "cpa": ({}, {}),
        "sams_vae": ({}, {}),
        "cpa, faster": ({"recipe": "cpa"}, _FASTER),
        "sams_vae, faster": ({"recipe": "sams_vae"}, _FASTER),
        "cpa, variance a gene, faster": ({"recipe": "cpa", **_GENE}, _FASTER),
    },
    "tggates": {"chemcpa": ({}, {}), "chemcpa, variance a gene": ({"recipe": "chemcpa", **_GENE}, {})},
}
"""Task -> name -> options of the recipe, and of `fit`: each recipe as it is by default, then variants."""


@dataclass(frozen=True)
class Places:
    """Where the peers are.

    Args:
        pythons: package -> interpreter.
        sources: package -> checkout.
    """

    pythons: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def having(self, programs: Iterable[Program]) -> list[Program]:
        """Those programs that have an interpreter; the others are said to be missing."""
        found = [p for p in programs if p.package in self.pythons]
        for p in programs:
            if p not in found:
                print(f"{p.name}: left out, no interpreter given: --python {p.package}=PATH", file=sys.stderr)
        return found


# ---------------------------------------------------------------------- a peer's fit
def ask(program: Program, places: Places, seed: int, cells: Mapping[str, Any]) -> tuple[Row, dict[str, Any]]:
    """One fit of a peer in a process of its own.

    Args:
        program: the peer.
        places: where it is.
        seed: of its fit.
        cells: arrays for the child.

    Returns:
        What the child said, seconds of its training among it, and the arrays of its answer.

    Raises:
        PyroScmError: it could not be imported or failed.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "cells.npz", **cells)
        job = {
            "peer": program.peer, "source": places.sources.get(program.package), "options": dict(program.options),
            "epochs": program.epochs, "seed": seed, "folder": folder,
        }  # fmt: skip
        done = subprocess.run(
            [places.pythons[program.package], str(CHILD), json.dumps(job)],
            capture_output=True, text=True, check=False, timeout=TIME_LIMIT, env={**os.environ, **threads},
        )  # fmt: skip
        said = done.stderr.strip().splitlines()
        if done.returncode:
            raise PyroScmError(f"{program.name} failed: {said[-1] if said else f'exit status {done.returncode}'}")
        answer: Row = json.loads(done.stdout.splitlines()[-1])
        if "missing" in answer:
            raise PyroScmError(f"{program.name}: {answer['missing']}")
        with np.load(Path(folder) / "answer.npz") as stored:
            return answer, dict(stored)


def arrays(cells: EnvironmentDataset, asked: Sequence[str] = ()) -> dict[str, Any]:
    """Training cells and the table of their environments as a peer is given them.

    Perturbations are the parts of combinations, their amounts doses as a share of the largest, or 1.

    Args:
        cells: to train on.
        asked: environments whose means are asked for.
    """
    table = cells.environments
    parts = [[] if r else str(n).split(_SEPARATOR) for n, r in zip(table["perturbation"], cells.reference, strict=True)]
    names = sorted({p for own in parts for p in own})
    doses = pd.to_numeric(table["dose"], errors="coerce").to_numpy(np.float64)
    doses = (
        np.where(np.isnan(doses), 1.0, doses / np.nanmax(doses)) if np.isfinite(doses).any() else np.ones(len(table))
    )
    amounts = np.zeros((len(table), len(names)), np.float32)
    for e, own in enumerate(parts):
        amounts[e, [names.index(p) for p in own]] = doses[e]
    given = {
        "x": np.asarray(cells.x if isinstance(cells.x, np.ndarray) else cells.x.toarray(), np.float32),
        "env": cells.env,
        "amounts": amounts,
        "reference": cells.reference,
        "asked": cells.environment_index(*asked),
    }
    molecule = [i for i, f in enumerate(cells.features) if "dose" not in f and "=" not in f]
    if molecule:
        first = [next(e for e, own in enumerate(parts) if name in own) for name in names]
        given["features"] = cells.representation[np.ix_(first, molecule)].astype(np.float32)
    return given


class Peer(Baseline):
    """A peer as a baseline: its predictions of means in unseen environments.

    Args:
        program: the peer.
        places: where it is.
        seed: of its fit.
        said: what its fit said, by the name of the program and seed.
        decoded: take decoded means as they are, as CPA does, instead of the control and the decoded change, which is
            what this suite's own models predict.
    """

    def __init__(
        self, program: Program, places: Places, seed: int, said: dict[str, Row], decoded: bool = False
    ) -> None:
        self.program, self.places, self.seed, self.decoded, self.said = program, places, seed, decoded, said

    def fit(self, train: EnvironmentDataset) -> Self:
        """Keep the cells: a peer is told what is asked for with them."""
        self.train = train
        return super().fit(train)

    def predict(self, environments: Sequence[str]) -> FloatArray:
        """Mean expression ``[len(environments), G]``."""
        name = label(self.program, self.seed)
        if name not in self.said:
            answer, found = ask(self.program, self.places, self.seed, arrays(self.train, environments))
            self.said[name] = {**answer, **found}
        means, start = (self.said[name][k].astype(np.float64) for k in ("means", "start"))
        control = self.control[self.known.environment_index(*environments)]
        return means if self.decoded else control + means - start


def label(program: Program, seed: int, decoded: bool = False) -> str:
    """Of a peer's fit in the table of scores."""
    return f"{program.name}{', decoded' if decoded else ''}; seed {seed}"


# ---------------------------------------------------------------------- unseen conditions
@dataclass(frozen=True)
class Question:
    """Held-out environments.

    Args:
        split: training cells and held-out ones.
        references: controls to score against; None for half of the training cells' controls.
        fit: options of `pyro_scm.fit` that differ from its defaults.
    """

    split: Split
    references: EnvironmentDataset | None = None
    fit: Mapping[str, Any] = field(default_factory=dict)


def norman() -> Question:
    """Pairs of gene activations in K562 whose parts are in training, alone or in another pair."""
    adata = norman_cells(Pairs())
    cells = EnvironmentDataset.from_anndata(
        adata, environment="target", control="control", representation="multi-hot", counts=False
    )
    names = ["KLF1+MAP2K6", "MAP2K3+MAP2K6", "CNN1+MAPK1"]
    return Question(splits.by_environment(cells, held_out=names))


def tggates(drugs: int = 20, seed: int = 0) -> Question:
    """Drugs at their high dose in hepatocytes after 24 h; `drugs` of those with a SMILES are held out with all doses.

    Log2 expression is centred on the two controls of each drug, since arrays differ between days; those of the held-out
    drugs are what these are compared with, and are not trained on.
    """
    import anndata

    adata = anndata.read_h5ad(data_folder("tggates_hepatocytes") / "tggates_hepatocytes_log2.h5ad")
    smiles = adata.obs["smiles"].astype(str)
    adata = adata[(adata.obs["duration"].astype(str) == "24") & ~smiles.isin(["", "nan"])].copy()
    drug = adata.obs["treatmentid"].astype(str).to_numpy()
    control = (adata.obs["dose_level"] == "Control").to_numpy()
    x = np.asarray(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, np.float64)
    for name in np.unique(drug):
        x[drug == name] -= x[(drug == name) & control].mean(0)
    adata.X = x.astype(np.float32)
    level = adata.obs["dose_level"].astype(str).map({"Control": 0.0, "Low": 0.04, "Middle": 0.2, "High": 1.0})
    adata.obs = pd.DataFrame(
        {
            "drug": np.where(control, "vehicle", drug),
            "dose": level.to_numpy(),
            "smiles": adata.obs["smiles"].astype(str).where(~control, None),
        },
        adata.obs_names,
    )
    cells = EnvironmentDataset.from_anndata(
        adata, environment="drug", control="vehicle", dose="dose", smiles="smiles", representation="molecules",
        counts=False,
    )  # fmt: skip
    held_out = set(np.random.default_rng(seed).choice(np.unique(drug), drugs, replace=False).tolist())
    theirs = np.isin(drug, list(held_out)) & control
    split = splits.by_environment(cells, held_out=sorted(held_out))
    table = cells.environments
    high = [str(n) for n in table.index[table["perturbation"].isin(held_out) & (table["dose"] == 1.0)]]
    assert split.train.origin is not None
    train = split.train.subset(~np.isin(split.train.origin, np.flatnonzero(theirs)))
    return Question(replace(split, train=train, test=split.test.of(*high), held_out=tuple(high)), cells.subset(theirs))


QUESTIONS: dict[str, Callable[[], Question]] = {"norman": norman, "tggates": tggates}


def unseen(name: str, places: Places, seeds: Sequence[int], peer_seeds: Sequence[int]) -> pd.DataFrame:
    """Scores of every program in each held-out environment.

    Args:
        name: in `QUESTIONS`.
        places: where peers are.
        seeds: of our models, which are fitted together.
        peer_seeds: of the peers.

    Returns:
        Columns program, kind, seed, environment, metric, value, and seconds of the processor for one seed: a peer's of
        its training, ours with predicting and scoring.
    """
    question = QUESTIONS[name]()
    said: dict[str, Row] = {}
    peers: dict[str, Callable[[], Baseline]] = {
        label(program, seed, decoded): partial(Peer, program, places, seed, said, decoded)
        for program in places.having(PEERS[name])
        for seed in peer_seeds
        for decoded in ((False, True) if program.peer in ("cpa", "chemcpa") else (False,))
    }
    shared: dict[str, Any] = {
        "references": question.references, "degs": 20 if name == "norman" else 0, "progress": False, "device": "cpu",
        **question.fit,
    }  # fmt: skip
    with mock.patch.dict(BASELINES, peers):
        tables = [evaluation.compare(question.split, {}, baselines=tuple(BASELINES), **shared).scores]
    times: dict[str, float] = {}
    for model, (options, trained) in OURS[name].items():
        started = time.process_time()
        given = {**shared, **trained, "baselines": (), "seeds": seeds}
        tables.append(evaluation.compare(question.split, {model: options}, **given).scores)
        times[model] = (time.process_time() - started) / len(seeds)
    scores = pd.concat(tables).rename(columns={"model": "program"})
    theirs = scores["program"].isin(list(peers))
    scores.loc[theirs, "kind"] = "peer"
    named = scores["program"].str.extract(r"^(.*); seed (\d+)$")
    scores.loc[theirs, "seed"] = named.loc[theirs, 1].astype(int)
    scores.loc[theirs, "program"] = named.loc[theirs, 0]
    for program in places.having(PEERS[name]):
        own = [said[label(program, seed)]["seconds"] for seed in peer_seeds]
        times |= dict.fromkeys((program.name, f"{program.name}, decoded"), float(np.mean(own)))
        print(f"{program.name}: {said[label(program, peer_seeds[0])]['words']}", file=sys.stderr)
    scores["seconds"] = scores["program"].map(times)  # of the processor, a fit
    return scores


# ---------------------------------------------------------------------- recovery
def recovery(
    places: Places, screens: Sequence[int], seeds: Sequence[int], peer_seeds: Sequence[int], **sizes: int
) -> pd.DataFrame:
    """Scores of every program on screens whose truth is known: one row a screen, program and seed.

    Args:
        places: where peers are.
        screens: seeds of the simulator.
        seeds: of our models' members.
        peer_seeds: of the peers.
        **sizes: ``cells`` of each environment, ``steps`` of training of our models, ``epochs`` of peers.
    """
    rows: list[Row] = []
    for number in screens:
        adata = ps.simulate("sams-vae", seed=number, cells=sizes["cells"])
        cells = synthetic.dataset(adata)
        for program in places.having(PEERS["recovery"]):
            own = replace(program, epochs=sizes.get("epochs", program.epochs))
            for seed in peer_seeds:
                answer, found = ask(own, places, seed, arrays(cells))
                mask, effect = (_by_environment(found[k], cells) for k in ("mask", "effects"))
                scored = recovered(adata, cells, found["z"], mask, effect)
                rows.append({"screen": number, "program": program.name, "kind": "peer", "seed": seed, **scored})
                rows[-1]["seconds"] = answer["seconds"]
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        for name, run, seconds, chosen in ours_recovered(cells, seeds, sizes["steps"]):
            causes, moved = ps.embed(run, cells)["c"], effects.shifts(run)
            told = effects.mask(run) if name in ("sams_vae", "svae_plus") else effects.inclusion(run)
            for k in chosen:
                scored = recovered(adata, cells, causes[k], told.loc[k].to_numpy(), moved.loc[k].to_numpy())
                rows.append({"screen": number, "program": name, "kind": "model", "seed": run.seeds[k], **scored})
                rows[-1]["seconds"] = seconds
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return pd.DataFrame(rows)


def ours_recovered(
    cells: EnvironmentDataset, seeds: Sequence[int], steps: int
) -> Iterable[tuple[str, Run, float, list[int]]]:
    """Name, run, processor seconds of a member, and the members to score."""
    epochs = max(2, round(steps * 256 / len(cells)))
    for name in ("sams_vae", "svae_plus"):
        share = {"share": 2 / 15} if name == "sams_vae" else {}
        model, guide = ps.recipes.make(
            name, cells.schema, latent=15, hidden=(200, 200), guide_hidden=(200, 200), **share
        )
        started = time.process_time()
        run = ps.fit(model, guide, cells, seeds=seeds, epochs=epochs, batch_size=256, device="cpu", progress=False)
        yield name, run, (time.process_time() - started) / len(seeds), list(range(len(seeds)))
    config = recover_truth.RecoverTruth(restarts=len(seeds), steps=steps)
    started = time.process_time()
    run = recover_truth.ways(cells, 15, config, published=False)["refined"]()
    yield "translation_vae, unmixed and refined", run, (time.process_time() - started) / len(seeds), [run.best]


def recovered(
    adata: "AnnData", cells: EnvironmentDataset, z: Any, probability: FloatArray, moved: FloatArray
) -> dict[str, float]:
    """Scores of latents ``[N, d]`` with their shifts, of the probability of targets and of effects ``[E, d]``."""
    matched = metrics.mcc(adata.obsm["z"], np.asarray(z, np.float64))
    order = [str(name) for name in adata.obs["perturbation"].cat.categories]
    rows = [order.index(str(name)) for name in cells.environments["perturbation"]]
    targets, asked = np.asarray(adata.uns["truth"]["targets"], bool)[rows], ~cells.reference
    truth, found = recover_truth.aligned(targets, probability, matched.permutation)
    return {
        "mcc_z": matched.score,
        "linear_r2_z": metrics.linear_r2(adata.obsm["z"], np.asarray(z, np.float64)),
        "mask_f1": detection(truth[asked], found[asked] > 0.5).f1,
        "effect_f1": metrics.target_scores(targets[asked], moved[asked], matched.permutation).f1,
        "share_on": float((found[asked] > 0.5).mean()),
    }


def _by_environment(values: NDArray[np.float32], cells: EnvironmentDataset) -> FloatArray:
    """Rows of perturbations, which are sorted by name, as rows of environments; 0 for references."""
    out = np.zeros((len(cells.environments), values.shape[1]))
    names = cells.environments["perturbation"].astype(str).to_numpy()
    rows = np.flatnonzero(~cells.reference)
    out[rows[np.argsort(names[rows])]] = values
    return out


# ---------------------------------------------------------------------- tables
def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over environments, then mean and sd over seeds, of each program and metric."""
    shown = ["delta_pearson", "delta_r2", "rmse", "delta_pearson_deg", "rank"]
    kept = scores[scores["metric"].isin(shown)]
    means = kept.groupby(["kind", "program", "seed", "seconds", "metric"], dropna=False)["value"].mean().reset_index()
    groups = means.groupby(["kind", "program", "seconds", "metric"], dropna=False)["value"]
    table = groups.mean().unstack("metric").join(groups.std().unstack("metric").add_suffix("_sd"))
    return table.assign(seeds=groups.size().unstack("metric").max(axis=1)).reset_index()


def recovery_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Means and the range over screens and seeds."""
    groups = rows.groupby(["kind", "program"], sort=False)
    shown = ["mcc_z", "linear_r2_z", "mask_f1", "effect_f1", "share_on", "seconds"]
    table = groups[shown].mean()
    for name in ("mcc_z", "mask_f1", "effect_f1"):
        table[f"{name}_min"], table[f"{name}_max"] = groups[name].min(), groups[name].max()
    return table.assign(fits=groups.size()).reset_index()


def _pair(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text}: write PEER=PATH")
    return name, str(Path(path).expanduser().absolute())


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables and write them as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: Any = {"action": "append", "default": [], "type": _pair, "metavar": "PEER=PATH"}
    parser.add_argument("--python", **several, help="a peer's interpreter: sams-vae, cpa, chemcpa")
    parser.add_argument("--source", **several, help="a peer's checkout")
    parser.add_argument("--tasks", nargs="+", choices=tuple(PEERS), default=list(PEERS), help="default: all")
    parser.add_argument("--screens", type=int, nargs="+", default=[0, 1], help="of recovery (default: 0 1)")
    parser.add_argument("--seeds", type=int, default=5, help="of our models (default: 5)")
    parser.add_argument("--peer-seeds", type=int, default=3, help="of peers (default: 3)")
    parser.add_argument("--cells", type=int, default=100, help="of each environment of a screen (default: 100)")
    parser.add_argument("--steps", type=int, default=3000, help="of our training on a screen (default: 3000)")
    parser.add_argument("--peer-epochs", type=int, default=80, help="of peers on a screen (default: 80)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "peer_accuracy", help="folder to write")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    places, seeds, theirs = Places(dict(given.python), dict(given.source)), range(given.seeds), range(given.peer_seeds)
    for task in given.tasks:
        if task == "recovery":
            sizes = {"cells": given.cells, "steps": given.steps, "epochs": given.peer_epochs}
            scores = recovery(places, given.screens, seeds, theirs, **sizes)
            table = recovery_summary(scores)
        else:
            scores = unseen(task, places, seeds, theirs)
            table = summary(scores)
        write_text(given.out / f"{task}_scores.csv", scores.to_csv(index=False))
        write_text(given.out / f"{task}.csv", table.round(4).to_csv(index=False))
        print(task, table.round(3).to_string(index=False), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
