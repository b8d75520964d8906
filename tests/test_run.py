import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from pyro_scm.errors import CheckpointError, DataError
from pyro_scm.recipes import load
from pyro_scm.run import Environments, Run, Settings, members
from tests.screens import cells, fitted, make, train


# ---------------------------------------------------------------------- environments by name
def environments() -> Environments:
    return Environments.of(cells().subset(cells().env != 3))


def test_environments_are_found_by_name() -> None:
    names = list(cells().environments.index)
    assert names == ["control", "env_1", "env_2", "env_3"]
    assert [environments().index(name) for name in names] == [0, 1, 2, 3]
    assert list(environments().table["trained"]) == [True, True, True, False]
    assert "trained" not in cells().environments


def test_an_unknown_environment_is_refused_with_its_neighbours() -> None:
    with pytest.raises(DataError, match=r"no environment 'env 2' in this run: did you mean one of 'env_2'"):
        environments().index("env 2")
    with pytest.raises(DataError, match=r"no environment 'ZZZ' in this run: did you mean one of 'control', 'env_1'"):
        environments().index("ZZZ")


def test_cells_are_placed_in_a_named_environment() -> None:
    batch = cells()[:5]
    placed = environments().place(batch, "env_2")
    assert placed.env.tolist() == [2] * 5
    assert placed.perturbed.tolist() == [1]
    np.testing.assert_array_equal(placed.e.numpy(), np.tile(cells().representation[2], (5, 1)))
    assert not placed.outside
    assert batch.x is not None
    assert placed.x is batch.x
    control = environments().place(batch, "control")
    assert control.perturbed.tolist() == [0]
    assert control.env.tolist() == [0] * 5


# ---------------------------------------------------------------------- members
def test_a_member_has_its_own_parameters_in_modules_of_its_own() -> None:
    run = fitted()
    assert len(run) == 2
    for k in (0, 1):
        model, guide = run.member(k)
        for prefix, module in (("model", model), ("guide", guide)):
            for name, p in module.named_parameters():
                assert torch.equal(p, run.parameters[f"{prefix}.{name}"][k])
    changed, _ = run.member(0)
    with torch.no_grad():
        for p in changed.parameters():
            p.zero_()
    kept = dict(run.model.named_parameters())
    assert any(bool(p.any()) for p in kept.values())
    for name, p in run.member(0)[0].named_parameters():
        assert torch.equal(p, run.parameters[f"model.{name}"][0])


def test_the_best_member_is_the_one_with_the_lowest_loss() -> None:
    run = copy.copy(fitted())
    run.losses = (3.0, 2.0)
    assert run.best == 1
    run.losses = (1.0, 2.0)
    assert run.best == 0


def test_queries_take_runs_pairs_and_lists_of_pairs() -> None:
    run = fitted()
    pair = (run.model, run.guide)
    assert list(members(pair)) == [pair]
    assert list(members([pair, pair])) == [pair, pair]
    assert list(members((pair, pair))) == [pair, pair]
    of_run = list(members(run))
    assert len(of_run) == 2
    assert torch.equal(next(of_run[1][0].parameters()), next(run.member(1)[0].parameters()))


def test_moving_a_run_moves_every_tensor() -> None:
    run = copy.copy(fitted())
    run.model, run.guide = copy.deepcopy(run.model), copy.deepcopy(run.guide)
    assert run.to("meta") is run
    tensors = [*run.model.state_dict().values(), *run.guide.state_dict().values(), *run.parameters.values()]
    assert {t.device.type for t in tensors} == {"meta"}


# ---------------------------------------------------------------------- saved and read back
def assert_same_run(one: Run, other: Run) -> None:
    for module in ("model", "guide"):
        state, again = getattr(one, module).state_dict(), getattr(other, module).state_dict()
        assert state.keys() == again.keys()
        for name, value in state.items():
            assert torch.equal(value, again[name]), name
    assert one.parameters.keys() == other.parameters.keys()
    for name, value in one.parameters.items():
        assert torch.equal(value, other.parameters[name]), name
    for field in ("seeds", "schema", "settings", "stopped", "losses"):
        assert getattr(one, field) == getattr(other, field), field
    pd.testing.assert_frame_equal(one.history, other.history, check_exact=True)
    tables = one.environments.table, other.environments.table
    pd.testing.assert_frame_equal(*tables, check_exact=True, check_dtype=False)  # all-missing columns have no type
    np.testing.assert_array_equal(one.environments.representation, other.environments.representation)


def test_a_run_is_saved_and_read_back_whole(tmp_path: Path) -> None:
    run = train(seeds=(0, 1), temperature=(2.0, 0.5), validation=cells().subset(np.arange(10)), clip=None)
    assert run.save(tmp_path / "run") == tmp_path / "run"
    assert_same_run(run, load(tmp_path / "run"))


def test_annotated_environments_are_read_back_whole(tmp_path: Path) -> None:
    run = copy.copy(fitted())
    table = run.environments.table.copy()
    table["dose"] = [np.nan, 1 / 3, 1e-7, 12345.678901234567]
    table["time"] = [np.nan, 24.0, 6.0, 6.0]
    table["cell_line"] = [None, "PC3", "A549", "1"]
    table["smiles"] = [None, "CC(=O)O", "C\\C=C/C", "[Na+]"]
    table.index = pd.Index(["control", "drug 0.1 uM", "2024-01-01", "7"], name="environment")
    run.environments = Environments(table, run.environments.representation)
    run.save(tmp_path)
    loaded = load(tmp_path).environments.table
    assert list(loaded.index) == list(table.index)
    np.testing.assert_allclose(loaded["dose"].to_numpy(float), table["dose"].to_numpy(float), rtol=1e-14)
    for column in ("cell_line", "smiles", "perturbation", "targets"):
        assert [v if isinstance(v, str) else None for v in loaded[column]] == list(table[column]), column
    for column in ("is_reference", "trained"):
        assert loaded[column].dtype == bool
        assert list(loaded[column]) == list(table[column])


def test_doses_of_combinations_are_read_back(tmp_path: Path) -> None:
    run = copy.copy(fitted())
    table = run.environments.table.copy()
    table["dose"] = np.array([np.nan, 0.5, "1+0.5", 2.0], dtype=object)
    run.environments = Environments(table, run.environments.representation)
    run.save(tmp_path)
    assert list(load(tmp_path).environments.table["dose"])[1:] == [0.5, "1+0.5", 2.0]


def test_buffers_are_read_back_where_the_data_set_is_not_at_hand(tmp_path: Path) -> None:
    """The statistics of the training cells live in the modules, not in the schema."""
    run = train("vae", cells("negative-binomial"))
    run.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.schema.statistics is None
    for name in ("log_proportion", "log_depth"):
        own, again = getattr(run.model.likelihoods[0], name), getattr(loaded.model.likelihoods[0], name)  # type: ignore[index]
        assert torch.equal(own, again)
        assert bool(own.any())
    assert torch.equal(run.guide.local["z"].mean, loaded.guide.local["z"].mean)  # type: ignore[union-attr,index]


def test_loaded_modules_hold_the_best_member(tmp_path: Path) -> None:
    run = copy.copy(fitted())
    run.losses = (5.0, 4.0)
    run.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.best == 1
    for name, p in loaded.model.named_parameters():
        assert torch.equal(p, run.parameters[f"model.{name}"][1])


def test_versions_are_noted(tmp_path: Path) -> None:
    from pyro_scm.checkpoints import read

    fitted().save(tmp_path)
    _, manifest = read(tmp_path)
    assert manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert manifest["versions"].keys() == {"torch", "pyro-ppl", "numpy"}
    assert manifest["kind"] == "run"
    assert manifest["model"]["name"] == "structured_environment_vae"


def test_a_folder_without_history_still_loads(tmp_path: Path) -> None:
    fitted().save(tmp_path)
    (tmp_path / "history.csv").unlink()
    assert load(tmp_path).history.empty


# ---------------------------------------------------------------------- compositions of the user's own
class Squashed(nn.Module):
    """A decoder that no named model has."""

    def __init__(self, genes: int) -> None:
        super().__init__()
        self.net = nn.Linear(3, genes)

    def forward(self, c: Any) -> Any:
        return torch.tanh(self.net(c))


def composed() -> tuple[Any, Any]:
    model, guide = make("vae", cells().schema)
    model.likelihoods[0].net = Squashed(8)
    model.spec = None
    return model, guide


def test_a_users_composition_is_loaded_into_one_of_its_structure(tmp_path: Path) -> None:
    from pyro_scm.infer import fit

    model, guide = composed()
    run = fit(model, guide, cells(), epochs=1, progress=False)
    run.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"not one of the named models: call load\(folder, model="):
        load(tmp_path)
    again = load(tmp_path, *composed())
    assert_same_run(run, again)


def test_another_structure_is_refused_by_the_first_tensor_that_differs(tmp_path: Path) -> None:
    fitted().save(tmp_path)
    message = r"parameter model\.likelihoods\.0\.net\.0\.weight has shape \(6, 3\), the model's \(9, 3\): give"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, *make("structured_environment_vae", cells().schema, hidden=(9,)))
    message = r"parameter guide\.local\.z\.net\.layers\.0\.weight has shape none, the model's \(7, 8\)"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, *make("structured_environment_vae", cells().schema, conditioning="film"))
    with pytest.raises(CheckpointError, match=r"buffer model\.scm\.mechanisms\.0\.mask is missing or of another shape"):
        load(tmp_path, *make("structured_environment_vae", cells().schema, mechanism="network"))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    from pyro_scm.checkpoints import write

    write(tmp_path, {}, {"kind": "training"})
    with pytest.raises(CheckpointError, match=r"not a run: give the folder that `fit` or `Run\.save` wrote"):
        load(tmp_path)


def test_settings_say_how_a_run_was_trained() -> None:
    run = train("vae", epochs=2, batch_size=33, lr=0.004, schedule="cosine", temperature=0.5, weight_decay=0.25)
    expected = Settings(
        epochs=2, batch_size=33, lr=0.004, schedule="cosine", kl_weight=1.0, kl_warmup=0.1,
        temperature=(0.5, 0.5), clip=100.0,
        weight_decay=0.25, patience=None, critic_steps=1,
    )  # fmt: skip
    assert run.settings == expected
    assert {f.name for f in fields(Settings)} == set(vars(expected))
