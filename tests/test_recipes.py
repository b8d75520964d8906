from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guides import GaussianEncoder, PointEncoder
from pyro_scm import models, query
from pyro_scm.errors import CheckpointError, ModelError
from pyro_scm.infer import fit
from pyro_scm.nn import FiLM
from pyro_scm.recipes import RECIPES, Recipe, load, make, recipe
from pyro_scm.scm import IndependentSCM, LinearSCM, MechanismSCM
from tests.screens import cells, options, train

OWN = '''
from pyro_scm import models
from pyro_scm.recipes import Recipe


def wide(schema, latent=4, *, hidden=(9,)):
    """z ~ N(0, I), a wide decoder."""
    return models.vae(schema, latent=latent, hidden=hidden)


def {stem}(schema, latent=2):
    return models.vae(schema, latent=latent)


narrow = Recipe(wide, inputs=("x",), family="point", section="own")
number = 3
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(OWN.replace("{stem}", "my_model"))
    return path


# ---------------------------------------------------------------------- the table
def test_every_named_model_has_a_recipe() -> None:
    assert set(RECIPES) == set(models.__all__)
    for name, found in RECIPES.items():
        assert recipe(name) is found
        assert found.build.__name__ == name
        assert found.section


@pytest.mark.parametrize(
    ("name", "inputs", "family"),
    [
        ("ae", ("x",), PointEncoder),
        ("adversarial_prior_ae", ("x", "e"), PointEncoder),
        ("vae", ("x",), GaussianEncoder),
        ("conditional_vae", ("x", "e"), GaussianEncoder),
        ("environment_vae", ("x", "e"), GaussianEncoder),
        ("translation_vae", ("x", "e"), GaussianEncoder),
        ("structured_environment_vae", ("x", "e"), GaussianEncoder),
        ("structured_translation_vae", ("x", "e"), GaussianEncoder),
    ],
)
def test_each_guide_reads_what_its_model_asks_for(name: str, inputs: tuple[str, ...], family: type) -> None:
    _, guide = make(name, cells().schema)
    assert type(guide.local["z"]) is family
    assert guide.local["z"].inputs == inputs


def test_a_recipe_says_what_its_program_is_and_which_options_it_has() -> None:
    found = recipe("environment_vae")
    assert found.summary.startswith("z | e ~ N(mu_bar_e, diag sigma_bar_e^2);  c = z;")
    assert found.options == {
        "latent": 20, "hidden": (128,), "environment_hidden": (128,), "sparsity": "softmax", "temperature": 1.0,
        "k": 1, "scale": True, "likelihood": None, "shortcut": False, "effect_rate": 1.0,
    }  # fmt: skip


# ---------------------------------------------------------------------- making
def test_options_reach_the_model_and_the_guide() -> None:
    model, guide = make(
        "structured_environment_vae", cells().schema, latent=4, hidden=(5,), mechanism="network", depth=2,
        guide_hidden=(6, 7), conditioning="film", inputs=("x", "plate"),
    )  # fmt: skip
    assert isinstance(model.scm, MechanismSCM)
    assert model.latent == 4
    assert model.scm.widths == [2, 2]
    assert model.likelihoods[0].net[0].out_features == 5  # type: ignore[index,union-attr]
    encoder = guide.local["z"]
    assert isinstance(encoder.net, FiLM)
    assert [layer.out_features for layer in encoder.net.layers] == [6, 7]
    assert encoder.inputs == ("x", "plate")
    assert isinstance(make("structured_environment_vae", cells().schema)[0].scm, LinearSCM)
    assert isinstance(make("vae", cells().schema)[0].scm, IndependentSCM)


def test_unknown_names_and_options_are_refused() -> None:
    message = r"unknown model 'gan': use one of ae, vae, .*, decoder_only, or FILE\.py:FUNCTION"
    with pytest.raises(ModelError, match=message):
        make("gan", cells().schema)
    with pytest.raises(ModelError, match="model 'vae' has no option depth, width: it has latent, hidden, likelihood"):
        make("vae", cells().schema, depth=3, width=2, latent=3)


# ---------------------------------------------------------------------- models of the user's own
def test_a_function_in_a_file_is_a_recipe(own: Path) -> None:
    found = recipe(f"{own}:wide")
    assert isinstance(found, Recipe)
    assert found.options == {"latent": 4, "hidden": (9,)}
    assert found.summary == "z ~ N(0, I), a wide decoder."
    model, guide = make(f"{own}:wide", cells().schema, hidden=(3,))
    assert model.latent == 4
    assert guide.local["z"].inputs == ("x", "e")
    model, guide = make(f"{own}:wide", cells().schema, inputs=("x",))
    assert guide.local["z"].inputs == ("x",)


def test_the_function_is_by_default_the_one_named_as_the_file(own: Path) -> None:
    model, _ = make(str(own), cells().schema)
    assert model.latent == 2


def test_a_file_may_hold_a_whole_recipe(own: Path) -> None:
    found = recipe(f"{own}:narrow")
    assert found.section == "own"
    _, guide = make(f"{own}:narrow", cells().schema, latent=2)
    assert isinstance(guide.local["z"], PointEncoder)


def test_files_without_the_function_are_refused(own: Path) -> None:
    with pytest.raises(ModelError, match=r"my_model\.py has no function 'missing': give FILE\.py:FUNCTION"):
        recipe(f"{own}:missing")
    with pytest.raises(ModelError, match=r"my_model\.py has no function 'number'"):
        recipe(f"{own}:number")
    with pytest.raises(ModelError, match=r"nowhere\.py: no such file: give FILE\.py:FUNCTION with a function"):
        recipe("nowhere.py:wide")


# ---------------------------------------------------------------------- saved and built again
ASKED: dict[str, Any] = {"do": {"c_1": 2.0}, "environment": "env_2", "draws": 3}


@pytest.mark.parametrize("kind", ["gaussian", "negative-binomial"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_loaded_run_answers_exactly_as_the_one_that_was_saved(tmp_path: Path, name: str, kind: str) -> None:
    data = cells(kind)
    run = train(name, data, seeds=(0, 1), epochs=1)
    run.save(tmp_path)
    torch.manual_seed(123)  # nothing of the answer may hang on how the modules were built
    loaded = load(tmp_path)
    assert type(loaded.guide.local["z"]) is type(run.guide.local["z"])  # type: ignore[union-attr,index]
    some = data.subset(np.arange(0, 100, 9))
    before, after = query.counterfactual(run, some, **ASKED), query.counterfactual(loaded, some, **ASKED)
    for part in ("z", "factual_c", "c", "factual_x", "x"):
        np.testing.assert_array_equal(getattr(before, part), getattr(after, part))
    np.testing.assert_array_equal(query.predict(run, "env_1", cells=5), query.predict(loaded, "env_1", cells=5))


def test_every_option_is_remembered(tmp_path: Path) -> None:
    data = cells()
    model, guide = make(
        "structured_environment_vae", data.schema, latent=4, hidden=(), environment_hidden=[3], mechanism="network",
        depth=2, sparsity="top-k", k=2, scale=False, likelihood="student-t", conditioning="film", guide_hidden=(5, 4),
        inputs=("x", "plate"),
    )  # fmt: skip
    fit(model, guide, data, epochs=1, progress=False).save(tmp_path)
    loaded = load(tmp_path)
    assert str(loaded.model) == str(model)
    assert str(loaded.guide) == str(guide)
    assert loaded.guide.spec == guide.spec
    assert loaded.model.prior.scale is False  # type: ignore[union-attr]
    assert loaded.model.prior.sparsifier.k == 2  # type: ignore[union-attr]


def test_a_model_over_a_graph_of_the_users_own_must_be_given(tmp_path: Path) -> None:
    from pyro_scm import graphs

    def build() -> tuple[Any, Any]:
        chain = graphs.from_edges([(0, 1), (1, 2)])
        return make("structured_environment_vae", cells().schema, **options("vae"), graph=chain)

    fit(*build(), cells(), epochs=1, progress=False).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"this run's model is not one of the named models: call load\(folder,"):
        load(tmp_path)
    model, guide = build()
    loaded = load(tmp_path, model, guide)
    assert loaded.model is model
    assert loaded.model.scm.graph.number_of_edges() == 2  # type: ignore[union-attr]


def test_a_model_from_a_file_must_be_given(tmp_path: Path, own: Path) -> None:
    def build() -> tuple[Any, Any]:
        model, guide = make(f"{own}:wide", cells().schema)
        model.spec = None  # as of a model that no named function built
        return model, guide

    fit(*build(), cells(), epochs=1, progress=False).save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="not one of the named models"):
        load(tmp_path / "run")
    assert len(load(tmp_path / "run", *build())) == 1


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest\.json: give the folder of a run that was saved"):
        load(tmp_path)
