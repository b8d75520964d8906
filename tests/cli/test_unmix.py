"""`pyro-scm unmix` against the same in Python."""

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest

from pyro_scm.data import synthetic
from pyro_scm.effects import shifts
from pyro_scm.recipes import load
from pyro_scm.unmixing import unmix

Works = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, works_once: Callable[..., None]) -> Path:
    where = tmp_path_factory.mktemp("unmix")
    words = "--latent 3 --genes 12 --environments 9 --cells 40 --decoder linear"
    works_once("simulate", *words.split(), "--out", where / "sim.h5ad")
    words = "--model translation_vae --environment perturbation --control control --latent 3 --epochs 4 --seeds 2"
    works_once("fit", where / "sim.h5ad", *words.split(), "--option", "sparsity=dense", "--out", where / "run")
    return where


def test_the_new_run_is_the_librarys(works: Works, folder: Path) -> None:
    printed = works("unmix", folder / "run", folder / "sim.h5ad", "--out", folder / "turned")
    assert "starts that agree" in printed
    cells = synthetic.dataset(anndata.read_h5ad(folder / "sim.h5ad"))
    expected = unmix(load(folder / "run"), cells)
    found = load(folder / "turned")
    assert np.allclose(shifts(found), shifts(expected), atol=1e-3)
    assert "z" in works("embed", folder / "turned", folder / "sim.h5ad", "--out", folder / "e.h5ad")


def test_refined_runs_report_their_loss(works: Works, folder: Path) -> None:
    printed = works(
        "unmix", folder / "run", folder / "sim.h5ad", "--oblique", "0.3", "--refine", "2", "--out", folder / "r"
    )
    assert "loss" in printed.splitlines()[0]
    assert load(folder / "r").settings.epochs == 2


def test_options_are_the_librarys(works: Works, folder: Path) -> None:
    words = ("--rank", "2", "--offset", "--scales", "--prior", "spike-slab", "--refine", "1")
    printed = works("unmix", folder / "run", folder / "sim.h5ad", *words, "--out", folder / "options")
    header, first, *_ = printed.splitlines()
    assert "stable latents" in header
    assert first.split()[3] == "2"  # rank
    assert "penalties.effects.raw" in load(folder / "options").parameters
    works("unmix", folder / "run", folder / "sim.h5ad", "--rank", "auto", "--out", folder / "auto")


def test_a_run_is_not_replaced_by_its_own(fails: Callable[..., str], folder: Path) -> None:
    assert "this is the run itself" in fails("unmix", folder / "run", folder / "sim.h5ad", "--out", folder / "run")
