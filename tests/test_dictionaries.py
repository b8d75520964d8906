"""Vectors of perturbations and covariates: those of the program, whatever a member's rotation."""

import functools
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_scm import recipes
from pyro_scm.dictionaries import Dictionary, dictionary
from pyro_scm.effects import shifts
from pyro_scm.errors import DataError, ModelError
from pyro_scm.infer import fit
from pyro_scm.run import Run
from tests.compositions import cells

KINDS = {"cpa": "multi-dose", "chemcpa": "molecules", "multicpa": "multi-dose", "sams_vae": "multi-hot"}


@functools.cache
def fitted(name: str) -> Run:
    screen = cells(KINDS.get(name, "multi-hot"), counts=name == "multicpa")
    torch.manual_seed(0)
    own: dict[str, Any] = {"covariates": ("cell_type",)} if name in KINDS else {}
    model, guide = recipes.make(name, screen.schema, latent=3, hidden=(4,), guide_hidden=(4,), **own)
    return fit(model, guide, screen, seeds=(0, 1), epochs=1, progress=False)


def planted(members: int = 3) -> Dictionary:
    """Two families of three vectors and a lone one, in other coordinates for each member."""
    rng = np.random.default_rng(0)
    own = np.array([[1, 0.1, 0], [2, 0, 0.1], [1, 0, -0.1], [0, 1, 0.1], [0.1, 2, 0], [0, 1, -0.1], [0, 0, 3.0]])
    rotations = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(members)]
    names = pd.Index(["a1", "a2", "a3", "b1", "b2", "b3", "c"], name="name")
    table = pd.DataFrame({"kind": "perturbation", "perturbation": names, "dose": 1.0, "trained": True}, index=names)
    return Dictionary(np.stack([own @ r for r in rotations]), table, ("c_0", "c_1", "c_2"))


@pytest.mark.parametrize("name", [*KINDS, "svae_plus", "translation_vae", "environment_vae"])
def test_vectors_are_the_shifts_of_the_program(name: str) -> None:
    run = fitted(name)
    found = dictionary(run, every=True).kind("perturbation")
    expected = shifts(run).drop(index="DMSO", level="environment")
    np.testing.assert_allclose(found.frame().to_numpy(), expected.to_numpy(), rtol=1e-5, atol=1e-6)
    largest = dictionary(run).kind("perturbation")
    assert largest.names == ["A", "B", "C"]
    assert list(largest.table["dose"]) == [10, 10, 10]
    rows = [list(found.names).index(f"{n} 10 uM") for n in "ABC"]
    np.testing.assert_array_equal(largest.vectors, found.vectors[:, rows])


def test_covariates_have_vectors_about_their_mean() -> None:
    run = fitted("cpa")
    found = dictionary(run).kind("cell_type")
    assert found.names == ["cell_type=B", "cell_type=T"]
    np.testing.assert_allclose(found.vectors.sum(1), 0, atol=1e-6)
    table = run.parameters["model.shift.covariates.tables.0"].numpy()
    np.testing.assert_allclose(found.vectors[:, 1] - found.vectors[:, 0], table[:, 1] - table[:, 0], rtol=1e-5)


def test_vectors_at_another_dose() -> None:
    run = fitted("cpa")  # of linear dosers
    ten, five = (dictionary(run, dose=d).kind("perturbation") for d in (10.0, 5.0))
    np.testing.assert_allclose(five.vectors, ten.vectors / 2, rtol=1e-5)
    assert (five.table["dose"] == 5).all()


def test_members_rotations_do_not_matter() -> None:
    one, several = planted(1), planted(4)
    np.testing.assert_allclose(several.cosine(), one.cosine(), atol=1e-12)
    apart = [np.linalg.norm(d.project().to_numpy()[:, None] - d.project().to_numpy(), axis=-1) for d in (one, several)]
    np.testing.assert_allclose(apart[1], 2 * apart[0], atol=1e-9)  # four members side by side: twice as long
    assert sum(several.project().attrs["explained"]) <= 1 + 1e-9


def test_neighbours_are_of_the_family() -> None:
    found = planted().neighbours(2)
    for family in "ab":
        own = found[found["name"].str.startswith(family)]
        assert own["neighbour"].str.startswith(family).all()
        assert (own["cosine"] > 0.9).all()
        assert (own["agree"] == 1).all()
    assert (found.groupby("name").size() == 2).all()
    assert (found["low"] <= found["cosine"] + 1e-12).all()


def test_members_that_disagree_are_said_to() -> None:
    one = planted(3)
    vectors = one.vectors.copy()
    vectors[1, 0] = vectors[1, 3]  # the second member has a1 among the b
    found = replace(one, vectors=vectors).neighbours(1).set_index("name")
    assert found.loc["a1", "agree"] == pytest.approx(2 / 3)


def test_a_users_table_is_found_by_name_whatever_its_spelling() -> None:
    annotation = pd.DataFrame({"moa": [None, "kinase", "hdac"], "year": [1, 2, 3]}, index=["A_1", "a-1", "B 2"])
    found = planted().annotate(annotation)
    assert found.table["moa"].loc["a1"] == "kinase"  # the first that is not missing
    assert found.table["moa"].loc["b2"] == "hdac"
    assert found.table["moa"].isna().sum() == 5
    assert found.annotate(annotation).table.columns.is_unique
    with pytest.raises(DataError, match="none of the 7 entries is in the annotation"):
        planted().annotate(annotation.set_axis(["x", "y", "z"]))


@pytest.mark.parametrize("colour", [None, "moa", "dose"])
def test_the_map_shows_every_entry(colour: str | None) -> None:
    found = planted().annotate(pd.DataFrame({"moa": ["one", "two"]}, index=["a1", "b1"]))
    axes = found.figure(colour).axes[0]
    assert sum(len(c.get_offsets()) for c in axes.collections) == 7
    assert {t.get_text() for t in axes.texts} >= set(found.names)
    assert "principal component 1 (" in axes.get_xlabel()
    with pytest.raises(DataError, match="no column 'mechanism'"):
        found.figure("mechanism")


def test_the_heat_map_keeps_families_together() -> None:
    axes = planted().heatmap().axes[0]
    order = "".join(t.get_text()[0] for t in axes.get_xticklabels())
    assert "aaa" in order
    assert "bbb" in order
    assert axes.images[0].get_array().shape == (7, 7)


def test_projections_that_cannot_be_made_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="unknown projection 'tsne': use 'pca' or 'umap'"):
        planted().project("tsne")
    with pytest.raises(DataError, match="member 9: there are members 0 to 2"):
        planted().project(member=9)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ModelError, match="install umap-learn"):
        planted().project("umap")


def test_models_without_effects_are_refused() -> None:
    with pytest.raises(ModelError, match="environments move no latents"):
        dictionary(fitted("vae"))
    with pytest.raises(DataError, match="no entries of kind 'donor': there are 'perturbation'"):
        planted().kind("donor")
