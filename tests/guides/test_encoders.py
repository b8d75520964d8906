import math
from collections.abc import Sequence

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from guides import GaussianEncoder, PointEncoder
from pyro_scm.batch import Batch, Schema, Statistics
from pyro_scm.errors import ModelError
from pyro_scm.nn import FiLM

MEAN, SPREAD = torch.tensor([0.5, 1.0, 0.0]), torch.tensor([2.0, 0.5, 1.0])


def schema(counts: bool = False) -> Schema:
    return Schema(
        genes=("a", "b", "c"),
        environments=("control", "A"),
        features=("f", "g"),
        counts=counts,
        covariates={"plate": ("one", "two", "three")},
        cells=2,
        statistics=Statistics(MEAN, SPREAD, torch.full((3,), 1 / 3), depth=12.0),
    )


def batch(x: list[list[float]], counts: bool = False) -> Batch:
    return Batch(
        index=torch.arange(2),
        env=torch.tensor([1, 0]),
        row=torch.tensor([1, 0]),
        r=torch.tensor([[0.0, 0.0], [3.0, -4.0]]),
        perturbed=torch.tensor([0.0, 1.0]),
        total=2,
        x=torch.tensor(x),
        size=torch.tensor([6.0, 24.0]) if counts else None,
        covariates={"plate": torch.tensor([2, 0])},
    )


class Seen(nn.Module):
    """Stands for an encoder's network: keeps what it is shown."""

    def __init__(self, outputs: Tensor | None = None) -> None:
        super().__init__()
        self.outputs = outputs
        self.inputs: list[Tensor] = []

    def forward(self, *inputs: Tensor, rows: Sequence[Tensor | None]) -> Tensor:
        each = [value if row is None else value[row] for value, row in zip(inputs, rows, strict=True)]
        self.inputs = [torch.cat(each, -1)]
        return torch.zeros(2, 4) if self.outputs is None else self.outputs


def seen(encoder: GaussianEncoder, cells: Batch) -> list[Tensor]:
    encoder.net = Seen()
    encoder(cells)
    return encoder.net.inputs


# ---------------------------------------------------------------------- what the network is shown
def test_continuous_expression_is_standardised_by_the_training_cells() -> None:
    (shown,) = seen(GaussianEncoder(schema(), 2, inputs=("x",)), batch([[2.5, 1.0, -1.0], [0.5, 0.0, 7.0]]))
    torch.testing.assert_close(shown, torch.tensor([[1.0, 0.0, -1.0], [0.0, -2.0, 7.0]]))


def test_counts_are_normalised_to_the_training_depth_and_logged_before_they_are_standardised() -> None:
    (shown,) = seen(GaussianEncoder(schema(True), 2, inputs=("x",)), batch([[1, 2, 3], [4, 8, 12]], counts=True))
    # the first cell has 6 counts, the second 24: to a depth of 12 they are scaled by 2 and by 1/2
    logged = np.log1p([[2.0, 4.0, 6.0], [2.0, 4.0, 6.0]])
    expected = (logged - MEAN.numpy()) / SPREAD.numpy()
    np.testing.assert_allclose(shown.numpy(), expected, rtol=1e-6)


def test_counts_of_cells_without_a_library_size_are_taken_as_they_are() -> None:
    cells = batch([[1, 2, 3], [4, 8, 12]])
    (shown,) = seen(GaussianEncoder(schema(True), 2, inputs=("x",)), cells)
    assert cells.x is not None
    torch.testing.assert_close(shown, ((cells.x - MEAN) / SPREAD).clamp(-10, 10))


def test_nothing_beyond_ten_standard_deviations_is_shown() -> None:
    (shown,) = seen(GaussianEncoder(schema(), 2, inputs=("x",)), batch([[1e6, 1.0, -1e6], [20.4, -4.1, 9.9]]))
    torch.testing.assert_close(shown, torch.tensor([[10.0, 0.0, -10.0], [9.95, -10.0, 9.9]]))


def test_conditions_follow_expression_in_the_order_of_the_inputs() -> None:
    cells = batch([[0.5, 1.0, 0.0], [0.5, 1.0, 0.0]])
    (shown,) = seen(GaussianEncoder(schema(), 2, inputs=("plate", "x", "e")), cells)
    assert shown.tolist() == [[0, 0, 0, 0, 0, 1, 3, -4], [0, 0, 0, 1, 0, 0, 0, 0]]


def test_the_network_has_room_for_every_input() -> None:
    parts = GaussianEncoder(schema(), 2, inputs=("x", "e", "plate"), hidden=(5,)).net.parts
    assert [(part.in_features, part.out_features) for part in parts] == [(3, 5), (2, 5), (3, 5)]


# ---------------------------------------------------------------------- what comes out
def test_sigma_is_softplus_above_a_floor() -> None:
    encoder = GaussianEncoder(schema(), 2, inputs=("x",), floor=0.25)
    encoder.net = Seen(torch.tensor([[1.0, 2.0, 0.0, -80.0], [3.0, 4.0, 1.0, 50.0]]))
    law = encoder(batch([[0.0] * 3] * 2))
    assert law.batch_shape == (2,)
    assert law.event_shape == (2,)
    assert law.base_dist.loc.tolist() == [[1, 2], [3, 4]]
    expected = torch.tensor([[math.log(2), 0.0], [math.log(1 + math.e), 50.0]]) + 0.25
    torch.testing.assert_close(law.base_dist.scale, expected)


def test_a_point_encoder_puts_all_mass_on_the_networks_output() -> None:
    encoder = PointEncoder(schema(), 4, hidden=())
    cells = batch([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    law = encoder(cells)
    assert isinstance(law, dist.Delta)
    assert law.batch_shape == (2,)
    assert law.event_shape == (4,)
    assert cells.x is not None
    linear = encoder.net.parts[0]
    value = ((cells.x - MEAN) / SPREAD) @ linear.weight.T + linear.bias
    torch.testing.assert_close(law.sample(), value)
    assert law.log_prob(law.v).tolist() == [0, 0]


# ---------------------------------------------------------------------- FiLM
def test_film_scales_and_shifts_each_hidden_unit_before_its_relu() -> None:
    encoder = GaussianEncoder(schema(), 2, inputs=("x", "e"), hidden=(4, 3), conditioning="film")
    cells = batch([[1.0, 2.0, -3.0], [0.0, 1.0, 2.0]])
    law = encoder(cells)
    net = encoder.net
    assert isinstance(net, FiLM)
    assert cells.x is not None
    h = ((cells.x - MEAN) / SPREAD).double().numpy()
    e = np.array([[3.0, -4.0], [0.0, 0.0]])
    for layer, modulation in zip(net.layers, net.modulations, strict=True):
        weight, bias = (p.detach().double().numpy() for p in layer.parameters())
        gamma_beta = e @ modulation.weight.detach().double().numpy().T + modulation.bias.detach().double().numpy()
        units = len(weight)
        gamma, beta = gamma_beta[:, :units], gamma_beta[:, units:]
        out = np.zeros((2, units))
        for n in range(2):
            for u in range(units):  # one scale and one shift a unit
                out[n, u] = max(0.0, (1 + gamma[n, u]) * (weight[u] @ h[n] + bias[u]) + beta[n, u])
        h = out
    out = h @ net.last.weight.detach().double().numpy().T + net.last.bias.detach().double().numpy()
    np.testing.assert_allclose(law.base_dist.loc.detach().numpy(), out[:, :2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["film", "concatenate"])
def test_the_environment_matters_to_a_guide_that_reads_it(conditioning: str) -> None:
    encoder = GaussianEncoder(schema(), 2, inputs=("x", "e"), conditioning=conditioning)
    cells = batch([[1.0, 2.0, -3.0], [1.0, 2.0, -3.0]])
    loc = encoder(cells).base_dist.loc.detach()
    assert float((loc[0] - loc[1]).abs().max()) > 0.01
    elsewhere = encoder(cells.under(torch.tensor([1.0, 1.0]))).base_dist.loc
    torch.testing.assert_close(elsewhere[0], elsewhere[1])


def test_film_without_a_modulation_is_a_plain_network() -> None:
    net = FiLM(3, 2, (4,), 2)
    with torch.no_grad():
        for p in net.modulations.parameters():
            p.zero_()
    x, e = torch.randn(5, 3), torch.randn(5, 2)
    torch.testing.assert_close(net(x, e), net.last(torch.relu(net.layers[0](x))))


def test_film_of_expression_alone_has_nothing_to_modulate() -> None:
    encoder = GaussianEncoder(schema(), 2, inputs=("x",), conditioning="film")
    assert not isinstance(encoder.net, FiLM)
    assert encoder(batch([[0.0] * 3] * 2)).batch_shape == (2,)


# ---------------------------------------------------------------------- messages
@pytest.mark.parametrize(
    ("inputs", "given"), [(("x", "dose"), r"\('x', 'dose'\)"), (("e",), r"\('e',\)"), (("x", "size"), "'size'")]
)
def test_inputs_that_do_not_exist_or_lack_expression_are_refused(inputs: tuple[str, ...], given: str) -> None:
    with pytest.raises(ModelError, match=rf"guide inputs .*{given}.*: give 'x' and any of \['e', 'plate'\]"):
        GaussianEncoder(schema(), 2, inputs=inputs)


def test_an_unknown_conditioning_is_refused() -> None:
    with pytest.raises(ModelError, match="unknown conditioning 'attention': use one of concatenate, film"):
        PointEncoder(schema(), 2, conditioning="attention")


def test_cells_without_expression_are_refused() -> None:
    cells = batch([[0.0] * 3] * 2).unobserved()
    with pytest.raises(ModelError, match=r"cells without expression: it infers z from x, so give observed cells"):
        GaussianEncoder(schema(), 2)(cells)
