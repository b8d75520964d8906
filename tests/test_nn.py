import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.nn import FiLM, Joint, MaskedMLP, mlp, replicated, reset_parameters


def test_a_network_is_linear_relu_linear() -> None:
    net = mlp(3, (5, 4), 2)
    assert [type(layer) for layer in net] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(p.shape) for p in net.parameters()] == [(5, 3), (5,), (4, 5), (4,), (2, 4), (2,)]
    x = torch.randn(7, 3)
    a, b, c = net[0], net[2], net[4]
    expected = (((x @ a.weight.T + a.bias).relu() @ b.weight.T + b.bias).relu()) @ c.weight.T + c.bias
    torch.testing.assert_close(net(x), expected)


def test_a_network_without_hidden_layers_is_linear() -> None:
    net = mlp(3, (), 2)
    assert len(net) == 1
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(net(x) + net(-x), 2 * net(torch.zeros_like(x)))
    assert net(x).shape == (2, 4, 2)


class Scaled(nn.Module):
    """A layer whose weights are made ten times larger after it has drawn them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.own = nn.Parameter(torch.zeros(4))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.layer.weight.mul_(10)
            self.own.normal_()


def test_parameters_are_drawn_from_the_seed_children_first() -> None:
    module = nn.Sequential(Scaled(), mlp(2, (3,), 1), MaskedMLP(torch.ones(2, 2), 3))
    before = [p.detach().clone() for p in module.parameters()]
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        reset_parameters(module)
        draws.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    names = [name for name, _ in module.named_parameters()]
    same = [name for name, a, b in zip(names, draws[0], draws[2], strict=True) if torch.equal(a, b)]
    assert same == ["2.offset"]  # zero in every draw
    assert not torch.equal(before[0], draws[0][0])
    torch.manual_seed(5)
    plain = nn.Linear(3, 2)
    torch.testing.assert_close(draws[0][1], 10 * plain.weight)  # own, then the layer's weight and bias


def test_a_module_without_parameters_of_its_own_needs_no_reset() -> None:
    reset_parameters(nn.Sequential(nn.ReLU(), nn.Identity()))


def test_film_is_its_formula() -> None:
    net = FiLM(3, 2, (5, 4), 6)
    x, e = torch.randn(7, 3), torch.randn(7, 2)
    h = x
    for layer, modulation in zip(net.layers, net.modulations, strict=True):
        both = e @ modulation.weight.T + modulation.bias
        gamma, beta = both[:, : layer.out_features], both[:, layer.out_features :]
        h = ((1 + gamma) * (h @ layer.weight.T + layer.bias) + beta).clamp(min=0)
    torch.testing.assert_close(net(x, e), h @ net.last.weight.T + net.last.bias)


def test_film_without_modulation_is_a_plain_network() -> None:
    net = FiLM(3, 2, (5,), 6)
    with torch.no_grad():
        for p in net.modulations.parameters():
            p.zero_()
    x = torch.randn(4, 7, 3)
    expected = net.last(F.relu(net.layers[0](x)))
    torch.testing.assert_close(net(x, torch.randn(7, 2).expand(4, 7, 2)), expected)


def test_film_without_hidden_layers_ignores_its_conditions() -> None:
    net = FiLM(3, 2, (), 6)
    x = torch.randn(4, 3)
    assert torch.equal(net(x, torch.zeros(4, 2)), net(x, torch.ones(4, 2)))


def one_by_one(net: MaskedMLP, c: Tensor) -> Tensor:
    """The networks of a `MaskedMLP`, one after the other, each on the inputs that it may read."""
    outputs = []
    for i in range(len(net.mask)):
        reads = net.mask[i].nonzero().flatten()
        units = (c[..., reads] @ net.first[i][:, reads].T + net.offset[i]).clamp(min=0)
        outputs.append(units @ net.second[i])
    return torch.stack(outputs, -1)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(
    k=st.integers(1, 5),
    p=st.integers(1, 6),
    hidden=st.integers(1, 4),
    batch=st.sampled_from([(), (3,), (2, 3)]),
    seed=st.integers(0, 99),
)
def test_masked_networks_are_separate_networks(k: int, p: int, hidden: int, batch: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    net = MaskedMLP((torch.rand(k, p) < 0.6).float(), hidden)
    with torch.no_grad():
        net.offset.normal_()
    c = torch.randn(*batch, p)
    assert net(c).shape == (*batch, k)
    torch.testing.assert_close(net(c), one_by_one(net, c), rtol=1e-5, atol=1e-5)


def test_no_value_or_gradient_passes_a_masked_input() -> None:
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    net = MaskedMLP(mask, 8)
    with torch.no_grad():
        net.offset.fill_(10.0)  # every unit is active
    c = torch.randn(3, requires_grad=True)
    for i in range(2):
        (gradient,) = torch.autograd.grad(net(c)[i], c)
        assert ((gradient != 0) == (mask[i] != 0)).all()
    net(c).sum().backward()
    assert net.first.grad is not None
    assert (net.first.grad[0, :, 1] == 0).all()
    assert (net.first.grad[0, :, 0] != 0).all()


def test_masked_networks_may_go_without_offsets() -> None:
    net = MaskedMLP(torch.ones(2, 3), 4, bias=False)
    assert not net.offset.requires_grad
    assert (net(torch.zeros(5, 3)) == 0).all()
    assert MaskedMLP(torch.ones(2, 3), 4).offset.requires_grad


def test_initial_weights_have_the_variance_of_each_network_s_own_inputs() -> None:
    mask = torch.zeros(2, 50)
    mask[0], mask[1, :2] = 1, 1
    net = MaskedMLP(mask, 4000)
    assert float(net.first[0].detach().var()) == pytest.approx(1 / 50, rel=0.03)
    assert float(net.first[1].detach().var()) == pytest.approx(1 / 2, rel=0.03)
    assert float(net.second.detach().var()) == pytest.approx(1 / 4000, rel=0.05)
    assert (net.offset == 0).all()


def test_a_copy_keeps_the_mask_and_the_values() -> None:
    net = MaskedMLP(torch.eye(3), 4)
    twin = MaskedMLP(torch.ones(3, 3), 4)
    twin.load_state_dict(copy.deepcopy(net.state_dict()))
    c = torch.randn(5, 3)
    assert torch.equal(net(c), twin(c))


# ---------------------------------------------------------------------- several inputs
@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
def test_a_joint_network_is_one_of_the_inputs_side_by_side(hidden: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    joint, plain = Joint((3, 2), hidden, 4), mlp(5, hidden, 4)
    with torch.no_grad():
        plain[0].weight.copy_(torch.cat([part.weight for part in joint.parts], 1))
        plain[0].bias.copy_(joint.parts[0].bias)
        later = [module for module in joint.rest.modules() if isinstance(module, nn.Linear)]
        for own, other in zip(later, [m for m in plain if isinstance(m, nn.Linear)][1:], strict=True):
            other.load_state_dict(own.state_dict())
    x, r, row = torch.randn(6, 3), torch.randn(2, 2), torch.tensor([0, 1, 1, 0, 0, 1])
    expected = plain(torch.cat((x, r[row]), -1))
    torch.testing.assert_close(joint(x, r[row]), expected)
    torch.testing.assert_close(joint(x, r, rows=[None, row]), expected)


def test_a_joint_network_starts_as_one_layer_of_all_inputs_does() -> None:
    torch.manual_seed(0)
    joint = Joint((300, 100), (50,), 4)
    for part in joint.parts:
        assert float(part.weight.detach().abs().max()) == pytest.approx(1 / 20, rel=0.01)
    assert joint.parts[1].bias is None
    assert float(joint.parts[0].bias.detach().abs().max()) <= 1 / 20


def test_replicated_are_parameters_and_the_buffers_that_a_module_names() -> None:
    class Scheduled(nn.Module):
        replicated = ("level",)

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("level", torch.tensor(2.0))
            self.register_buffer("other", torch.tensor(3.0))
            self.weight = nn.Parameter(torch.ones(2))

    assert set(replicated(Scheduled())) == {"level", "weight"}
    assert set(replicated(nn.ModuleDict({"a": Scheduled()}))) == {"a.level", "a.weight"}
