"""Two processes over gloo train what one process trains; each trap of data parallelism has a test."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from pyro_scm import checkpoints, parallel
from pyro_scm.errors import ModelError, TrainingError
from pyro_scm.parallel import Ranks
from tests.parallel_fit import CASES, first_gradients, run

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.parallel_fit")


def together(words: tuple[str, ...], folder: Path, *cases: str, **environment: str) -> None:
    """Run the program in several processes."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, *words, str(folder), *cases],
        cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    together(TORCHRUN, folder, *CASES, "interrupted", "gradients", "diverging")
    return folder


def parameters(folder: Path) -> dict[str, Tensor]:
    tensors, _ = checkpoints.read(folder)
    return {name.removeprefix("parameters."): v for name, v in tensors.items() if name.startswith("parameters.")}


def assert_same(folder: Path, alone: Any, tolerance: float = 1e-6) -> None:
    found = parameters(folder)
    assert found.keys() == alone.parameters.keys()
    apart = {name: float((found[name] - value).abs().max()) for name, value in alone.parameters.items()}
    assert max(apart.values()) <= tolerance, apart
    history = pd.read_csv(folder / "history.csv")
    columns = [name for name in history if name != "seconds"]
    np.testing.assert_allclose(history[columns], alone.history[columns], rtol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(two: Path, case: str) -> None:
    torch.set_num_threads(1)
    alone = run(case)
    assert alone.history["epoch"].max() * 4 >= 50  # steps
    # Adam divides by the size of gradients: what rounding does to a drug's network, whose are tiny, grows with it
    assert_same(two / case, alone, 1e-5 if case == "chemcpa" else 1e-6)


def test_gradients_are_those_of_one_process_not_a_multiple(two: Path) -> None:
    found, _ = checkpoints.read(two / "gradients")
    for name, expected in first_gradients().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_a_training_that_broke_off_goes_on_as_if_it_had_not(two: Path) -> None:
    found, expected = parameters(two / "interrupted"), parameters(two / "ensemble")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_checkpoints_are_written_once(two: Path) -> None:
    written = [json.loads((two / f"written.{rank}.json").read_text()) for rank in (0, 1)]
    assert len(written[0]) > 2 * len(CASES)
    assert written[1] == []


def test_processes_that_part_are_stopped(two: Path) -> None:
    for rank in (0, 1):
        text = (two / f"diverging.{rank}.txt").read_text()
        assert "processes hold different weights (parameter guide.local.z.net.parts.0.weight)" in text


def test_fabric_trains_what_one_process_does(tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric", reason="pyro-scm[distributed] is not installed")
    together(("-m", "tests.parallel_fit"), tmp_path, "ensemble", "adversary", FABRIC="2")
    for case in ("ensemble", "adversary"):
        assert_same(tmp_path / case, run(case))
    assert json.loads((tmp_path / "written.1.json").read_text()) == []


def test_the_command_line_trains_on_several_devices(tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric", reason="pyro-scm[distributed] is not installed")
    data = tmp_path / "sim.h5ad"

    def verb(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pyro_scm", *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    verb("simulate", "--latent", "3", "--genes", "12", "--environments", "4", "--cells", "25", "--out", str(data))
    words = ("fit", str(data), "--model", "vae", "--environment", "perturbation", "--control", "control", "--latent",
             "3", "--epochs", "3", "--seeds", "1", "--batch-size", "33", "--device", "cpu")  # fmt: skip
    verb(*words, "--out", str(tmp_path / "one"))
    said = verb(*words, "--devices", "2", "--out", str(tmp_path / "two"))
    assert said.count("run saved in") == 1
    one, two = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    assert max(float((two[name] - value).abs().max()) for name, value in one.items()) <= 1e-6


# ---------------------------------------------------------------------- shares
class Several(Ranks):
    def __init__(self, index: int, size: int) -> None:
        self.index, self.size = index, size


@pytest.mark.parametrize(("cells", "size"), [(10, 1), (10, 3), (2, 3), (1, 4), (33, 2)])
def test_shares_cover_a_batch_and_their_weights_are_its_means(cells: int, size: int) -> None:
    shares = [Several(index, size).share(cells) for index in range(size)]
    rows = np.arange(cells)
    covered = np.concatenate([rows[part] for part, weight in shares if weight])
    assert covered.tolist() == rows.tolist()
    assert all(len(rows[part]) >= 1 for part, _ in shares)
    values = np.random.default_rng(0).normal(size=cells)
    assert np.mean([weight * values[part].mean() for part, weight in shares]) == pytest.approx(values.mean())


def test_one_process_needs_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = parallel.ranks(torch.device("cpu"))
    module = torch.nn.Linear(2, 2)
    assert type(ranks) is Ranks
    assert ranks.wrap(module) is module
    assert ranks.first
    assert parallel.is_first()
    for name in parallel._TORCHRUN:
        monkeypatch.setenv(name, "1")
    assert type(parallel.ranks(torch.device("cpu"))) is Ranks  # a world of one
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not parallel.is_first()


def test_weights_that_differ_by_rounding_are_the_same_weights() -> None:
    class Pair(Ranks):
        """Sums with a process whose sums are given."""

        size = 2

        def __init__(self, other: float) -> None:
            self.other = other

        def sum(self, values: Tensor) -> Tensor:
            return values + values * self.other if values.dim() == 2 else values

    weights = {"a": torch.ones(3), "b": torch.full((2,), 5.0)}
    Pair(1.0).require_same(weights)
    Pair(1 + 1e-7).require_same(weights)
    with pytest.raises(TrainingError, match="parameter a"):
        Pair(1.001).require_same(weights)


def test_without_fabric_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(ModelError, match=r"install pyro-scm\[distributed\], or use torchrun"):
        parallel.launch(2)
