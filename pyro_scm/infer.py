"""`fit`: stochastic variational inference of an ensemble."""

import itertools
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.ensemble import System
from pyro_scm.errors import DataError, ModelError
from pyro_scm.objectives import Objective
from pyro_scm.parallel import ranks
from pyro_scm.run import Run, Settings
from pyro_scm.training import Trainer

__all__ = ["fit", "grid"]

_SCHEDULES = ("constant", "cosine")
_PRECISIONS = ("float32", "bfloat16")
_SHUFFLES = ("auto", "cells", "blocks")


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
    lr: float | Sequence[float] = 1e-3,
    schedule: str = "constant",
    kl_weight: float | Sequence[float] = 1.0,
    kl_warmup: float = 0.1,
    temperature: float | tuple[float, float] | Sequence[float | tuple[float, float]] | None = None,
    clip: float | None = 100.0,
    weight_decay: float | Sequence[float] = 0.0,
    patience: int | None = None,
    critic_steps: int = 1,
    precision: str = "float32",
    shuffle: str = "auto",
    fresh: bool = True,
    start: Run | None = None,
    device: str | torch.device = "auto",
    fabric: Any = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    progress: bool | None = None,
) -> Run:
    """Train an ensemble: K = len(seeds) members of one model, in one vectorised program.

    A member's result is the one it would have alone: its seed draws its initial parameters and its latent noise; the
    order of the cells is the same for all. Afterwards `model` and `guide` hold the parameters of the best member.
    Members may also differ in settings: lr, kl_weight, temperature and weight_decay take a list of one value a member
    (see `grid`).

    Under ``torchrun``, or with a Fabric, every process calls this with the same arguments; each takes a share of every
    batch, and all return the same run, which is that of one process to rounding. Penalties must be sums over cells.

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
        kl_weight: beta of a beta-VAE; multiplies the objective's own.
        kl_warmup: share of the epochs over which the weight of the KL rises from 0 to 1.
        temperature: of sparse softmax priors and shifts: a number, or (first, last) for geometric annealing, or a list
            of either. The model's own by default.
        clip: largest norm of a member's gradient, of the loss in nats per cell.
        weight_decay: decoupled (AdamW).
        patience: stop a member whose averaged validation loss has not fallen for so many epochs.
        critic_steps: steps of the adversaries' critics for each step of the model.
        precision: ``"float32"``, or ``"bfloat16"``: networks run in bfloat16 (autocast), about twice as fast where they
            are wide, while parameters, densities and sums stay in float32.
        shuffle: order of the cells: ``"cells"`` draws them singly, ``"blocks"`` shuffles blocks of neighbours and the
            cells of 16 blocks at a time, which is how cells are read from disk; ``"auto"`` does so only there.
        fresh: draw initial parameters from the seeds; False starts every member from the present ones.
        start: a run of a model and guide of the same structure, for example from `unmix`: each member starts from the
            parameters of the run's member in its place.
        device: ``"auto"`` takes a GPU where there is one.
        fabric: a launched `lightning.fabric.Fabric`, whose processes train together; see `pyro_scm.parallel.launch`.
        checkpoint: folder to save to during training and to resume from if it holds an unfinished run.
        checkpoint_every: epochs between saves.
        progress: show a progress bar; by default where the error stream is a terminal.

    Raises:
        DataError: no cells, or validation cells of another data set.
        ModelError: options that do not exist or do not fit the model.
        TrainingError: a loss or gradient that is not finite; names the member, the step and the site.
        CheckpointError: a checkpoint of other settings.

    Example:
        >>> run = fit(model, guide, cells, seeds=range(3), epochs=1, progress=False)
        >>> len(run)
        3
    """
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        lr=_one_or_each(lr),
        schedule=schedule,
        kl_weight=_one_or_each(kl_weight),
        kl_warmup=kl_warmup,
        temperature=_temperature(temperature),
        clip=clip,
        weight_decay=_one_or_each(weight_decay),
        patience=patience,
        critic_steps=critic_steps,
        precision=precision,
        shuffle=shuffle,
    )
    _check(settings, cells, validation, seeds)
    asked = _device(device)
    processes = ranks(asked, fabric)
    where = processes.device(asked)
    system = System(model, guide, objective or Objective()).to(where)
    own = tuple(int(s) for s in seeds)
    trainer = Trainer(system, cells, validation, own, settings, where, fresh, processes, start)
    if checkpoint is not None:
        trainer.resume(Path(checkpoint))
    trainer.first_step_is_valid()
    trainer.train(Path(checkpoint) if checkpoint is not None else None, checkpoint_every, progress)
    return trainer.result()


def grid(seeds: Sequence[int] = (0,), **settings: Sequence[Any]) -> dict[str, list[Any]]:
    """Every combination of seeds and settings, as arguments of `fit`: all of them are then trained together.

    ``fit(model, guide, cells, **grid(range(5), lr=(1e-3, 3e-4)))`` trains 10 members; `Run.summary` tells which is
    which.

    Args:
        seeds: of the members.
        settings: values of lr, kl_weight, temperature or weight_decay.

    Raises:
        ModelError: a setting that all members share.

    Example:
        >>> grid(range(2), lr=(1e-2, 1e-3))
        {'seeds': [0, 0, 1, 1], 'lr': [0.01, 0.001, 0.01, 0.001]}
    """
    unknown = [name for name in settings if name not in _EACH]
    if unknown:
        raise ModelError(f"{unknown[0]} is the same for all members: a grid may vary {', '.join(_EACH)}")
    combined = list(itertools.product(seeds, *settings.values()))
    return {name: [row[i] for row in combined] for i, name in enumerate(("seeds", *settings))}


_EACH = ("lr", "kl_weight", "temperature", "weight_decay")


def _one_or_each(value: float | Sequence[float]) -> float | tuple[float, ...]:
    return value if isinstance(value, int | float) else tuple(float(v) for v in value)


def _temperature(value: Any) -> Any:
    """None, (first, last), or a tuple of these."""
    if isinstance(value, list):
        return tuple(_interval(v) for v in value)
    return _interval(value)


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
    own = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name in _EACH}
    several = {n: v for n, v in own.items() if isinstance(v, tuple) and (n != "temperature" or isinstance(v[0], tuple))}
    for name, values in several.items():
        if len(values) != len(seeds):
            raise ModelError(f"{name}: {len(values)} values for {len(seeds)} members: give one, or one a member")
    members = list(zip(seeds, *several.values(), strict=True))
    if not members or len(set(members)) != len(members):
        raise ModelError(f"seeds {list(seeds)}: give at least one, each once (or once with each of other settings)")
    for what in ("genes", "features"):
        if validation is not None and getattr(validation, what) != getattr(cells, what):
            raise DataError(
                f"the validation cells have other {what} than the training cells: split both from one data set"
            )
    if settings.schedule not in _SCHEDULES:
        raise ModelError(f"unknown schedule {settings.schedule!r}: use one of {', '.join(_SCHEDULES)}")
    if settings.precision not in _PRECISIONS:
        raise ModelError(f"unknown precision {settings.precision!r}: use one of {', '.join(_PRECISIONS)}")
    if settings.shuffle not in _SHUFFLES:
        raise ModelError(f"unknown shuffle {settings.shuffle!r}: use one of {', '.join(_SHUFFLES)}")
    for name in ("epochs", "batch_size", "lr", "critic_steps"):
        if not _smallest(getattr(settings, name)) > 0:
            raise ModelError(f"{name} = {getattr(settings, name)}: give a positive number")
    if not 0 <= settings.kl_warmup <= 1:
        raise ModelError(f"kl_warmup = {settings.kl_warmup}: give a share of the epochs, between 0 and 1")
    for name in ("weight_decay", "kl_weight"):
        if not _smallest(getattr(settings, name)) >= 0:
            raise ModelError(f"{name} = {getattr(settings, name)}: give 0 or a positive number")
    for name in ("clip", "patience"):
        if getattr(settings, name) is not None and not getattr(settings, name) > 0:
            raise ModelError(f"{name} = {getattr(settings, name)}: give a positive number, or None for none")
    if settings.patience is not None and validation is None:
        raise ModelError("patience needs validation cells: pass validation=, or leave patience out")


def _smallest(value: float | tuple[float, ...]) -> float:
    return min(value) if isinstance(value, tuple) else value


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
