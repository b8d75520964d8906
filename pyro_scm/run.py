"""`Run`: what training leaves behind, an ensemble of fitted models."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_scm import checkpoints
from pyro_scm.batch import Batch, Schema
from pyro_scm.errors import CheckpointError, DataError, listing, nearest
from pyro_scm.nn import replicated

if TYPE_CHECKING:
    from pyro_scm.data.dataset import EnvironmentDataset

__all__ = ["Environments", "Fitted", "Run", "Settings", "members"]


@dataclass(frozen=True)
class Settings:
    """How a run was trained; see `pyro_scm.fit`. A tuple holds one value a member."""

    epochs: int
    batch_size: int
    lr: float | tuple[float, ...]
    schedule: str
    kl_weight: float | tuple[float, ...]
    kl_warmup: float
    temperature: tuple[float, float] | tuple[tuple[float, float], ...] | None
    clip: float | None
    weight_decay: float | tuple[float, ...]
    patience: int | None
    critic_steps: int
    precision: str = "float32"
    shuffle: str = "auto"

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Settings":
        """Inverse of `dataclasses.asdict` after a round through JSON, which knows no tuples."""

        def tuples(value: Any) -> Any:
            return tuple(tuples(v) for v in value) if isinstance(value, list) else value

        return Settings(**{name: tuples(value) for name, value in data.items()})


@dataclass(frozen=True)
class Environments:
    """The environments that a run knows by name.

    Args:
        table: as `EnvironmentDataset.environments`, with columns ``cells``, the number of training cells, and
            ``trained``, which environments had any.
        representation: ``[E, F]``.
    """

    table: pd.DataFrame
    representation: NDArray[np.float32]

    @staticmethod
    def of(cells: "EnvironmentDataset") -> "Environments":
        """The environments of the training cells' data set."""
        number = np.bincount(cells.env, minlength=len(cells.environments))
        return Environments(cells.environments.assign(cells=number, trained=number > 0), cells.representation)

    def index(self, name: str) -> int:
        """Row number of an environment.

        Raises:
            DataError: no such environment.
        """
        names = [str(n) for n in self.table.index]
        if name not in names:
            near = listing(nearest(name, names))
            raise DataError(f"no environment {name!r} in this run: did you mean one of {near}?")
        return names.index(name)

    def place(self, batch: Batch, name: str) -> Batch:
        """The same cells in the named environment."""
        e = self.index(name)
        reference = bool(self.table["is_reference"].iloc[e])
        return batch.under(torch.as_tensor(self.representation[e]), env=e, perturbed=not reference)


@dataclass(eq=False)
class Run:
    """K trained members of one model and guide.

    Args:
        model: the generative program; holds the parameters of the best member.
        guide: its guide, likewise.
        parameters: name -> ``(K, ...)``, of model (``model.*``), guide (``guide.*``) and penalties.
        seeds: of the K members.
        schema: of the training cells.
        environments: that the run knows by name.
        history: one row an epoch and member: loss, reconstruction, kl, ... in nats per cell.
        settings: of the training.
        stopped: epoch whose parameters each member kept.
        losses: ``[K]`` loss by which members are compared: validation where there was one, else training.

    Example:
        >>> folder = run.save("run")
        >>> len(ps.load(folder))
        2
        >>> model, guide = run.member(run.best)
    """

    model: nn.Module
    guide: nn.Module
    parameters: dict[str, Tensor]
    seeds: tuple[int, ...]
    schema: Schema
    environments: Environments
    history: pd.DataFrame
    settings: Settings
    stopped: tuple[int, ...]
    losses: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def best(self) -> int:
        """Member with the lowest loss."""
        return int(np.argmin(self.losses))

    def summary(self) -> pd.DataFrame:
        """One row a member: its seed, the settings that may differ between members, its loss, the epoch it kept."""
        table = pd.DataFrame({"seed": self.seeds, "loss": self.losses, "epoch": self.stopped})
        for name in ("lr", "kl_weight", "weight_decay", "temperature"):
            value = getattr(self.settings, name)
            own = name != "temperature" or (value is not None and isinstance(value[0], tuple))
            if isinstance(value, tuple) and own:
                table[name] = list(value)
        return table.rename_axis("member")

    def member(self, k: int) -> tuple[nn.Module, nn.Module]:
        """Model and guide of member k, as modules of their own."""
        model, guide = copy.deepcopy(self.model), copy.deepcopy(self.guide)
        for prefix, module in (("model", model), ("guide", guide)):
            with torch.no_grad():
                for name, own in replicated(module).items():
                    own.copy_(self.parameters[f"{prefix}.{name}"][k])
        return model, guide

    def only(self, k: int) -> "Run":
        """The run with member k alone: latents of different members differ in order, sign and scale."""
        return replace(
            self,
            parameters={name: value[[k]] for name, value in self.parameters.items()},
            seeds=(self.seeds[k],),
            stopped=(self.stopped[k],),
            losses=(self.losses[k],),
        )

    def to(self, device: torch.device | str) -> "Run":
        """Move every tensor to a device."""
        self.model.to(device)
        self.guide.to(device)
        self.parameters = {name: value.to(device) for name, value in self.parameters.items()}
        return self

    def save(self, folder: str | Path) -> Path:
        """Write the run as plain tensors and JSON; `pyro_scm.load` reads it back.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        tensors = {f"parameters.{name}": value for name, value in self.parameters.items()}
        tensors |= {f"model.buffers.{name}": value for name, value in self.model.named_buffers()}
        tensors |= {f"guide.buffers.{name}": value for name, value in self.guide.named_buffers()}
        tensors["environments.representation"] = torch.as_tensor(self.environments.representation)
        manifest = {
            "kind": "run",
            "model": getattr(self.model, "spec", None),
            "guide": getattr(self.guide, "spec", None),
            "schema": self.schema.as_json(),
            "seeds": list(self.seeds),
            "settings": asdict(self.settings),
            "stopped": list(self.stopped),
            "losses": list(self.losses),
            "environments": self.environments.table.reset_index(names="environment").astype(object).to_dict("list"),
            "versions": _versions(),
        }
        checkpoints.write(folder, tensors, manifest)
        checkpoints.write_text(Path(folder) / "history.csv", self.history.to_csv(index=False))
        return Path(folder)

    @staticmethod
    def restore(folder: str | Path, model: nn.Module | None, guide: nn.Module | None, build: Any = None) -> "Run":
        """Read what `save` wrote into a model and guide of the same structure.

        Args:
            folder: of the run.
            model: of the same structure, or None to call `build`.
            guide: likewise.
            build: (manifest, schema) -> (model, guide).

        Raises:
            CheckpointError: damaged, or saved from another structure; the message names the first tensor that differs.
        """
        tensors, manifest = checkpoints.read(folder)
        if manifest.get("kind") != "run":
            raise CheckpointError(f"{folder}: not a run: give the folder that `fit` or `Run.save` wrote")
        schema = Schema.from_json(manifest["schema"])
        if model is None or guide is None:
            model, guide = build(manifest, schema)
        parameters = {n.removeprefix("parameters."): v for n, v in tensors.items() if n.startswith("parameters.")}
        _load_buffers(folder, tensors, model=model, guide=guide)
        table = pd.DataFrame(manifest["environments"]).set_index("environment")
        run = Run(
            model=model,
            guide=guide,
            parameters=parameters,
            seeds=tuple(manifest["seeds"]),
            schema=schema,
            environments=Environments(table, tensors["environments.representation"].numpy()),
            history=_history(Path(folder) / "history.csv"),
            settings=Settings.from_json(manifest["settings"]),
            stopped=tuple(manifest["stopped"]),
            losses=tuple(float(v) for v in manifest["losses"]),
        )
        for prefix, module in (("model", model), ("guide", guide)):
            for name, own in replicated(module).items():
                saved = parameters.get(f"{prefix}.{name}")
                if saved is None or saved.shape[1:] != own.shape:
                    found = "none" if saved is None else tuple(saved.shape[1:])
                    raise CheckpointError(
                        f"{folder}: parameter {prefix}.{name} has shape {found}, the model's {tuple(own.shape)}: "
                        "give the model and guide that the run was made with"
                    )
                with torch.no_grad():
                    own.copy_(saved[run.best])
        return run


def _load_buffers(folder: str | Path, tensors: dict[str, Tensor], **modules: nn.Module) -> None:
    for prefix, module in modules.items():
        for name, own in module.named_buffers():
            saved = tensors.get(f"{prefix}.buffers.{name}")
            if saved is None or saved.shape != own.shape:
                raise CheckpointError(
                    f"{folder}: buffer {prefix}.{name} is missing or of another shape: "
                    "give the model and guide that the run was made with"
                )
            own.copy_(saved)


def _history(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, float_precision="round_trip") if path.is_file() else pd.DataFrame()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "pyro-ppl", "numpy")}


Fitted: TypeAlias = "Run | tuple[nn.Module, nn.Module] | Sequence[tuple[nn.Module, nn.Module]]"
"""What queries take: a run, a (model, guide) trained by any means, or several of those."""


def members(fitted: Fitted) -> Iterator[tuple[Any, Any]]:
    """Model and guide of each member, one after the other."""
    if isinstance(fitted, Run):
        for k in range(len(fitted)):
            yield fitted.member(k)
    elif isinstance(fitted, tuple) and len(fitted) == 2 and isinstance(fitted[0], nn.Module):
        yield fitted[0], fitted[1]
    else:
        yield from fitted  # type: ignore[misc]
