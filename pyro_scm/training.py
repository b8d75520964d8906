"""`Trainer`: the state of a training, and what a step, an epoch and a checkpoint are."""

import io
import json
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
from pyro_scm.chance import forked
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.ensemble import Ensemble, System, stack_initial
from pyro_scm.errors import CheckpointError, ModelError, TrainingError
from pyro_scm.feeding import Feeder
from pyro_scm.parallel import Ranks
from pyro_scm.priors import SparseSoftmax
from pyro_scm.recording import Recorded
from pyro_scm.run import Environments, Run, Settings
from pyro_scm.threads import few_threads

__all__ = ["Trainer"]

_AVERAGED_EPOCHS = 5  # the loss with analytic KL is noisy near its optimum: early stopping looks at an average
_VALIDATION_SEED = 0
_VALIDATION_BATCH = 1024
_STEPS_BETWEEN_CHECKSUMS = 100


class _Side(nn.Module):
    """One of the two players, the model or the critics: its parameters and, as `forward`, the loss it minimises.

    Engines of data parallelism wrap this module, one for each player: each reduces the gradients of its own step.

    Args:
        ensemble: whose parameters these are.
        names: of this player's parameters.
        critics: whether it is the critics.
        precision: of the networks.
    """

    def __init__(self, ensemble: Ensemble, names: Sequence[str], critics: bool, precision: str) -> None:
        super().__init__()
        self.ensemble, self.names, self.critics, self.precision = ensemble, list(names), critics, precision
        self.own = nn.ParameterList([ensemble.parameters[name] for name in names])
        self.shared = {n: b for n, b in ensemble.system.named_buffers() if n not in ensemble.parameters}
        self.recorded = Recorded(self._flat)
        self.template: Batch | None = None

    def forward(self, batch: Batch, noise: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
        """Losses ``(K,)``; differentiable in this player's parameters alone."""
        every = self.ensemble.parameters
        values = {name: p.detach() for name, p in every.items()} | dict(zip(self.names, self.own, strict=True))
        with torch.autocast(batch.env.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.ensemble.losses(batch, noise, weight, self.critics, {name: values[name] for name in every})

    def gradients(
        self, batch: Batch, noise: dict[str, Tensor], weight: Tensor
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses ``(K,)`` and the gradient of each of this player's parameters, of the parameter's own layout."""
        self.template = batch
        arguments: dict[str, Tensor] = {"weight": weight}
        for kind, tensors in (
            ("parameter", self.ensemble.parameters),
            ("buffer", self.shared),
            ("batch", batch.tensors()),
            ("noise", noise),
        ):
            arguments |= {f"{kind} {name}": value for name, value in tensors.items()}
        results = self.recorded(arguments)
        return (
            {name.removeprefix("loss "): value for name, value in results.items() if name.startswith("loss ")},
            [results[f"gradient {name}"] for name in self.names],
        )

    def _flat(self, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """`gradients` as a function from tensors to tensors."""
        assert self.template is not None

        def of(kind: str) -> dict[str, Tensor]:
            return {name.removeprefix(kind): value for name, value in arguments.items() if name.startswith(kind)}

        values = {name: value.detach() for name, value in of("parameter ").items()}
        own = [values[name].requires_grad_() for name in self.names]
        batch = self.template.with_tensors(of("batch "))
        with torch.autocast(batch.env.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            losses = self.ensemble.losses(batch, of("noise "), arguments["weight"], self.critics, values, of("buffer "))
        found = torch.autograd.grad(losses["loss"].sum(), own, allow_unused=True)
        result = {f"loss {name}": value.detach() for name, value in losses.items()}
        for name, p, g in zip(self.names, own, found, strict=True):
            # the fused optimiser reads memory in the parameter's own layout, and vmap returns permuted gradients
            result[f"gradient {name}"] = torch.zeros_like(p) if g is None else g.contiguous()
        return result


class Trainer:
    """The state of a training: parameters, optimisers, generators, history.

    Args:
        system: model, guide and objective, on their device.
        cells: training cells.
        validation: cells to choose epochs by, or None.
        seeds: of the members.
        settings: see `pyro_scm.fit`.
        device: of this process.
        fresh: whether the seeds draw initial parameters.
        ranks: the processes that train together.
        start: a run to start from, or None.

    Raises:
        ModelError: nothing to train, or a start of another structure.
    """

    def __init__(
        self,
        system: System,
        cells: EnvironmentDataset,
        validation: EnvironmentDataset | None,
        seeds: tuple[int, ...],
        settings: Settings,
        device: torch.device,
        fresh: bool,
        ranks: Ranks | None = None,
        start: Run | None = None,
    ) -> None:
        self.system, self.seeds, self.settings, self.device = system, seeds, settings, device
        self.ranks = ranks or Ranks()
        self.cells = cells
        self.training = Feeder(cells, device)
        self.validation = Feeder(validation, device) if validation is not None else None
        generators = [torch.Generator(device).manual_seed(s) for s in seeds]
        initial = stack_initial(system, seeds, fresh)
        if start is not None:
            initial |= _started(system, start, len(seeds))
        self.ensemble = Ensemble(system, initial, generators)
        parameters, critics = self.ensemble.parameters, system.critic_names()
        trained = [name for name, p in parameters.items() if p.requires_grad]
        names = [[name for name in trained if (name in critics) == side] for side in (False, True)]
        if not names[0]:
            raise ModelError("neither model nor guide has a parameter to train: all are frozen, or there are none")
        self.sides = [_Side(self.ensemble, own, bool(i), settings.precision) for i, own in enumerate(names) if own]
        self.wrapped = [self.ranks.wrap(side) for side in self.sides]
        k = len(seeds)
        self.rates, self.decays = _each(settings.lr, k), _each(settings.weight_decay, k)
        self.kl_weights = torch.tensor(_each(settings.kl_weight, k), device=device)
        self.alike = len(set(self.rates)) == len(set(self.decays)) == 1
        self.optimisers = [
            torch.optim.AdamW(side.own, max(self.rates), weight_decay=self.decays[0] if self.alike else 0.0, fused=True)
            for side in self.sides
        ]
        self.epoch = self.steps = 0
        self.rows: list[dict[str, Any]] = []
        self.kept = {name: p.detach().clone() for name, p in parameters.items()}
        self.best = np.full(k, np.inf)
        self.stopped = np.zeros(k, dtype=np.int64)

    # -------------------------------------------------------------- one training
    def train(self, folder: Path | None, every: int, progress: bool | None) -> None:
        """Epochs until the last one, or until the patience with every member is at its end.

        Args:
            folder: to save to, or None.
            every: epochs between saves.
            progress: see `pyro_scm.fit`.
        """
        from tqdm import tqdm

        shown = (sys.stderr.isatty() if progress is None else progress) and self.ranks.first
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
        factor = 0.5 * (1 + math.cos(math.pi * done)) if self.settings.schedule == "cosine" else 1.0
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = max(self.rates) * factor
        self._set_temperature(self.epoch)
        for penalty in self.system.objective.penalties.values():
            penalty.at(done)
        order = self.training.order(self.epoch, self.settings.shuffle)
        size = self.settings.batch_size
        steps = math.ceil(len(order) / size)
        sums: dict[str, Tensor] = {}
        with forked():
            # for sites that draw for themselves: what they draw depends on nothing but seeds, epoch and process
            torch.manual_seed(_mixed(*self.seeds, self.epoch, self.ranks.index))
            parts = self.training.batches(size, order, (self.ranks.index, self.ranks.size))
            for i, batch in enumerate(parts):
                cells = min(size, len(order) - i * size)
                weight = self.kl_weights * self._kl_weight(self.epoch + i / steps)
                for _ in range(self.settings.critic_steps if len(self.sides) > 1 else 0):
                    self._step(1, batch, cells, weight)
                own = self.ranks.share(cells)[1] * cells / self.ranks.size
                for name, value in self._step(0, batch, cells, weight).items():
                    sums[name] = sums.get(name, 0.0) + value.detach() * own
        self.epoch += 1
        if self.ranks.size > 1:
            self.ranks.require_same(self.ensemble.parameters)
        means = {name: (self.ranks.sum(value) / len(order)).cpu().numpy() for name, value in sums.items()}
        held_out = self._validate() if self.validation is not None else {}
        for k, seed in enumerate(self.seeds):
            row = {"epoch": self.epoch, "member": k, "seed": seed, "lr": self.rates[k] * factor}
            row["seconds"] = time.perf_counter() - started
            row |= {name: float(value[k]) for name, value in (means | held_out).items()}
            self.rows.append(row)
        self._keep()

    def _step(self, player: int, batch: Batch, cells: int, weight: Tensor) -> dict[str, Tensor]:
        """One step of a player on this process's share of a batch of so many cells."""
        side, optimiser = self.sides[player], self.optimisers[player]
        share, own = self.ranks.share(cells)
        noise = self.ensemble.noise(batch, None, self.system.objective.num_particles, (cells, share))
        optimiser.zero_grad()
        if self.ranks.size == 1:
            losses, found = side.gradients(batch, noise, weight)
            for p, g in zip(side.own, found, strict=True):
                p.grad = g
            del found
        else:
            losses = self.wrapped[player](batch, noise, weight)
            self.ranks.backward(losses["loss"].sum() * own)
        gradients = [p.grad for p in side.own if p.grad is not None]
        norm = _norms(gradients)
        largest = self.settings.clip or torch.finfo(norm.dtype).max
        if not bool((norm <= largest).all()):  # most steps need one look at the norms, and no pass over the gradients
            if not bool(torch.isfinite(norm).all()):
                self._explain(batch, norm)
            _shrink(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
        self._update(side, optimiser)
        self.steps += 1
        if self.ranks.size > 1 and self.steps % _STEPS_BETWEEN_CHECKSUMS == 0:
            self.ranks.require_same(self.ensemble.parameters)
        return losses

    def _update(self, side: _Side, optimiser: torch.optim.Optimizer) -> None:
        """A step of AdamW, whose size is proportional to the learning rate: so members may have their own."""
        if self.alike:
            optimiser.step()
            return
        before = [p.detach().clone() for p in side.own]
        optimiser.step()
        share = torch.tensor(self.rates, device=self.device) / max(self.rates)
        decay = torch.tensor(self.decays, device=self.device) * share * optimiser.param_groups[0]["lr"]
        with torch.no_grad():
            for p, old in zip(side.own, before, strict=True):
                shape = (-1, *[1] * (p.dim() - 1))
                p.copy_(old + share.view(shape) * (p - old) - decay.view(shape) * old)

    def _kl_weight(self, epoch: float) -> float:
        warm = self.settings.kl_warmup * self.settings.epochs
        return min(1.0, epoch / warm) if warm > 0 else 1.0

    def _set_temperature(self, epoch: int) -> None:
        done = epoch / max(self.settings.epochs - 1, 1)
        now = [first * (last / first) ** done for first, last in self._temperatures()]
        if not now:
            return
        for name, module in self.system.named_modules():
            if isinstance(module, SparseSoftmax):
                own = self.ensemble.parameters[f"{name}.temperature"]
                own.data.copy_(torch.tensor(now * (len(self.seeds) // len(now))))

    def _temperatures(self) -> list[tuple[float, float]]:
        """First and last temperature of each member, or of all; none where the model keeps its own."""
        given: Any = self.settings.temperature
        if given is None:
            return []
        return list(given) if isinstance(given[0], tuple) else [given]

    def _validate(self) -> dict[str, NDArray[np.float64]]:
        """Loss of the validation cells, per cell, with the same noise every time; processes take batches in turn."""
        assert self.validation is not None
        order = np.arange(len(self.validation))
        sums: dict[str, Tensor] = {}
        for i, start in enumerate(range(0, len(order), _VALIDATION_BATCH)):
            if i % self.ranks.size != self.ranks.index:
                continue
            generators = [torch.Generator(self.device).manual_seed(_mixed(_VALIDATION_SEED, i)) for _ in self.seeds]
            rows = order[start : start + _VALIDATION_BATCH]
            batch = next(self.validation.batches(len(rows), rows))
            with torch.no_grad():
                noise = self.ensemble.noise(batch, generators, self.system.objective.num_particles)
                losses = self.ensemble.losses(batch, noise, self.kl_weights)
            for name in ("loss", "reconstruction", "kl"):
                sums[name] = sums.get(name, 0.0) + losses[name] * len(batch)
        names = ("loss", "reconstruction", "kl")
        nothing = torch.zeros(len(self.seeds), device=self.device)
        return {
            f"validation_{name}": (self.ranks.sum(sums.get(name, nothing)) / len(order)).cpu().numpy() for name in names
        }

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
            # the best is yet to come while the loss itself changes
            better |= np.array([self._kl_weight(self.epoch) < 1 or a != b for a, b in self._annealing()])
        if self.validation is not None:  # otherwise the last parameters are kept, and copied when they are asked for
            self._copy(torch.as_tensor(better, device=self.device))
        self.best[better] = losses[better]
        self.stopped[better] = self.epoch

    def _copy(self, chosen: Tensor) -> None:
        """Keep the present parameters of some members."""
        for name, p in self.ensemble.parameters.items():
            self.kept[name][chosen] = p.detach()[chosen]

    def _annealing(self) -> list[tuple[float, float]]:
        """First and last temperature of each member."""
        given = self._temperatures() or [(1.0, 1.0)]
        return given * (len(self.seeds) // len(given))

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
        batch = next(self.training.batches(len(rows), rows))
        self.ensemble.load_member(0)
        with torch.no_grad(), pyro.validation_enabled(True):
            try:
                loss = self.system.objective.loss(self.system.model.forward, self.system.guide.forward, batch)
            except (ValueError, RuntimeError) as error:
                raise ModelError(f"the first evaluation of the model failed: {error}") from error
        if not math.isfinite(loss):
            self._explain(batch, torch.full((1,), torch.nan))

    def _explain(self, batch: Batch, norm: Tensor) -> None:
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
        """Everything needed to go on exactly as if nothing had happened; written by the first process.

        The members' generators are in the same state in all processes, and everything else that is drawn depends on
        seeds, epoch and process alone: a training may go on with another number of processes.
        """
        if self.ranks.first:
            self._write(folder)
        self.ranks.wait()

    def _write(self, folder: Path) -> None:
        result = self.result()
        tensors: dict[str, Tensor] = {f"parameters.{n}": p for n, p in self.ensemble.parameters.items()}
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
        result.save(folder)

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
        settings = json.loads(json.dumps(asdict(self.settings)))  # tuples become lists
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
            for i in range(len(self.sides[side].own)):
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
        if self.validation is None:
            self._copy(torch.ones(len(self.seeds), dtype=torch.bool, device=self.device))
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


def _each(value: float | tuple[float, ...], members: int) -> list[float]:
    """A setting of each member."""
    return list(value) if isinstance(value, tuple) else [value] * members


def _started(system: System, start: Run, members: int) -> dict[str, Tensor]:
    """Parameters of model and guide from a run; what belongs to the objective, and schedules' buffers, are not its."""
    if len(start) != members:
        raise ModelError(f"start has {len(start)} members and {members} seeds are given: give one seed a member")
    found = {}
    for name, p in system.named_parameters():
        if not name.startswith(("model.", "guide.")):
            continue
        value = start.parameters.get(name)
        if value is None or value.shape[1:] != p.shape:
            there = "none" if value is None else str(tuple(value.shape[1:]))
            raise ModelError(
                f"start: parameter {name} has shape {there}, the model's {tuple(p.shape)}: give a run of a model and "
                "guide of the same structure"
            )
        found[name] = value.detach().to(p)
    return found


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence([abs(n) for n in numbers]).generate_state(1)[0])


def _norms(gradients: Sequence[Tensor]) -> Tensor:
    """Norm ``(K,)`` of each member's gradient."""
    parts = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return norm


def _shrink(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each member's gradient by its factor ``(K,)``."""
    for g in gradients:
        g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))
