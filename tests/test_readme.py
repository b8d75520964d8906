"""The README's programs run as they stand."""

import re
from pathlib import Path

import numpy as np
import pytest

import pyro_scm as ps
from pyro_scm.data import synthetic
from tests.documents import blocks

README = Path(__file__).parents[1] / "README.md"


def test_example_runs_and_answers() -> None:
    example, sparse, _, grid = blocks(README)
    namespace: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), namespace)
    worlds, run, idata = namespace["worlds"], namespace["run"], namespace["idata"]
    assert np.allclose(worlds.c[..., 3], 2.0)
    assert not np.allclose(worlds.factual_c[..., 3], 2.0)
    assert len(run) == 3
    assert dict(idata.posterior.sizes) == {"chain": 3, "draw": 100, "cell": 20, "node": 4}
    exec(compile(grid, "README.md", "exec"), namespace)
    summary = namespace["run"].summary()
    assert len(summary) == 20
    assert len(summary[["seed", "lr", "kl_weight"]].drop_duplicates()) == 20
    exec(compile(sparse, "README.md", "exec"), namespace)
    assert "effects" in namespace["run"].history  # it was trained on under the sparse prior


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    _, _, model, _ = blocks(README)
    path = tmp_path / "my_model.py"
    path.write_text(model)
    return path


def test_added_model_keeps_the_contract_and_trains(model_file: Path) -> None:
    from guides import amortise
    from pyro_scm.recipes import recipe

    cells = synthetic.dataset(ps.simulate(latent=3, genes=10, environments=4, cells=30, decoder="linear"))
    model = recipe(f"{model_file}:offset_vae").build(cells.schema, latent=3)
    guide = amortise(model, cells)
    ps.check(model, guide, cells.batch(np.arange(0, 120, 7)))
    run = ps.fit(model, guide, cells, seeds=(0, 1), epochs=15, lr=1e-2, progress=False)
    losses = run.history.groupby("epoch")["loss"].mean()
    assert losses.iloc[-1] < losses.iloc[0] - 1


def test_added_model_works_on_the_command_line(model_file: Path, tmp_path: Path) -> None:
    from pyro_scm.cli import main

    screen = tmp_path / "sim.h5ad"
    sizes = ["--latent", "3", "--genes", "8", "--environments", "4", "--cells", "20"]
    assert main(["simulate", *sizes, "--out", str(screen)]) == 0
    arguments = [
        "--environment",
        "perturbation",
        "--control",
        "control",
        "--latent",
        "3",
        "--epochs",
        "1",
        "--seeds",
        "2",
    ]
    out = tmp_path / "run"
    assert main(["fit", str(screen), "--model", f"{model_file}:offset_vae", *arguments, "--out", str(out)]) == 0
    assert (out / "manifest.json").is_file()


def test_every_named_model_and_module_of_the_layout_exists() -> None:
    from pyro_scm.recipes import RECIPES

    text = README.read_text()
    listed = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    assert listed == list(RECIPES)
    root = README.parent
    layout = text.split("## Layout")[1].split("## Licence")[0]
    for name in re.findall(r"\b(\w+\.py)\b", layout):
        assert (root / "pyro_scm" / name).is_file(), name
