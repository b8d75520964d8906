"""One training of one program, in a process of its own: `python peer_models.py JOB`, JOB as JSON, prints one JSON line.

Run by `experiments.benchmarks.peers` with the interpreter of the peer's own environment: here nothing but numpy is
imported until the job says which program is meant. Every program sees the same cells, drawn from the job's seed.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

GENES, BITS, DRUGS = 978, 1024, 200


@dataclass(frozen=True)
class Screen:
    """Cells of the L1000 shape.

    Args:
        x: ``(N, G)`` float32: counts, or log1p of counts.
        drug: ``(N,)`` index of each cell's drug; drug 0 is the vehicle.
        bits: ``(D, B)`` float32 fingerprints of the drugs.
    """

    x: NDArray[np.float32]
    drug: NDArray[np.int64]
    bits: NDArray[np.float32]


@dataclass
class Training:
    """What a training leaves behind.

    Args:
        cpu: processor seconds of the epochs after the first.
        wall: wall-clock seconds of the same.
        parameters: numbers that are learnt.
        architecture: networks and likelihood, in words.
        packages: distributions whose versions matter.
    """

    cpu: float
    wall: float
    parameters: int
    architecture: str
    packages: tuple[str, ...]


@dataclass
class Clock:
    """Times at the ends of epochs."""

    marks: list[tuple[float, float]] = field(default_factory=list)

    def mark(self) -> None:
        """An epoch ends now."""
        self.marks.append((time.process_time(), time.perf_counter()))

    def training(self, modules: Iterable[Any], architecture: str, packages: tuple[str, ...]) -> Training:
        """From the end of the first epoch, which warms up, to the end of the last."""
        (cpu0, wall0), (cpu1, wall1) = self.marks[0], self.marks[-1]
        count = sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)
        return Training(cpu1 - cpu0, wall1 - wall0, count, architecture, packages)

    def callback(self, base: Any) -> Any:
        """A Lightning callback that marks the ends of epochs; `base` is the callback class of that Lightning."""
        clock = self

        class Marker(base):  # type: ignore[misc]
            def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
                clock.mark()

        return Marker()


Job = Mapping[str, Any]


def screen(job: Job) -> Screen:
    """The same cells for every program: drawn in parts, so that no other array is as large as x."""
    rng = np.random.default_rng(job["seed"])
    x = np.empty((job["cells"], GENES), np.float32)
    for start in range(0, len(x), 512):
        x[start : start + 512] = rng.poisson(2.0, x[start : start + 512].shape)
    if not job["options"].get("counts"):
        np.log1p(x, out=x)
    drug = rng.integers(DRUGS, size=len(x))
    drug[:DRUGS] = np.arange(DRUGS)[: len(x)]  # every drug is seen
    return Screen(x, drug, (rng.random((DRUGS, BITS)) < 0.05).astype(np.float32))


def pyro_scm(job: Job, cells: Screen) -> Training:
    """`fit` of one of the named models, as a user calls it; timed once its steps have been recorded."""
    import pandas as pd
    from anndata import AnnData

    from guides import amortise
    from pyro_scm import models
    from pyro_scm.data.dataset import EnvironmentDataset
    from pyro_scm.infer import fit
    from pyro_scm.nn import mlp
    from pyro_scm.objectives import Adversary, Objective
    from pyro_scm.training import Trainer

    options, width, latent = job["options"], job["hidden"], job["latent"]
    table = cells.bits if options["environments"] == "fingerprints" else np.eye(DRUGS, dtype=np.float32)[:, 1:]
    names = [f"drug {d}" for d in range(DRUGS)]
    names[0] = "vehicle"
    data = EnvironmentDataset.from_anndata(
        AnnData(cells.x, obs=pd.DataFrame({"drug": np.array(names)[cells.drug]}, index=_names(len(cells.x)))),
        environment="drug",
        control="vehicle",
        representation=dict(zip(names, table, strict=True)),
        counts=bool(options.get("counts")),
    )

    model = getattr(models, options["model"])(data.schema, latent=latent, hidden=(width,), **options["model_options"])
    guide = amortise(model, data, hidden=(width,), **options["guide"])
    penalties = {}
    if options.get("adversary"):
        penalties["adversary"] = Adversary(mlp(latent, (128, 128, 128), len(data.schema.environments)))
    batch, number, clock = job["batch"], -(-len(data) // job["batch"]), Clock()
    # with more environments than cells in a batch their number differs, and each needs some steps to be recorded
    warm = -(-(400 if len(data.environments) > batch else 60) // number)
    one_epoch = Trainer._one_epoch

    def timed(self: Trainer) -> None:
        if self.epoch == warm:
            clock.mark()
        one_epoch(self)

    with mock.patch.object(Trainer, "_one_epoch", timed):
        fit(
            model,
            guide,
            data,
            objective=Objective(particles=options.get("particles", 1), penalties=penalties),
            epochs=warm + job["epochs"],
            batch_size=batch,
            precision=options["precision"],
            progress=False,
        )
    clock.mark()
    return clock.training((model, guide, *penalties.values()), options["architecture"], ("pyro-ppl",))


def scvi(job: Job, cells: Screen) -> Training:
    """`scvi.model.SCVI` by its own `train`, on all cells; dense data in memory."""
    import lightning.pytorch as pl
    import pandas as pd
    from anndata import AnnData
    from scvi.model import SCVI

    options, plain = job["options"], job["options"]["plain"]
    adata = AnnData(cells.x, obs=pd.DataFrame(index=_names(len(cells.x))))
    SCVI.setup_anndata(adata)
    likelihood = "nb" if options.get("counts") else "normal"
    model = SCVI(
        adata,
        n_hidden=job["hidden"],
        n_latent=job["latent"],
        n_layers=1,
        gene_likelihood=likelihood,
        **({"dropout_rate": 0.0, "use_batch_norm": "none"} if plain else {}),
    )
    clock = Clock()
    model.train(
        max_epochs=1 + job["epochs"],
        accelerator="cpu",
        devices=1,
        train_size=1.0,
        batch_size=job["batch"],
        callbacks=[clock.callback(pl.Callback)],
        enable_progress_bar=False,
    )
    used = (model.module.z_encoder, model.module.decoder)
    words = f"x {_widths(GENES, job)}-2x{job['latent']}; decoder {job['latent']}-{job['hidden']}-{GENES}; {likelihood}"
    words += "" if plain else "; batch norm, dropout 0.1"
    return clock.training(used, words, ("scvi-tools", "lightning"))


def chemcpa(job: Job, cells: Screen) -> Training:
    """`chemCPA.lightning_module.ChemCPA` under Lightning's Trainer, with chemCPA's own data set and loader.

    Changed: two places that name the device ``"cuda"`` say ``"cpu"``; the drugs' embedding is taken from memory instead
    of a parquet file; no logger, no checkpoints, no evaluation; every split is the training split.
    """
    import lightning as L
    import torch
    from chemCPA import lightning_module
    from chemCPA.data import perturbation_data_module
    from chemCPA.data.dataset import Dataset

    latent, width = job["latent"], job["hidden"]
    lightning_module.get_chemical_representation = lambda **_: torch.nn.Embedding.from_pretrained(
        torch.from_numpy(cells.bits), freeze=True
    )
    network = lightning_module.ComPert
    lightning_module.ComPert = lambda **given: network(**{**given, "device": "cpu"})
    perturbation_data_module.custom_collate = lambda batch: [torch.stack(part, 0) for part in zip(*batch, strict=True)]

    drug = np.array([f"drug{d}" for d in range(DRUGS)])[cells.drug]
    obs = {
        "condition": drug,
        "smiles": np.array(["C" * (d + 1) for d in range(DRUGS)])[cells.drug],
        "dose_val": np.full(len(drug), "1.0"),
        "cell_type": np.full(len(drug), "cell"),
        "cov_drug_dose_name": np.char.add(np.char.add("cell_", drug), "_1.0"),
        "control": (cells.drug == 0).astype(int),
        "split": np.full(len(drug), "train"),
    }
    genes = np.array([f"gene{g}" for g in range(GENES)])
    uns = {"rank_genes_groups_cov": {"cell_drug1_1.0": genes[:50]}}
    keys = {
        "perturbation_key": "condition",
        "dose_key": "dose_val",
        "covariate_keys": "cell_type",
        "smiles_key": "smiles",
    }
    data = Dataset({"X": cells.x, "var_names": genes, "obs": obs, "uns": uns}, use_drugs_idx=True, **keys)
    parts = ("training", "test", "ood")
    kinds = ("", "_control", "_treated")
    training = data.subset("train", "all")
    module = perturbation_data_module.PerturbationDataModule(
        {part + kind: training for part in parts for kind in kinds}, train_bs=job["batch"]
    )
    hparams = {  # config/model/hparams/default.yaml, but for the widths and depths that are matched
        "dim": latent,
        "autoencoder_width": width,
        "autoencoder_depth": 1,
        "embedding_encoder_width": width,
        "embedding_encoder_depth": 1,
        "adversary_width": 128,
        "adversary_depth": 3,
        "adversary_steps": 3,
        "adversary_lr": 1.19e-3,
        "adversary_wd": 9.8e-6,
        "autoencoder_lr": 1.58e-3,
        "autoencoder_wd": 6.25e-7,
        "dosers_width": 64,
        "dosers_depth": 3,
        "dosers_lr": 1.58e-3,
        "dosers_wd": 6.25e-7,
        "penalty_adversary": 0.455,
        "reg_adversary": 9.1,
        "reg_adversary_cov": 16.2,
        "step_size_lr": 6,
    }
    model = lightning_module.ChemCPA(
        {
            "model": {
                "hparams": hparams,
                "additional_params": {
                    "decoder_activation": "ReLU",
                    "doser_type": "amortized",
                    "seed": 1337,
                    "patience": 50,
                },
                "embedding": {"model": "rdkit", "datapath": None},
                "append_ae_layer": False,
            },
            "training": {"run_eval_r2": False},
        },
        {
            "num_genes": GENES,
            "num_drugs": data.num_drugs,
            "num_covariates": data.num_covariates,
            "use_drugs_idx": True,
            "canon_smiles_unique_sorted": data.canon_smiles_unique_sorted,
        },
    )
    clock = Clock()
    trainer = L.Trainer(callbacks=[clock.callback(L.Callback)], limit_val_batches=0, **_trainer(job))
    trainer.fit(model, datamodule=module)
    words = (
        f"x {_widths(GENES, job)}-{latent}; fingerprint {_widths(BITS, job)}-{latent}; decoder {latent}-{width}-"
        f"2x{GENES}; normal; batch norm; doser, 2 adversaries 3 x 128, which take every second step"
    )
    return clock.training((model.model,), words, ("lightning",))


def sams_vae(job: Job, cells: Screen) -> Training:
    """SAMS-VAE by its own Lightning module, data set and `DataLoader`, as its train.py sets them up.

    Changed: no logger, no checkpoints, no validation and none of the callbacks that watch a training.
    """
    import pytorch_lightning as pl
    import torch
    from sams_vae.data.utils import perturbation_dataset as datasets
    from sams_vae.data.utils.perturbation_datamodule import ObservationNormalizationStatistics
    from sams_vae.models.utils.perturbation_lightning_module import TrainConfigPerturbationLightningModule

    latent, width, counts = job["latent"], job["hidden"], bool(job["options"].get("counts"))
    x = torch.from_numpy(cells.x)
    dosages = torch.eye(DRUGS)[:, 1:][torch.from_numpy(cells.drug)].contiguous()
    data = (datasets.SCRNASeqTensorPerturbationDataset if counts else datasets.TensorPerturbationDataset)(x, dosages)
    log = torch.log(x + 1)
    statistics = ObservationNormalizationStatistics(x.mean(0), x.std(0), log.mean(0), log.std(0))
    del log
    sizes = {"n_latent": latent, "n_treatments": DRUGS - 1, "n_phenos": GENES}
    likelihood = job["options"].get("likelihood", "library_nb" if counts else "normal_fixed_variance")
    particles = job["options"].get("particles", 1)
    module = TrainConfigPerturbationLightningModule(
        {
            "model": "SAMSVAEModel",
            "model_kwargs": {
                **sizes,
                "mask_prior_prob": 0.01,
                "embedding_prior_scale": 1,
                "likelihood_key": likelihood,
                "decoder_n_layers": 1,
                "decoder_n_hidden": width,
            },
            "guide": "SAMSVAEMeanFieldNormalGuide",
            "guide_kwargs": {
                **sizes,
                "basal_encoder_n_layers": 1,
                "basal_encoder_n_hidden": width,
                "basal_encoder_input_normalization": "log_standardize" if counts else "standardize",
                "x_normalization_stats": statistics,
            },
            "loss_module": "SAMSVAE_ELBOLossModule",
            "lightning_module_kwargs": {"lr": 1e-3, "n_particles": particles},
            "predictor": "SAMSVAEPredictor",
        },
        D_obs_counts_train=data.get_dosage_obs_per_dim(),
    )
    clock = Clock()
    trainer = pl.Trainer(callbacks=[clock.callback(pl.Callback)], **_trainer(job))
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=job["batch"], shuffle=True))
    words = (
        f"(x, shift) {_widths(GENES + latent, job)}-2x{latent}; table of {DRUGS - 1} masked shifts with scales; "
        f"decoder {latent}-{width}-{'2x' * (likelihood == 'normal')}{GENES}; {likelihood}"
    )
    return clock.training((module,), words, ("pytorch-lightning", "pyro-ppl"))


def cpa(job: Job, cells: Screen) -> Training:
    """CPA (Facebook): its `CPA.update` in the loop of its train.py.

    Changed: the package's ``__init__``, which imports plotting, is left out; cells come from a `TensorDataset` of the
    same three tensors that its own data set yields; no evaluation.
    """
    import importlib
    import types

    import torch

    package = types.ModuleType("cpa")
    package.__path__ = [str(Path(job["source"]) / "cpa")]
    sys.modules["cpa"] = package
    network = importlib.import_module("cpa.model").CPA

    latent, width = job["latent"], job["hidden"]
    hparams = {"dim": latent, "autoencoder_width": width, "autoencoder_depth": 1}
    model = network(GENES, DRUGS, [1], device="cpu", doser_type="sigm", hparams=hparams)
    data = torch.utils.data.TensorDataset(
        torch.from_numpy(cells.x), torch.eye(DRUGS)[torch.from_numpy(cells.drug)], torch.ones(len(cells.x), 1)
    )
    clock = Clock()
    loader = torch.utils.data.DataLoader(data, batch_size=job["batch"], shuffle=True)
    for _ in range(1 + job["epochs"]):
        for genes, drugs, *covariates in loader:
            model.update(genes, drugs, covariates)
        clock.mark()
    words = (
        f"x {_widths(GENES, job)}-{latent}; table of {DRUGS} shifts; decoder {latent}-{width}-2x{GENES}; normal; "
        "batch norm; 2 adversaries 2 x 64, which take two steps of three"
    )
    return clock.training((model,), words, ())


PROGRAMS: dict[str, Callable[[Job, Screen], Training]] = {
    "pyro_scm": pyro_scm,
    "scvi": scvi,
    "chemcpa": chemcpa,
    "sams-vae": sams_vae,
    "cpa": cpa,
}


def _names(cells: int) -> list[str]:
    return [f"cell {i}" for i in range(cells)]


def _widths(inputs: int, job: Job) -> str:
    return f"{inputs}-{job['hidden']}"


def _trainer(job: Job) -> dict[str, Any]:
    """Lightning's Trainer without what a benchmark does not need."""
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1 + job["epochs"],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }


def peak_rss_mb() -> float:
    """Largest resident memory of this process, in MB (10^6 bytes).

    Linux keeps it under VmHWM; `getrusage` would there report the parent's where that is larger.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(found.split()[1]) * 1024 / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def run(job: Job) -> dict[str, Any]:
    """One training, measured."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    found = PROGRAMS[job["peer"]](job, screen(job))
    seen = job["cells"] * job["epochs"]
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in found.packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cells_per_second": seen / found.cpu,
        "wall_cells_per_second": seen / found.wall,
        "cpu_seconds": found.cpu,
        "peak_rss_mb": peak_rss_mb(),
        "parameters": found.parameters,
        "architecture": found.architecture,
        "versions": versions,
    }


def main(argv: list[str]) -> int:
    """Run the job; what it says of itself goes to standard error."""
    job = json.loads(argv[1])
    # this folder's modules must not hide a peer's, and a checkout comes before what is installed
    sys.path[:1] = [job["source"]] if job.get("source") else []
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = run(job)
    except ImportError as error:
        result = {"missing": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    raise SystemExit(main(sys.argv))
