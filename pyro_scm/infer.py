"""`fit`: stochastic variational inference of an ensemble."""

import io
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_scm import checkpoints
from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.ensemble import Ensemble, System, stack_initial
from pyro_scm.errors import CheckpointError, DataError, ModelError, TrainingError
from pyro_scm.feeding import Feeder
from pyro_scm.objectives import Objective
from pyro_scm.priors import SparseSoftmax
from pyro_scm.run import Environments, Run, Settings
from pyro_scm.threads import few_threads

__all__ = ["fit"]

_AVERAGED_EPOCHS = 5  # the loss with analytic KL is noisy near its optimum: early stopping looks at an average
_VALIDATION_SEED = 0
_SCHEDULES = ("constant", "cosine")
_PRECISIONS = ("float32", "bfloat16")


def fit(
    model: nn.Module,
    guide: nn.Module,
    cells: EnvironmentDataset,
    *,
    seeds: Sequence[int] = (0,),
    objective: Objective | None = None,
    validation: EnvironmentDataset | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    schedule: str = "constant",
    kl_warmup: float = 0.1,
    temperature: float | tuple[float, float] | None = None,
    clip: float | None = 100.0,
    weight_decay: float = 0.0,
    patience: int | None = None,
    critic_steps: int = 1,
    precision: str = "float32",
    fresh: bool = True,
    device: str | torch.device = "auto",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    progress: bool | None = None,
) -> Run:
    """Train an ensemble: K = len(seeds) members of one model, in one vectorised program.

    A member's result is the one it would have alone: its seed draws its initial parameters and its latent noise; the
    order of the cells is the same for all. Afterwards `model` and `guide` hold the parameters of the best member.

    Args:
        model: generative program, a `LatentModel` or any Pyro module over a `Batch`.
        guide: its guide, for example `guides.amortise(model, cells)`.
        cells: training cells.
        seeds: of the members.
        objective: `Objective()` by default, the evidence lower bound.
        validation: cells that are not trained on, for example those of held-out environments; each member then keeps
            the parameters of the epoch at which its validation loss, averaged over 5 epochs, was lowest (of the last
            epoch where the temperature is annealed, which all members share).
        epochs: passes over the cells.
        batch_size: cells a step.
        lr: of Adam.
        schedule: of the learning rate: ``"constant"`` or ``"cosine"`` (to 0 at the last epoch).
        kl_warmup: share of the epochs over which the weight of the KL rises from 0 to 1.
        temperature: of sparse softmax priors and shifts: a number, or (first, last) for geometric annealing. The
            model's own by default.
        clip: largest norm of a member's gradient, of the loss in nats per cell.
        weight_decay: decoupled (AdamW).
        patience: stop a member whose averaged validation loss has not fallen for so many epochs.
        critic_steps: steps of the adversaries' critics for each step of the model.
        precision: ``"float32"``, or ``"bfloat16"``: networks run in bfloat16 (autocast), about twice as fast where they
            are wide, while parameters, densities and sums stay in float32.
        fresh: draw initial parameters from the seeds; False starts every member from the present ones.
        device: ``"auto"`` takes a GPU where there is one.
        checkpoint: folder to save to during training and to resume from if it holds an unfinished run.
        checkpoint_every: epochs between saves.
        progress: show a progress bar; by default where the error stream is a terminal.

    Raises:
        DataError: no cells, or validation cells of another data set.
        ModelError: options that do not exist or do not fit the model.
        TrainingError: a loss or gradient that is not finite; names the member, the step and the site.
        CheckpointError: a checkpoint of other settings.
    """
    settings = Settings(
        epochs,
        batch_size,
        lr,
        schedule,
        kl_warmup,
        _interval(temperature),
        clip,
        weight_decay,
        patience,
        critic_steps,
        precision,
    )
    _check(settings, cells, validation, seeds)
    where = _device(device)
    system = System(model, guide, objective or Objective()).to(where)
    trainer = _Trainer(system, cells, validation, tuple(int(s) for s in seeds), settings, where, fresh)
    if checkpoint is not None:
        trainer.resume(Path(checkpoint))
    trainer.first_step_is_valid()
    trainer.train(Path(checkpoint) if checkpoint is not None else None, checkpoint_every, progress)
    return trainer.result()


class _Trainer:
    """The state of a training: parameters, optimisers, generators, history."""

    def __init__(
        self,
        system: System,
        cells: EnvironmentDataset,
        validation: EnvironmentDataset | None,
        seeds: tuple[int, ...],
        settings: Settings,
        device: torch.device,
        fresh: bool,
    ) -> None:
        self.system, self.seeds, self.settings, self.device = system, seeds, settings, device
        self.cells = cells
        self.training = Feeder(cells, device)
        self.validation = Feeder(validation, device) if validation is not None else None
        generators = [torch.Generator(device).manual_seed(s) for s in seeds]
        self.ensemble = Ensemble(system, stack_initial(system, seeds, fresh), generators)
        critics = system.critic_names()
        parameters = self.ensemble.parameters
        self.players = [
            [p for n, p in parameters.items() if (n in critics) == side and p.requires_grad] for side in (False, True)
        ]
        if not self.players[0]:
            raise ModelError("neither model nor guide has a parameter to train: all are frozen, or there are none")
        self.optimisers = [
            torch.optim.AdamW(player, settings.lr, weight_decay=settings.weight_decay, fused=True)
            for player in self.players
            if player
        ]
        self.epoch = 0
        self.rows: list[dict[str, Any]] = []
        k = len(seeds)
        self.kept = {name: p.detach().clone() for name, p in parameters.items()}
        self.best = np.full(k, np.inf)
        self.stopped = np.zeros(k, dtype=np.int64)

    # -------------------------------------------------------------- one training
    def train(self, folder: Path | None, every: int, progress: bool | None) -> None:
        from tqdm import tqdm

        shown = sys.stderr.isatty() if progress is None else progress
        bar = tqdm(total=self.settings.epochs, initial=self.epoch, unit="epoch", disable=not shown)
        # a multiply-add forward and two backward, for every parameter and cell
        operations = 6 * sum(p.numel() for p in self.ensemble.parameters.values()) * self.settings.batch_size
        threads = few_threads(operations if self.device.type == "cpu" else 0)
        # checks ran in the first evaluation; each costs passes over the data
        with bar, threads, pyro.validation_enabled(False):
            while self.epoch < self.settings.epochs and not self._all_stopped():
                self._one_epoch()
                last = self.rows[-len(self.seeds) :]
                bar.set_postfix_str(f"loss {np.mean([r['loss'] for r in last]):.4g} nats/cell")
                bar.update()
                if folder is not None and (self.epoch % every == 0 or self.epoch == self.settings.epochs):
                    self.save(folder)
        if folder is not None:
            self.save(folder)

    def _one_epoch(self) -> None:
        started = time.perf_counter()
        done = self.epoch / max(self.settings.epochs, 1)
        rate = self.settings.lr * (0.5 * (1 + math.cos(math.pi * done)) if self.settings.schedule == "cosine" else 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        self._set_temperature(self.epoch)
        order = np.random.default_rng(self.epoch).permutation(len(self.cells))
        sums: dict[str, Tensor] = {}
        steps = math.ceil(len(order) / self.settings.batch_size)
        for i, batch in enumerate(self.training.batches(self.settings.batch_size, order)):
            weight = self._kl_weight(self.epoch + i / steps)
            for _ in range(self.settings.critic_steps if self.players[1] else 0):
                self._step(1, batch, weight)
            for name, value in self._step(0, batch, weight).items():
                sums[name] = sums.get(name, 0.0) + value.detach() * len(batch)
        self.epoch += 1
        means = {name: (value / len(order)).cpu().numpy() for name, value in sums.items()}
        held_out = self._validate() if self.validation is not None else {}
        for k, seed in enumerate(self.seeds):
            row = {"epoch": self.epoch, "seed": seed, "lr": rate, "seconds": time.perf_counter() - started}
            row |= {name: float(value[k]) for name, value in (means | held_out).items()}
            self.rows.append(row)
        self._keep()

    def _step(self, player: int, batch: Batch, weight: float) -> dict[str, Tensor]:
        noise = [self.ensemble.noise(batch) for _ in range(self.system.objective.num_particles)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            losses = self.ensemble.losses(batch, noise, weight, critics=player == 1)
        parameters = self.players[player]
        total = losses["loss"].sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for p, g in zip(parameters, gradients, strict=True):
            # the fused optimiser reads memory in the parameter's own layout, and vmap returns permuted gradients
            p.grad = torch.zeros_like(p) if g is None else g.contiguous()
        norm = _clip(parameters, self.settings.clip)
        if not bool(torch.isfinite(norm).all()):
            self._explain(batch, noise, weight, norm)
        self.optimisers[player].step()
        return losses

    def _kl_weight(self, epoch: float) -> float:
        warm = self.settings.kl_warmup * self.settings.epochs
        return min(1.0, epoch / warm) if warm > 0 else 1.0

    def _set_temperature(self, epoch: int) -> None:
        if self.settings.temperature is None:
            return
        first, last = self.settings.temperature
        done = epoch / max(self.settings.epochs - 1, 1)
        for module in self.system.modules():
            if isinstance(module, SparseSoftmax):
                module.temperature.fill_(first * (last / first) ** done)

    def _validate(self) -> dict[str, NDArray[np.float64]]:
        """Loss of the validation cells, per cell, with the same noise every time."""
        assert self.validation is not None
        generators = [torch.Generator(self.device).manual_seed(_VALIDATION_SEED) for _ in self.seeds]
        sums: dict[str, Tensor] = {}
        with torch.no_grad():
            for batch in self.validation.batches(1024):
                noise = [self.ensemble.noise(batch, generators)]
                for name, value in self.ensemble.losses(batch, noise).items():
                    if name in ("loss", "reconstruction", "kl"):
                        sums[f"validation_{name}"] = sums.get(f"validation_{name}", 0.0) + value * len(batch)
        return {name: (value / len(self.validation)).cpu().numpy() for name, value in sums.items()}

    def _keep(self) -> None:
        """Per member: keep the present parameters if its averaged validation loss is the lowest so far."""
        k = len(self.seeds)
        if self.validation is None:
            losses = np.array([r["loss"] for r in self.rows[-k:]])
            better = np.ones(k, dtype=bool)
        else:
            recent = self.rows[-k * _AVERAGED_EPOCHS :]
            losses = np.array([r["validation_loss"] for r in recent]).reshape(-1, k).mean(0)
            better = (losses < self.best) & ~self._done(self.epoch - 1)
            if self._kl_weight(self.epoch) < 1 or self._anneals():  # the best is yet to come
                better[:] = True
        for name, p in self.ensemble.parameters.items():
            self.kept[name][torch.as_tensor(better, device=p.device)] = p.detach()[torch.as_tensor(better)]
        self.best[better] = losses[better]
        self.stopped[better] = self.epoch

    def _anneals(self) -> bool:
        """Whether the temperature changes: one that all members share cannot go back to an epoch for each of them."""
        return self.settings.temperature is not None and len(set(self.settings.temperature)) > 1

    def _done(self, epoch: int) -> NDArray[np.bool_]:
        """Members whose patience was at its end after an epoch."""
        if self.settings.patience is None or self.validation is None:
            return np.zeros(len(self.seeds), dtype=bool)
        return epoch - self.stopped >= self.settings.patience

    def _all_stopped(self) -> bool:
        return bool(self.epoch and self._done(self.epoch).all())

    # -------------------------------------------------------------- checks
    def first_step_is_valid(self) -> None:
        """One evaluation of the first member with Pyro's and torch's checks on: later steps run without."""
        rows = np.arange(min(len(self.cells), self.settings.batch_size))
        batch = next(iter(self.training.batches(len(rows), rows)))
        self.ensemble.load_member(0)
        with torch.no_grad(), pyro.validation_enabled(True):
            try:
                loss = self.system.objective.loss(self.system.model.forward, self.system.guide.forward, batch)
            except (ValueError, RuntimeError) as error:
                raise ModelError(f"the first evaluation of the model failed: {error}") from error
        if not math.isfinite(loss):
            self._explain(batch, None, 1.0, torch.full((1,), torch.nan))

    def _explain(self, batch: Batch, noise: Any, weight: float, norm: Tensor) -> None:
        k = int((~torch.isfinite(norm)).nonzero()[0])
        bad_parameters = [n for n, p in self.ensemble.parameters.items() if not bool(torch.isfinite(p[k]).all())]
        self.ensemble.load_member(k)
        objective = self.system.objective
        with torch.no_grad(), pyro.validation_enabled(False):
            world = objective.world(self.system.model.forward, self.system.guide.forward, batch)
        sites = [
            name
            for name, site in {**world.guide, **world.model}.items()
            if not bool(torch.isfinite(torch.as_tensor(site["value"])).all())
            or not bool(torch.isfinite(site["fn"].log_prob(site["value"])).all())
        ]
        rows = batch.index[:3].tolist()
        raise TrainingError(
            f"the loss or its gradient is not finite in epoch {self.epoch + 1}, member with seed {self.seeds[k]}, "
            f"batch of rows {rows}...; sites at fault: {sites or 'none (the gradient alone)'}; parameters at fault: "
            f"{bad_parameters or 'none'}. Lower the learning rate, clip gradients harder, or look at these rows"
        )

    # -------------------------------------------------------------- checkpoints
    def save(self, folder: Path) -> None:
        """Everything needed to go on exactly as if nothing had happened."""
        tensors = {f"parameters.{n}": p for n, p in self.ensemble.parameters.items()}
        tensors |= {f"kept.{n}": p for n, p in self.kept.items()}
        tensors |= {f"generator.{k}": g.get_state() for k, g in enumerate(self.ensemble.generators)}
        for side, optimiser in enumerate(self.optimisers):
            for i, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{side}.{i}.{name}": torch.as_tensor(v) for name, v in state.items()}
        manifest = {
            "kind": "training",
            "seeds": list(self.seeds),
            "settings": asdict(self.settings),
            "epoch": self.epoch,
            "best": self.best.tolist(),
            "stopped": self.stopped.tolist(),
            **self._setting(),
            "history": pd.DataFrame(self.rows).to_csv(index=False),
        }
        checkpoints.write(folder / "training", tensors, manifest)
        self.result().save(folder)

    def _setting(self) -> dict[str, Any]:
        """What else must agree for a training to go on: the cells and the loss."""
        objective = self.system.objective
        return {
            "cells": len(self.cells),
            "validation": None if self.validation is None else len(self.validation),
            "kl_weight": objective.kl_weight,
            "particles": objective.num_particles,
            "penalties": {name: float(penalty.weight) for name, penalty in objective.penalties.items()},
        }

    def resume(self, folder: Path) -> None:
        """Go on from `save`, if there is anything to go on from."""
        if not (folder / "training" / checkpoints.MANIFEST).is_file():
            return
        tensors, manifest = checkpoints.read(folder / "training", self.device)
        settings = {**asdict(self.settings)}
        settings["temperature"] = list(settings["temperature"]) if settings["temperature"] else None
        saved = manifest["settings"]
        for name, now, before in (
            ("seeds", list(self.seeds), manifest["seeds"]),
            *((key, now, manifest[key]) for key, now in self._setting().items()),
            *((key, settings[key], saved[key]) for key in settings),
        ):
            if now != before and name != "epochs":
                raise CheckpointError(
                    f"{folder}: holds a training with {name} = {before}, asked for {now}: "
                    "use the same settings, or another folder"
                )
        here = {f"parameters.{name}": p.shape for name, p in self.ensemble.parameters.items()}
        there = {name: value.shape for name, value in tensors.items() if name.startswith("parameters.")}
        for name in {**here, **there}:
            if here.get(name) != there.get(name):
                name = name.removeprefix("parameters.")
                raise CheckpointError(f"{folder}: holds a training of another model (parameter {name} differs)")
        with torch.no_grad():
            for name, p in self.ensemble.parameters.items():
                p.copy_(tensors[f"parameters.{name}"])
                self.kept[name].copy_(tensors[f"kept.{name}"])
        for k, generator in enumerate(self.ensemble.generators):
            generator.set_state(tensors[f"generator.{k}"].cpu().to(torch.uint8))
        for side, optimiser in enumerate(self.optimisers):
            state = optimiser.state_dict()
            for i in range(len(self.players[side])):
                prefix = f"optimiser.{side}.{i}."
                found = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
                if found:
                    state["state"][i] = found
            optimiser.load_state_dict(state)
        self.epoch = int(manifest["epoch"])
        self._set_temperature(max(self.epoch - 1, 0))  # a finished training runs no epoch that would set it
        self.best, self.stopped = np.array(manifest["best"]), np.array(manifest["stopped"])
        text = manifest["history"].strip()
        frame = pd.read_csv(io.StringIO(text), float_precision="round_trip") if text else pd.DataFrame()
        self.rows = [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]

    def result(self) -> Run:
        """The run as it stands: every member with the parameters that it keeps."""
        best = int(np.argmin(self.best))
        self.ensemble.load_member(best, self.kept)
        return Run(
            model=self.system.model,
            guide=self.system.guide,
            parameters={name: value.clone() for name, value in self.kept.items()},
            seeds=self.seeds,
            schema=self.cells.schema,
            environments=Environments.of(self.cells),
            history=pd.DataFrame(self.rows),
            settings=self.settings,
            stopped=tuple(int(s) for s in self.stopped),
            losses=tuple(float(v) for v in self.best),
        )


def _clip(parameters: Sequence[Tensor], largest: float | None) -> Tensor:
    """Norm ``(K,)`` of each member's gradient, which is scaled down where the norm exceeds `largest`."""
    own = [p.grad for p in parameters if p.grad is not None]
    parts = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in own]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    if largest is not None and not bool((norm <= largest).all()):  # most steps need no pass over the gradients
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        for g in own:
            g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))
    return norm


def _interval(temperature: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if temperature is None:
        return None
    first, last = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    if not (first > 0 and last > 0):
        raise ModelError(f"temperature {temperature}: give positive numbers")
    return float(first), float(last)


def _check(
    settings: Settings, cells: EnvironmentDataset, validation: EnvironmentDataset | None, seeds: Sequence[int]
) -> None:
    if len(cells) == 0:
        raise DataError("there are no training cells: the data set is empty")
    if not len(seeds) or len(set(seeds)) != len(seeds):
        raise ModelError(f"seeds {list(seeds)}: give at least one, each once")
    for what in ("genes", "features"):
        if validation is not None and getattr(validation, what) != getattr(cells, what):
            raise DataError(
                f"the validation cells have other {what} than the training cells: split both from one data set"
            )
    if settings.schedule not in _SCHEDULES:
        raise ModelError(f"unknown schedule {settings.schedule!r}: use one of {', '.join(_SCHEDULES)}")
    if settings.precision not in _PRECISIONS:
        raise ModelError(f"unknown precision {settings.precision!r}: use one of {', '.join(_PRECISIONS)}")
    for name in ("epochs", "batch_size", "lr", "critic_steps"):
        if not getattr(settings, name) > 0:
            raise ModelError(f"{name} = {getattr(settings, name)}: give a positive number")
    if not 0 <= settings.kl_warmup <= 1:
        raise ModelError(f"kl_warmup = {settings.kl_warmup}: give a share of the epochs, between 0 and 1")
    if settings.weight_decay < 0:
        raise ModelError(f"weight_decay = {settings.weight_decay}: give 0 or a positive number")
    for name in ("clip", "patience"):
        if getattr(settings, name) is not None and not getattr(settings, name) > 0:
            raise ModelError(f"{name} = {getattr(settings, name)}: give a positive number, or None for none")
    if settings.patience is not None and validation is None:
        raise ModelError("patience needs validation cells: pass validation=, or leave patience out")


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
