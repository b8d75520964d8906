import json

import pytest
import torch

from pyro_scm.batch import Batch, Schema, Statistics
from pyro_scm.errors import DataError


def batch() -> Batch:
    """Three cells in two environments, the first of which is a reference."""
    return Batch(
        index=torch.tensor([4, 7, 9]),
        env=torch.tensor([0, 3, 0]),
        row=torch.tensor([0, 1, 0]),
        r=torch.tensor([[0.0, 0.0], [1.0, 2.0]]),
        perturbed=torch.tensor([0.0, 1.0]),
        total=12,
        x=torch.arange(6.0).reshape(3, 2),
        y=torch.ones(3, 1),
        size=torch.tensor([1.0, 5.0, 9.0]),
        covariates={"batch": torch.tensor([0, 1, 1])},
    )


def schema() -> Schema:
    return Schema(
        genes=("a", "b", "c"),
        environments=("control", "A"),
        features=("f",),
        counts=True,
        covariates={"batch": ("one", "two")},
        proteins=("p",),
        cells=7,
    )


def test_each_cell_has_the_representation_of_its_environment() -> None:
    assert batch().e.tolist() == [[0, 0], [1, 2], [0, 0]]
    assert len(batch()) == 3


def test_unobserved_cells_keep_everything_but_what_was_measured() -> None:
    cells = batch().unobserved()
    assert cells.x is None
    assert cells.y is None
    assert cells.size is not None
    assert cells.size.tolist() == [1, 5, 9]
    assert cells.index.tolist() == [4, 7, 9]


def test_cells_under_one_other_environment() -> None:
    cells = batch().under(torch.tensor([3.0, 4.0]))
    assert cells.r.tolist() == [[3, 4]]
    assert cells.e.tolist() == [[3, 4]] * 3
    assert cells.env.tolist() == [-1] * 3
    assert cells.row.tolist() == [0] * 3
    assert cells.perturbed.tolist() == [1]
    assert cells.index.tolist() == [4, 7, 9]
    assert cells.x is not None
    assert cells.x.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_cells_under_a_reference_environment_of_the_table() -> None:
    cells = batch().under(torch.zeros(2, dtype=torch.float64), env=2, perturbed=False)
    assert cells.env.tolist() == [2] * 3
    assert cells.perturbed.tolist() == [0]
    assert cells.r.dtype == torch.float32


def test_an_environment_of_another_width_is_refused() -> None:
    with pytest.raises(DataError, match=r"represented by 2 features, got shape \(3,\): give a vector"):
        batch().under(torch.zeros(3))


def test_moving_keeps_all_values() -> None:
    before, after = batch(), batch().to("cpu")
    for name in ("index", "env", "row", "r", "perturbed", "x", "y", "size"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert torch.equal(before.covariates["batch"], after.covariates["batch"])
    assert after.total == 12
    assert batch().unobserved().to("cpu").x is None


def test_moving_reaches_every_tensor() -> None:
    moved = batch().to("meta")
    tensors = [v for v in vars(moved).values() if isinstance(v, torch.Tensor)] + list(moved.covariates.values())
    assert len(tensors) == 9
    assert {t.device.type for t in tensors} == {"meta"}


def test_a_schema_survives_json() -> None:
    again = Schema.from_json(json.loads(json.dumps(schema().as_json())))
    assert again == schema()
    assert again.covariates["batch"] == ("one", "two")


def test_statistics_are_neutral_where_none_are_known() -> None:
    summary = schema().summary
    assert summary.mean.tolist() == [0, 0, 0]
    assert summary.scale.tolist() == [1, 1, 1]
    torch.testing.assert_close(summary.proportion, torch.full((3,), 1 / 3))
    assert summary.depth == 1


def test_known_statistics_are_kept_but_do_not_tell_schemas_apart() -> None:
    own = Statistics(torch.ones(3), torch.ones(3), torch.ones(3) / 3, 100.0)
    with_own = Schema(**{**vars(schema()), "statistics": own})
    assert with_own.summary is own
    assert with_own == schema()


def test_an_example_has_the_sizes_of_its_schema() -> None:
    cells = Batch.example(schema(), cells=3)
    assert len(cells) == 3
    assert cells.r.shape == (1, 1)
    assert cells.x is not None
    assert cells.y is not None
    assert cells.size is not None
    assert cells.x.shape == (3, 3)
    assert cells.y.shape == (3, 1)
    assert cells.size.tolist() == [1, 1, 1]
    assert cells.total == 7
    assert cells.covariates["batch"].tolist() == [0, 0, 0]


def test_an_example_of_continuous_data_has_no_library_size_or_proteins() -> None:
    cells = Batch.example(Schema(genes=("a",), environments=("e",), features=(), counts=False), cells=2)
    assert cells.size is None
    assert cells.y is None
    assert cells.total == 2


def test_the_plate_scales_a_mini_batch_to_all_cells() -> None:
    import pyro
    import pyro.distributions as dist
    from pyro.poutine import trace

    def model() -> None:
        with batch().plate():
            pyro.sample("z", dist.Normal(0.0, 1.0))

    site = trace(model).get_trace().nodes["z"]
    assert site["value"].shape == (3,)
    assert site["scale"] == pytest.approx(12 / 3)
