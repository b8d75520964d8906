"""One fit of a published program, in a process of its own: `python peer_worker.py JOB`, JOB as JSON.

Run by `experiments.benchmarks.peer_accuracy` with the interpreter of the peer's own environment. It reads the training
cells from ``cells.npz`` in the job's folder, trains the peer by its own training code, and writes ``answer.npz``: the
mean expression that the peer predicts in the conditions asked for and, where it has them, latents, effects and masks.
The last line printed is JSON: processor seconds of the training, the peer's settings in words, versions.

Changed of every peer: cells come from memory instead of the peer's files; no logger, checkpoints or evaluation; CPU.
"""

import contextlib
import importlib
import json
import sys
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]


@dataclass
class Fit:
    """What a peer leaves behind.

    Args:
        seconds: of processor time of its training.
        words: settings that matter.
        arrays: ``means`` ``[A, G]`` in the conditions asked for and ``start`` ``[G]``, the same for the control; or
            ``z`` ``[N, d]``, ``effects`` and ``mask`` ``[M, d]``.
    """

    seconds: float
    words: str
    arrays: Arrays = field(default_factory=dict)


# ---------------------------------------------------------------------- SAMS-VAE and sVAE+
def sams_vae(job: Mapping[str, Any], cells: Arrays, *, plus: bool = False) -> Fit:
    """SAMS-VAE, or the sVAE+ of the same repository, by its Lightning module, data set and loader.

    Means are those of its decoder at draws of its prior (SAMS-VAE's own estimate of a treatment's effect, without the
    noise of drawn expression), with the same basal states in every condition.
    """
    import pytorch_lightning as pl
    import torch
    from sams_vae.data.utils.perturbation_datamodule import ObservationNormalizationStatistics
    from sams_vae.data.utils.perturbation_dataset import TensorPerturbationDataset
    from sams_vae.models.utils.perturbation_lightning_module import TrainConfigPerturbationLightningModule

    o = {
        "latent": 20, "hidden": 128, "layers": 1, "lr": 1e-3, "particles": 5, "batch": 512, "share": 0.1,
        "guide": "Correlated", "likelihood": "normal", **job["options"],
    }  # fmt: skip
    x = torch.from_numpy(cells["x"])
    dosages = torch.from_numpy(cells["amounts"][cells["env"]])
    data = TensorPerturbationDataset(x, dosages)
    sizes = {"n_latent": o["latent"], "n_treatments": dosages.shape[1], "n_phenos": x.shape[1]}
    model = {"likelihood_key": o["likelihood"], "decoder_n_layers": o["layers"], "decoder_n_hidden": o["hidden"]}
    guide: dict[str, Any] = {"x_normalization_stats": ObservationNormalizationStatistics(x.mean(0), x.std(0))}
    if plus:
        model |= {"mask_beta_concentration_1": 1, "mask_beta_concentration_2": 2}
        names = ("SVAEPlusModel", "SVAEPlusGuide", "SVAEPlus_ELBOLossModule", "SVAEPlusPredictor")
        guide |= {"mask_init_logits": 0, "encoder_n_layers": o["layers"], "encoder_n_hidden": o["hidden"]}
        guide |= {"encoder_input_normalization": "standardize"}
    else:
        model |= {"mask_prior_prob": o["share"], "embedding_prior_scale": 1}
        chosen = f"SAMSVAE{o['guide']}NormalGuide"
        names = ("SAMSVAEModel", chosen, "SAMSVAE_ELBOLossModule", "SAMSVAEPredictor")
        guide |= {"basal_encoder_n_layers": o["layers"], "basal_encoder_n_hidden": o["hidden"]}
        guide |= {"basal_encoder_input_normalization": "standardize"}
        if o["guide"] == "Correlated":
            guide |= {"embedding_encoder_n_layers": 2, "embedding_encoder_n_hidden": 200}
    module = TrainConfigPerturbationLightningModule(
        {
            "model": names[0], "model_kwargs": {**sizes, **model},
            "guide": names[1], "guide_kwargs": {**sizes, **guide},
            "loss_module": names[2], "predictor": names[3],
            "lightning_module_kwargs": {"lr": o["lr"], "n_particles": o["particles"]},
        },
        D_obs_counts_train=data.get_dosage_obs_per_dim(),
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(data, batch_size=o["batch"], shuffle=True)
    started = time.process_time()
    _trainer(pl, job["epochs"], gradient_clip_val=100).fit(module, loader)
    seconds = time.process_time() - started
    model_, guide_ = module.loss_module.model.eval(), module.loss_module.guide.eval()
    with torch.no_grad():
        arrays = _latents(torch, model_, guide_, x, dosages, plus)
        if len(cells["asked"]) and not plus:
            arrays |= _treated(torch, model_, arrays, torch.from_numpy(cells["amounts"])[cells["asked"]])
    said = ", ".join(f"{k} {v}" for k, v in o.items() if not (plus and k in ("guide", "share")))
    return Fit(seconds, said, arrays)


def _latents(torch: Any, model: Any, guide: Any, x: Any, dosages: Any, plus: bool) -> Arrays:
    """Posterior means of each cell's latent with its shift, of effects, and probabilities of masks."""
    mask = torch.sigmoid(guide.param_dict["q_mask_logits"])
    likely = (mask > 0.5).float()
    if plus:
        laws, _ = guide(X=x, D=dosages)
        z, effects = laws["q_z"].mean[0], model.action_prior_mean
    else:
        given = {"mask": likely[None]}
        effects = guide(condition_values=given)[0]["q_E"].mean.reshape(mask.shape)
        laws, _ = guide(X=x, D=dosages, condition_values={**given, "E": effects[None]})
        z = laws["q_z_basal"].mean[0] + dosages @ (likely * effects)
    return {"z": z.numpy(), "effects": (likely * effects).numpy(), "mask": mask.numpy()}


def _treated(torch: Any, model: Any, arrays: Arrays, asked: Any) -> Arrays:
    """Means of the decoder at basal states drawn from the prior, moved by the conditions' effects."""
    basal = torch.randn(2000, model.n_latent)
    shift = asked @ torch.from_numpy(arrays["effects"])
    means = torch.stack([model.decoder(basal + s).mean.mean(0) for s in shift])
    return {"means": means.numpy(), "start": model.decoder(basal).mean.mean(0).numpy()}


def svae_plus(job: Mapping[str, Any], cells: Arrays) -> Fit:
    """SVAE+ of the SAMS-VAE repository; conditions that were not seen, combinations too, it cannot predict."""
    return sams_vae(job, cells, plus=True)


# ---------------------------------------------------------------------- CPA and chemCPA
def cpa(job: Mapping[str, Any], cells: Arrays) -> Fit:
    """CPA (Facebook): its `CPA.update` in the loop of its train.py, with its default hyper-parameters.

    The control is a perturbation like any other, as its data set has it. No early stopping: that looks at test cells.
    Means are those of its decoder, control cells having been given the asked perturbations.
    """
    import torch

    package = types.ModuleType("cpa")
    package.__path__ = [str(Path(job["source"]) / "cpa")]  # its __init__ imports plotting
    sys.modules["cpa"] = package
    x, amounts = torch.from_numpy(cells["x"]), torch.from_numpy(_with_control(cells))
    hparams = job["options"].get("hparams", {})
    model = importlib.import_module("cpa.model").CPA(
        x.shape[1], amounts.shape[1], [1], device="cpu", doser_type="sigm", hparams=hparams, seed=job["seed"]
    )
    data = torch.utils.data.TensorDataset(x, amounts[cells["env"]], torch.ones(len(x), 1))
    loader = torch.utils.data.DataLoader(data, batch_size=model.hparams["batch_size"], shuffle=True)
    started = time.process_time()
    for _ in range(job["epochs"]):
        for genes, drugs, *covariates in loader:
            model.update(genes, drugs, covariates)
    seconds = time.process_time() - started
    model.eval()
    start = x[cells["reference"][cells["env"]]]
    one = torch.ones(len(start), 1)
    with torch.no_grad():
        found = [
            model.predict(start, amounts[e].expand(len(start), -1), [one])[:, : x.shape[1]].mean(0)
            for e in _asked_and_control(cells)
        ]
    keys = ("dim", "autoencoder_width", "autoencoder_depth", "batch_size", "autoencoder_lr", "reg_adversary")
    return Fit(seconds, ", ".join(f"{k} {model.hparams[k]}" for k in keys), _means(found))


def chemcpa(job: Mapping[str, Any], cells: Arrays) -> Fit:
    """`chemCPA.lightning_module.ChemCPA` under Lightning's Trainer.

    Settings are those of its configuration files, but for the decoder's last activation, which keeps means above 0:
    linear, since expression is centred. Molecules' features come with the job. `"cuda"` in its source becomes `"cpu"`.
    """
    import lightning
    import torch
    from chemCPA import lightning_module

    features = torch.from_numpy(np.vstack([cells["features"], 0 * cells["features"][:1]]))
    lightning_module.get_chemical_representation = lambda **_: torch.nn.Embedding.from_pretrained(features, freeze=True)
    network = lightning_module.ComPert
    lightning_module.ComPert = lambda **given: network(**{**given, "device": "cpu"})
    x, amounts = torch.from_numpy(cells["x"]), torch.from_numpy(_with_control(cells))
    drug, dose = amounts.argmax(1), amounts.amax(1)
    hparams = {**_chemcpa_defaults(Path(job["source"])), **job["options"].get("hparams", {})}
    additional = {"decoder_activation": "linear", "doser_type": "amortized", "seed": job["seed"], "patience": 50}
    module = lightning_module.ChemCPA(
        {
            "model": {
                "hparams": hparams,
                "additional_params": additional,
                "embedding": {"model": "rdkit", "datapath": None},
                "append_ae_layer": False,
            },
            "training": {"run_eval_r2": False},
        },
        {
            "num_genes": x.shape[1],
            "num_drugs": amounts.shape[1],
            "num_covariates": [1],
            "use_drugs_idx": True,
            "canon_smiles_unique_sorted": [],
        },
    )
    env = torch.from_numpy(cells["env"])
    one = torch.ones(len(x), 1)
    data = torch.utils.data.TensorDataset(x, drug[env], dose[env], one, one)
    loader = torch.utils.data.DataLoader(data, batch_size=int(hparams["batch_size"]), shuffle=True)
    started = time.process_time()
    _trainer(lightning, job["epochs"], limit_val_batches=0).fit(module, loader)
    seconds = time.process_time() - started
    model = module.model.eval()
    start = x[cells["reference"][cells["env"]]]
    with torch.no_grad():
        found = [
            model.predict(
                genes=start,
                drugs_idx=drug[e].expand(len(start)),
                dosages=dose[e].expand(len(start)),
                covariates=[one[: len(start)]],
            )[0][:, : x.shape[1]].mean(0)
            for e in _asked_and_control(cells)
        ]
    keys = ("dim", "autoencoder_width", "autoencoder_depth", "batch_size", "autoencoder_lr", "step_size_lr")
    return Fit(seconds, ", ".join(f"{k} {hparams[k]:.3g}" for k in keys), _means(found))


def _chemcpa_defaults(source: Path) -> dict[str, float]:
    """config/model/hparams/default.yaml, a flat list of numbers."""
    lines = (source / "config" / "model" / "hparams" / "default.yaml").read_text().splitlines()
    pairs = [line.split(":") for line in lines if ":" in line]
    return {name: float(value) if "." in value else int(value) for name, value in pairs}


def _with_control(cells: Arrays) -> Any:
    """``[E, M + 1]`` amounts; the control is the last perturbation, at amount 1."""
    return np.hstack([cells["amounts"], cells["reference"][:, None].astype(np.float32)])


def _asked_and_control(cells: Arrays) -> list[int]:
    return [*cells["asked"].tolist(), int(np.flatnonzero(cells["reference"])[0])]


def _means(found: list[Any]) -> Arrays:
    return {"means": np.stack([f.numpy() for f in found[:-1]]), "start": found[-1].numpy()}


def _trainer(lightning: Any, epochs: int, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


PROGRAMS: dict[str, Callable[[Mapping[str, Any], Arrays], Fit]] = {
    "sams-vae": sams_vae,
    "svae+": svae_plus,
    "cpa": cpa,
    "chemcpa": chemcpa,
}


def main(argv: list[str]) -> int:
    """Do the job; what the peer says of itself goes to standard error."""
    job = json.loads(argv[1])
    sys.path[:1] = [job["source"]] if job.get("source") else []  # no module of this folder hides a peer's
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import torch

            torch.set_num_threads(1)
            torch.manual_seed(job["seed"])
            folder = Path(job["folder"])
            with np.load(folder / "cells.npz") as stored:
                fit = PROGRAMS[job["peer"]](job, dict(stored))
            np.savez(folder / "answer.npz", **fit.arrays)
            versions = {"torch": torch.__version__}
            for name in ("pytorch-lightning", "lightning", "pyro-ppl"):
                with contextlib.suppress(PackageNotFoundError):
                    versions[name] = version(name)
            result: dict[str, Any] = {"seconds": fit.seconds, "words": fit.words, "versions": versions}
    except ImportError as error:
        result = {"missing": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
