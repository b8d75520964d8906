"""Processes that train one model together, each on its share of every batch: what they need of an engine.

The engines are others': torch's DistributedDataParallel under ``torchrun``, or Lightning Fabric.
"""

import atexit
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_scm.errors import ModelError, TrainingError

__all__ = ["Ranks", "is_first", "launch", "ranks"]

# Sums of the weights may differ by this share between kinds of machines, never by more.
_TOLERANCE = 1e-6
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """One process, alone. The other kinds override what needs others.

    Each process sees a contiguous share of the cells of every batch. Its loss is weighted by its number of cells, so
    that the mean over processes, which is what the engines take of gradients, is the gradient of the whole batch.
    """

    index = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks to people."""
        return self.index == 0

    def share(self, cells: int) -> tuple[slice, float]:
        """Which of a batch's cells are this process's, and the weight of its loss.

        A process without cells looks at the first one with weight 0: engines wait for a gradient of every process.
        """
        own = np.array_split(np.arange(cells), self.size)[self.index]
        if not len(own):
            return slice(0, 1), 0.0
        return slice(int(own[0]), int(own[-1]) + 1), len(own) * self.size / cells

    def device(self, asked: torch.device) -> torch.device:
        """The device of this process."""
        return asked

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose forward must be called, so that gradients become means over processes."""
        return module

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss that came out of a wrapped module."""
        loss.backward()

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over processes."""
        return values

    def wait(self) -> None:
        """Until all processes are here."""

    def require_same(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse to go on when processes hold different weights: nothing else would ever tell.

        Raises:
            TrainingError: names the first parameter that differs.
        """
        sums = torch.stack([torch.stack((p.detach().double().sum(), p.detach().double().square().sum()))
                            for p in parameters.values()])  # fmt: skip
        mean = self.sum(sums) / self.size
        apart = ((sums - mean).abs() > _TOLERANCE * (mean.abs() + 1)).any(1)
        if bool(self.sum(apart.double()).any()):
            names = [name for name, bad in zip(parameters, self.sum(apart.double()).tolist(), strict=True) if bad]
            raise TrainingError(
                f"processes hold different weights (parameter {names[0]}): start all of them from the same data and "
                "options, and change no parameter outside of the training"
            )


class _Torch(Ranks):
    """Processes that ``torchrun`` started, with torch's own DistributedDataParallel."""

    def __init__(self, asked: torch.device) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("nccl" if asked.type == "cuda" else "gloo")
            atexit.register(_leave)
        self.index, self.size = dist.get_rank(), dist.get_world_size()

    def device(self, asked: torch.device) -> torch.device:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if asked.type == "cuda" else asked

    def wrap(self, module: nn.Module) -> nn.Module:
        # a static graph allows parameters that no loss depends on
        return nn.parallel.DistributedDataParallel(module, static_graph=True)

    def sum(self, values: Tensor) -> Tensor:
        import torch.distributed as dist

        total = values.clone()
        dist.all_reduce(total)
        return total

    def wait(self) -> None:
        import torch.distributed as dist

        dist.barrier()


class _Fabric(Ranks):
    """Processes that a Lightning Fabric launched."""

    def __init__(self, fabric: Any) -> None:
        self.fabric = fabric
        self.index, self.size = int(fabric.global_rank), int(fabric.world_size)

    def device(self, asked: torch.device) -> torch.device:
        return torch.device(self.fabric.device)

    def wrap(self, module: nn.Module) -> nn.Module:
        wrapped: nn.Module = self.fabric.setup_module(module)
        return wrapped

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(loss)

    def sum(self, values: Tensor) -> Tensor:
        total: Tensor = self.fabric.all_reduce(values.clone(), reduce_op="sum")
        return total

    def wait(self) -> None:
        self.fabric.barrier()


def ranks(asked: torch.device, fabric: Any = None) -> Ranks:
    """The processes that train together: those of a Fabric, those of ``torchrun``, or this one alone.

    Args:
        asked: device.
        fabric: a `lightning.fabric.Fabric` that has been launched.
    """
    if fabric is not None:
        return _Fabric(fabric)
    if _under_torchrun():
        return _Torch(asked)
    return Ranks()


def is_first(fabric: Any = None) -> bool:
    """Whether this process is the one that writes files and speaks to people."""
    if fabric is not None:
        return int(fabric.global_rank) == 0
    return not _under_torchrun() or int(os.environ["RANK"]) == 0


def _under_torchrun() -> bool:
    return all(name in os.environ for name in _TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def launch(devices: int | str = "auto", nodes: int = 1, device: str = "auto") -> Any:
    """Start one process a device with Lightning Fabric, each running this program from its start; pass it to `fit`.

    On several nodes start the program on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK set, or under Slurm.

    Args:
        devices: processes on each node.
        nodes: number of nodes.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``.

    Returns:
        A `lightning.fabric.Fabric`.

    Raises:
        ModelError: Fabric is not installed, or there are not so many devices.
    """
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
        from lightning_fabric.utilities.exceptions import MisconfigurationException
    except ImportError as error:
        raise ModelError(
            f"Lightning Fabric cannot be imported ({error}): install pyro-scm[distributed], or use torchrun"
        ) from error
    kind = {"cuda": "gpu"}.get(device, device)
    try:
        fabric = Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy=DDPStrategy(static_graph=True))
        fabric.launch()
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise ModelError(f"{devices} devices on {nodes} nodes cannot be used: {error}") from error
    return fabric


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
