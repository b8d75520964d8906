"""A program that several processes run together: fits models and saves the runs; tests/test_parallel.py compares them.

Arguments: a folder to write to, and the names of cases. With FABRIC set, Lightning Fabric starts so many processes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_scm import checkpoints, parallel, training
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import TrainingError
from pyro_scm.infer import fit
from pyro_scm.objectives import Adversary, ImportanceWeighted, Objective
from pyro_scm.recipes import RECIPES
from pyro_scm.run import Run
from pyro_scm.training import Trainer
from tests.screens import cells, make

CASES: dict[str, dict[str, Any]] = {
    **{name: {} for name in RECIPES},
    "ensemble": {"seeds": (0, 1, 2), "lr": (0.01, 0.003, 0.01), "temperature": (2.0, 0.5)},
    "counts": {"kind": "negative-binomial", "batch_size": 37},
    "adversary": {"critic_steps": 2},
    "particles": {"objective": ImportanceWeighted(3)},
    "validated": {"patience": 12},
    "unused": {},
}


class Unused(nn.Module):
    """A guide with a parameter that no loss depends on."""

    def __init__(self, guide: nn.Module) -> None:
        super().__init__()
        self.guide, self.idle = guide, nn.Linear(2, 2)

    def forward(self, batch: Any) -> Any:
        return self.guide.forward(batch)


def run(case: str, folder: Path | None = None, fabric: Any = None) -> Run:
    """68 steps: 4 batches of 100 cells in each of 17 epochs, the last batch of one cell."""
    options: dict[str, Any] = {"batch_size": 33, "lr": 0.01, "epochs": 17, **CASES[case]}
    data: EnvironmentDataset = cells(options.pop("kind", "gaussian"))
    model, guide = make(case if case in RECIPES else "environment_vae", data.schema)
    if case == "adversary":
        options["objective"] = Objective(penalties={"adversary": Adversary(nn.Linear(3, 4), weight=0.1)})
    if case == "unused":
        guide = Unused(guide)
    validation = None
    if case == "validated":
        data, validation = data.subset(data.env != 2), data.subset(data.env == 2)
    return fit(
        model, guide, data, validation=validation, checkpoint=folder, progress=False, device="cpu", fabric=fabric,
        **options,
    )  # fmt: skip


class Interrupted(Exception):
    """Stands for machines that go away."""


def interrupted(folder: Path, fabric: Any) -> None:
    """A training that breaks off in its tenth epoch, after a checkpoint; then the same again, to its end."""
    one_epoch, every = Trainer._one_epoch, training.Trainer.train

    def breaking(self: Trainer) -> None:
        if self.epoch == 9:
            raise Interrupted
        one_epoch(self)

    training.Trainer.train = lambda self, f, _, p: every(self, f, 4, p)  # type: ignore[method-assign]
    Trainer._one_epoch = breaking  # type: ignore[method-assign]
    try:
        run("ensemble", folder, fabric)
    except Interrupted:
        pass
    finally:
        Trainer._one_epoch = one_epoch  # type: ignore[method-assign]
    assert json.loads((folder / "training" / "manifest.json").read_text())["epoch"] == 8
    run("ensemble", folder, fabric)


def diverging(folder: Path) -> None:
    """One process changes a weight behind the back of the training."""
    update = Trainer._update

    def tampering(self: Trainer, *args: Any) -> None:
        update(self, *args)
        if self.ranks.index == 1 and self.steps == 2:
            with torch.no_grad():
                self.ensemble.parameters["guide.local.z.net.parts.0.weight"][0, 0, 0] += 0.01

    Trainer._update = tampering  # type: ignore[method-assign]
    try:
        run("vae")
        text = "nothing was noticed"
    except TrainingError as error:
        text = str(error)
    finally:
        Trainer._update = update  # type: ignore[method-assign]
    checkpoints.write_text(folder / f"diverging.{os.environ['RANK']}.txt", text)


def first_gradients() -> dict[str, Tensor]:
    """Gradients of the first step as the optimiser gets them: Adam would hide a wrong scale of all of them."""
    found: dict[str, Tensor] = {}
    update = Trainer._update

    def keeping(self: Trainer, side: Any, *args: Any) -> None:
        if not found:
            found.update({n: p.grad.clone() for n, p in zip(side.names, side.own, strict=True)})
        update(self, side, *args)

    Trainer._update = keeping  # type: ignore[method-assign]
    try:
        run("structured_environment_vae")
    finally:
        Trainer._update = update  # type: ignore[method-assign]
    return found


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    fabric = parallel.launch(int(os.environ["FABRIC"]), device="cpu") if "FABRIC" in os.environ else None
    written: list[str] = []
    write = checkpoints.write

    def counted(path: Any, *args: Any) -> None:
        written.append(str(path))
        write(path, *args)

    checkpoints.write = counted
    for case in cases:
        if case == "interrupted":
            interrupted(folder / case, fabric)
        elif case == "diverging":
            diverging(folder)
        elif case == "gradients":
            found = first_gradients()
            if parallel.is_first(fabric):
                write(folder / case, found, {"kind": "gradients"})
        else:
            run(case, folder / case, fabric)
    rank = fabric.global_rank if fabric else os.environ["RANK"]
    checkpoints.write_text(folder / f"written.{rank}.json", json.dumps(written))


if __name__ == "__main__":
    main()
