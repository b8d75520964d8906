import pytest
import torch

from pyro_scm.batch import Batch
from pyro_scm.errors import ModelError
from pyro_scm.nn import mlp
from pyro_scm.priors import Dense, EnvironmentPrior, SparseSoftmax, TopK
from pyro_scm.regimes import TableRegime
from pyro_scm.shifts import EnvironmentShift, LinearShift


def cells() -> Batch:
    """Four cells; row 0 of r is a reference with a representation of its own."""
    return Batch(
        index=torch.arange(4),
        env=torch.tensor([2, 0, 1, 2]),
        row=torch.tensor([2, 0, 1, 2]),
        r=torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 2.0]]),
        perturbed=torch.tensor([0.0, 1.0, 1.0]),
        total=4,
    )


def test_a_shift_is_the_sparsified_output_of_its_network() -> None:
    net = mlp(2, (5,), 3)
    shift = EnvironmentShift(net, SparseSoftmax(0.3))
    v = net(cells().r)
    expected = v * torch.softmax(v.abs() / 0.3, -1)
    expected[0] = 0
    torch.testing.assert_close(shift(cells()), expected[[2, 0, 1, 2]])
    loc, scale = shift.moments(cells().r, cells().perturbed)
    torch.testing.assert_close(loc, expected)
    assert (scale == 1).all()


def test_the_reference_is_not_shifted_and_every_other_environment_is() -> None:
    moved = EnvironmentShift(mlp(2, (5,), 3))(cells())
    assert (moved[1] == 0).all()
    assert (moved[[0, 2, 3]] != 0).all()
    assert torch.equal(moved[0], moved[3])
    assert ((EnvironmentShift(mlp(2, (5,), 3), TopK(1))(cells()) != 0).sum(-1) == torch.tensor([1, 0, 1, 1])).all()


def test_a_shift_moves_as_the_prior_of_the_same_network_does() -> None:
    net = mlp(2, (5,), 3)
    prior = EnvironmentPrior(net, 3, scale=False)
    torch.testing.assert_close(EnvironmentShift(net)(cells()), prior(cells()).base_dist.loc)


def test_the_network_is_evaluated_once_for_each_distinct_environment() -> None:
    net = mlp(2, (), 3)
    rows: list[int] = []
    net.register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    EnvironmentShift(net, Dense())(cells())
    assert rows == [3]


def test_linear_shifts_add() -> None:
    shift = LinearShift(2, 3)
    with torch.no_grad():
        shift.effects.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]]))
    assert shift(cells()).tolist() == [[2, 4, -1], [0, 0, 0], [1, 0, -1], [2, 4, -1]]
    loc, scale = shift.moments(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.ones(3))
    torch.testing.assert_close(loc[0] + loc[1], loc[2])
    assert (scale == 1).all()


def test_linear_shifts_are_drawn_small_and_anew() -> None:
    shift = LinearShift(100, 40)
    assert float(shift.effects.detach().std()) == pytest.approx(0.1, rel=0.05)
    before = shift.effects.detach().clone()
    shift.reset_parameters()
    assert (shift.effects != before).all()


def test_a_regime_looks_up_the_gain_of_each_cell_s_environment() -> None:
    gain = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, -1.0]])
    regime = TableRegime(gain)
    assert regime(cells()).tolist() == [[1, -1], [1, 1], [0, 1], [1, -1]]
    assert list(regime.parameters()) == []
    assert regime(cells()).dtype == torch.float32
    assert TableRegime(gain.double()).gain.dtype == torch.float32
    gain.zero_()
    assert (regime.gain != 0).any()


def test_a_regime_knows_no_environment_outside_its_table() -> None:
    with pytest.raises(ModelError, match="keeps a table of environments"):
        TableRegime(torch.ones(3, 2))(cells().under(torch.zeros(2)))
