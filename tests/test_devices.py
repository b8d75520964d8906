import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils import backend_registration

from experiments.benchmarks import gpu

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch cannot make a device in Python",
)
def test_everything_runs_on_a_device_apart_from_the_cpu() -> None:
    """All tests of `on_device.py`, in a process of their own."""
    words = [sys.executable, "-m", "pytest", "tests/on_device.py", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# ---------------------------------------------------------------------- the benchmark of GPUs
def test_the_benchmark_runs_the_same_code_on_the_cpu(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--small", "--parts", "training,ensemble,large", "--out", str(tmp_path / "gpu.csv")]
    assert gpu.main(words) == 0
    table = pd.read_csv(tmp_path / "gpu.csv")
    names = ["hand-written", "fit", "hand-written, bfloat16", "fit, bfloat16"]
    assert table["variant"].tolist() == [*names, "hand-written, in turn", "fit, together", *names]
    assert (table["ms"] > 0).all()
    assert (table.loc[table["variant"].str.startswith("hand-written"), "ratio"].iloc[[0, 2, 3]] == 1).all()
    assert "3 small models, batch 64" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "torch sees no GPU here: nothing was measured" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "nonsense"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_what_the_cpu_does() -> None:
    rows = list(gpu.agreement_rows(gpu.Bench(torch.device("cuda"), gpu.SMALL, 2, 2)))
    assert all(gpu.agrees(row) for row in rows)
