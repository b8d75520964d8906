import math
import time
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor, nn

from pyro_scm import graphs
from pyro_scm.batch import Batch, Schema
from pyro_scm.errors import InterventionError
from pyro_scm.handlers import (
    Do,
    Expose,
    HoldNoise,
    NoiseIntervention,
    addressed,
    anneal,
    diagonal,
    refuse_unknown,
    reparametrised,
    unstored,
)
from pyro_scm.likelihoods import Gaussian
from pyro_scm.model import LatentModel
from pyro_scm.nn import mlp
from pyro_scm.priors import Dense, EnvironmentPrior, FlatPrior, StandardPrior, TopK
from pyro_scm.scm import LinearSCM
from pyro_scm.shifts import EnvironmentShift

SCHEMA = Schema(genes=("a", "b"), environments=("control", "A", "B"), features=("f", "g"), counts=False, cells=6)


def cells(observed: bool = False) -> Batch:
    """Six cells in three environments, the first a reference."""
    return Batch(
        index=torch.arange(6),
        env=torch.tensor([0, 1, 2, 0, 1, 2]),
        row=torch.tensor([0, 1, 2, 0, 1, 2]),
        r=torch.tensor([[0.0, 0.0], [1.0, -2.0], [0.5, 3.0]]),
        perturbed=torch.tensor([0.0, 1.0, 1.0]),
        total=6,
        x=torch.arange(12.0).reshape(6, 2) if observed else None,
    )


def chain(prior: nn.Module | None = None) -> LatentModel:
    """0 -> 1 -> 2 with effects 2 and -3; c_0 = z_0."""
    torch.manual_seed(1)
    scm = LinearSCM(graphs.from_edges([(0, 1), (1, 2)]))
    with torch.no_grad():
        scm.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, -3.0, 0.0]]))
    return (
        LatentModel(prior or StandardPrior(3), Gaussian(mlp(3, (4,), 2), SCHEMA), scm=scm).requires_grad_(False).eval()
    )


def run(program: Any, batch: Batch | None = None) -> Any:
    torch.manual_seed(7)
    return poutine.trace(program).get_trace(cells() if batch is None else batch)


def solution(z: Tensor, **imposed: Any) -> Tensor:
    """c of the chain, values or functions of the natural value imposed."""

    def node(name: str, natural: Tensor) -> Tensor:
        rule = imposed.get(name)
        if rule is None:
            return natural
        return torch.as_tensor(rule(natural) if callable(rule) else rule).expand_as(natural)

    c0 = node("c_0", z[..., 0])
    c1 = node("c_1", 2 * c0 + z[..., 1])
    return torch.stack((c0, c1, node("c_2", -3 * c1 + z[..., 2])), -1)


# ---------------------------------------------------------------------- who asks for a site
def test_sites_are_addressed_by_any_handler_with_data_or_actions() -> None:
    names = [f"c_{j}" for j in range(5)]

    class Actions(poutine.messenger.Messenger):
        actions = {"c_4": 1.0, 3: 2.0}  # noqa: RUF012

    assert addressed(names) == []
    with poutine.condition(data={"c_3": torch.zeros(()), "other": torch.zeros(())}):
        assert addressed(names) == ["c_3"]
        with poutine.do(data={"c_1": 0.0}), Actions():
            assert addressed(names) == ["c_1", "c_3", "c_4"]
        with poutine.trace(), poutine.block(), poutine.scale(scale=2.0):
            assert addressed(names) == ["c_3"]
    assert addressed(names) == []


def test_asking_costs_almost_nothing() -> None:
    names = [f"c_{j}" for j in range(1000)]
    with poutine.trace(), poutine.block(), poutine.scale(scale=2.0):
        best = min(_seconds(names) for _ in range(20))
    assert best < 1e-3  # 3 microseconds on the machine that this was written on


def _seconds(names: list[str]) -> float:
    start = time.perf_counter()
    addressed(names)
    return time.perf_counter() - start


def test_exposed_sites_appear_and_only_those() -> None:
    model = chain()
    plain, exposed = run(model), run(Expose(["c_0", "c_2"])(model))
    assert [n for n in plain.nodes if n.startswith("c_")] == []
    assert [n for n in exposed.nodes if n.startswith("c_")] == ["c_0", "c_2"]
    torch.testing.assert_close(exposed.nodes["c"]["value"], plain.nodes["c"]["value"])
    torch.testing.assert_close(exposed.nodes["c_2"]["value"], plain.nodes["c"]["value"][:, 2])
    assert [n for n in run(Expose(model.sites)(model)).nodes if n.startswith("c_")] == list(model.sites)


def test_an_unknown_site_is_refused_by_name() -> None:
    refuse_unknown(["c_1"], ["c_0", "c_1"])
    with pytest.raises(InterventionError, match=r"^no causal variable 'c_7', 'x': this model has 'c_0', 'c_1'$"):
        refuse_unknown(["c_7", "c_1", "x"], ["c_0", "c_1"])
    with pytest.raises(InterventionError, match=r"'c_0'.*'c_7' and 12 more$"):
        refuse_unknown(["z"], (f"c_{j}" for j in range(20)))


# ---------------------------------------------------------------------- do
@pytest.mark.parametrize(
    "imposed",
    [
        {},
        {"c_1": 2.0},
        {"c_0": torch.arange(6.0)},
        {"c_1": lambda c: c + 1},
        {"c_0": lambda c: -c, "c_2": 4.0},
        {"c_0": lambda c: -c, "c_1": lambda c: c.clamp(min=0), "c_2": lambda c: 2 * c},
        {"c_1": lambda c: 3},
    ],
)
def test_do_imposes_numbers_tensors_and_functions_of_the_natural_value(imposed: dict[str, Any]) -> None:
    trace = run(Do(imposed)(chain()))
    z = trace.nodes["z"]["value"]
    torch.testing.assert_close(trace.nodes["c"]["value"], solution(z, **imposed))
    for name in imposed:  # the site holds the natural value, under the interventions before it
        before = {k: v for k, v in imposed.items() if k < name}
        torch.testing.assert_close(trace.nodes[name]["value"], solution(z, **before)[:, int(name[-1])])


def test_do_can_be_used_again_and_keeps_its_functions() -> None:
    model, handler = chain(), Do({"c_0": lambda c: c + 1, "c_1": 5.0})
    first, second = run(handler(model)), run(handler(model))
    torch.testing.assert_close(first.nodes["c"]["value"], second.nodes["c"]["value"])
    assert callable(handler.data["c_0"])
    assert set(handler.data) == {"c_0", "c_1"}
    with pytest.raises(ZeroDivisionError):
        run(Do({"c_0": lambda c: 1 / 0})(model))


def test_do_equals_poutine_do_on_numbers() -> None:
    model = chain()
    ours, pyros = run(Do({"c_1": 2.0})(model)), run(poutine.do(model, data={"c_1": 2.0}))
    for site in ("z", "c", "c_1", "x"):
        torch.testing.assert_close(ours.nodes[site]["value"], pyros.nodes[site]["value"])


def test_functions_see_the_natural_value_of_each_parallel_draw() -> None:
    program, z = Do({"c_1": lambda c: c * 2})(chain()), torch.randn(4, 6, 3)
    c = Predictive(program, posterior_samples={"z": z}, parallel=True, return_sites=("c",))(cells())["c"]
    torch.testing.assert_close(c, solution(z, c_1=lambda c: c * 2))


def test_do_nests_around_do_on_other_sites() -> None:
    trace = run(Do({"c_1": lambda c: c - 1})(Do({"c_0": lambda c: c + 1})(chain())))
    expected = solution(trace.nodes["z"]["value"], c_0=lambda c: c + 1, c_1=lambda c: c - 1)
    torch.testing.assert_close(trace.nodes["c"]["value"], expected)


# ---------------------------------------------------------------------- noise interventions
LAW = dist.Normal(5.0, 0.1)


def test_a_noise_intervention_moves_its_component_and_the_descendants() -> None:
    model = chain()
    before, after = run(model), run(NoiseIntervention({1: LAW})(model))
    z = after.nodes["z"]["value"]
    assert torch.equal(z[:, [0, 2]], before.nodes["z"]["value"][:, [0, 2]])
    assert ((z[:, 1] - 5).abs() < 1).all()
    torch.testing.assert_close(after.nodes["c"]["value"], solution(z))
    assert torch.equal(after.nodes["c"]["value"][:, 0], before.nodes["c"]["value"][:, 0])
    assert (after.nodes["c"]["value"][:, 1:] != before.nodes["c"]["value"][:, 1:]).all()


def test_the_component_has_its_new_law_and_the_others_theirs() -> None:
    program = NoiseIntervention({1: LAW, 2: dist.Exponential(2.0)})(chain())
    z = Predictive(program, num_samples=4000, parallel=True, return_sites=("z",))(cells())["z"].reshape(-1, 3)
    n = len(z)
    assert n == 24_000
    means, deviations = (0.0, 5.0, 0.5), (1.0, 0.1, 0.5)
    for j in range(3):
        assert abs(float(z[:, j].mean()) - means[j]) < 4 * deviations[j] / math.sqrt(n)
        assert float(z[:, j].std()) == pytest.approx(deviations[j], rel=0.05)
    assert (torch.corrcoef(z.T) - torch.eye(3)).abs().max() < 4 / math.sqrt(n)


@pytest.mark.parametrize("prior", [StandardPrior(3), EnvironmentPrior(mlp(2, (), 6), 3)])
def test_the_log_density_is_that_of_the_new_law(prior: nn.Module) -> None:
    trace = run(NoiseIntervention({1: LAW})(chain(prior)))
    trace.compute_log_prob()
    z, law = trace.nodes["z"]["value"], prior(cells()).base_dist
    expected = law.log_prob(z)[:, 0] + LAW.log_prob(z[:, 1]) + law.log_prob(z)[:, 2]
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], expected)
    assert trace.nodes["z"]["fn"].support.check(z).all()


def test_a_flat_prior_stays_flat_but_for_the_new_law() -> None:
    trace = run(NoiseIntervention({1: LAW})(chain(FlatPrior(3))))
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], LAW.log_prob(trace.nodes["z"]["value"][:, 1]))


def test_noise_that_is_given_is_replaced_in_the_named_component_only() -> None:
    z = torch.randn(6, 3)
    given = poutine.condition(chain(), data={"z": z})
    found = run(NoiseIntervention({2: LAW})(given)).nodes["z"]["value"]
    assert torch.equal(found[:, :2], z[:, :2])
    assert (found[:, 2] != z[:, 2]).all()
    assert ((found[:, 2] - 5).abs() < 1).all()
    draws = torch.randn(4, 6, 3)
    with pyro.plate("draws", 4, dim=-2):
        many = run(NoiseIntervention({2: LAW})(poutine.condition(chain(), data={"z": draws})))
    assert torch.equal(many.nodes["z"]["value"][..., :2], draws[..., :2])
    assert many.nodes["z"]["value"][..., 2].unique().numel() == 24


def test_a_noise_intervention_lets_gradients_through_the_other_components() -> None:
    prior = EnvironmentPrior(mlp(2, (), 6), 3, Dense())
    z = run(NoiseIntervention({1: LAW})(chain(prior).requires_grad_())).nodes["z"]["value"]
    z.sum().backward()
    bias = prior.net[0].bias.grad  # type: ignore[index, union-attr]
    assert bias[1] == 0
    assert (bias[[0, 2]] == 4).all()  # four cells are in perturbed environments


@pytest.mark.parametrize("j", [-1, 3])
def test_a_component_that_z_does_not_have_is_refused(j: int) -> None:
    with pytest.raises(InterventionError, match=rf"^no noise component {j}: z has components 0 to 2$"):
        run(NoiseIntervention({j: LAW})(chain()))


def test_noise_and_do_compose() -> None:
    trace = run(Do({"c_1": 1.0})(NoiseIntervention({0: LAW})(chain())))
    z = trace.nodes["z"]["value"]
    assert ((z[:, 0] - 5).abs() < 1).all()
    torch.testing.assert_close(trace.nodes["c"]["value"], solution(z, c_1=1.0))


# ---------------------------------------------------------------------- held noise
def test_held_noise_is_scaled_and_shifted_by_the_environment_s_prior() -> None:
    prior = EnvironmentPrior(mlp(2, (4,), 6), 3)
    epsilon = torch.randn(2, 6, 3)
    with pyro.plate("draws", 2, dim=-2):
        z = run(HoldNoise(epsilon)(chain(prior))).nodes["z"]["value"]
    law = diagonal(prior(cells()))
    torch.testing.assert_close(z, law.loc + law.scale * epsilon)
    assert torch.equal(z[:, 0], epsilon[:, 0])  # a reference environment has mean 0 and scale 1
    assert run(HoldNoise(epsilon[0])(chain(prior))).nodes["z"]["value"].shape == (6, 3)


def test_the_normal_inside_its_wrappers_is_found() -> None:
    law = dist.Normal(torch.zeros(4, 3), torch.ones(4, 3))
    assert diagonal(law) is law
    assert diagonal(law.to_event(1).mask(False)) is law


def test_a_law_is_its_base_and_the_transforms_to_it() -> None:
    normal = dist.Normal(torch.zeros(3), 1.0)
    assert reparametrised(normal.to_event(1)) == (normal, [])
    exponential = dist.transforms.ExpTransform()
    affine = dist.transforms.AffineTransform(1.0, 2.0)
    inner = dist.TransformedDistribution(normal, [exponential])
    law = dist.TransformedDistribution(inner, [affine]).to_event(1)
    base, transforms = reparametrised(law)
    assert base is normal
    epsilon = torch.randn(3)
    value = epsilon
    for transform in transforms:
        value = transform(value)
    torch.testing.assert_close(value, 1 + 2 * epsilon.exp())


def test_runs_leave_nothing_in_the_parameter_store_where_so_asked() -> None:
    pyro.param("mine", torch.zeros(2))
    frozen = chain().train()  # Pyro warns of frozen parameters, and warnings are errors here
    with unstored():
        run(frozen)
        run(chain().requires_grad_())
    assert list(pyro.get_param_store()) == ["mine"]
    run(chain().requires_grad_())
    assert len(list(pyro.get_param_store())) > 1


@pytest.mark.parametrize("sparsifier", [None, TopK(1), Dense()])
def test_an_environment_vae_with_held_noise_is_a_translation_vae(sparsifier: nn.Module | None) -> None:
    """z = mu_e + epsilon and c = scm(z) on one side, c = scm(epsilon + mu_e) on the other: the same networks."""
    net = mlp(2, (8,), 6)

    class Means(nn.Module):
        def forward(self, r: Tensor) -> Tensor:
            half: Tensor = net(r)[..., :3]
            return half

    environment = chain(EnvironmentPrior(net, 3, sparsifier, scale=False))
    translation = LatentModel(
        StandardPrior(3), environment.likelihoods[0], environment.scm, EnvironmentShift(Means(), sparsifier)
    ).eval()
    epsilon = torch.randn(6, 3)
    for e in range(3):
        batch = cells().under(cells().r[e], env=e, perturbed=e > 0)
        one = run(HoldNoise(epsilon)(environment), batch)
        other = run(poutine.condition(translation, data={"z": epsilon}), batch)
        torch.testing.assert_close(one.nodes["c"]["value"], other.nodes["c"]["value"])
        torch.testing.assert_close(one.nodes["x"]["fn"].mean, other.nodes["x"]["fn"].mean)
        held = one.nodes["z"]["value"] - epsilon
        assert (held == 0).all() if e == 0 else (held != 0).any()


# ---------------------------------------------------------------------- annealing
@pytest.mark.parametrize("weight", [0.0, 0.3, torch.tensor(0.5)])
def test_annealing_scales_latent_sites_alone(weight: float | Tensor) -> None:
    model, batch = chain(), cells(observed=True)
    plain, annealed = run(model, batch), run(anneal(model, weight), batch)
    for trace in (plain, annealed):
        trace.compute_log_prob()
    torch.testing.assert_close(annealed.nodes["z"]["value"], plain.nodes["z"]["value"])
    torch.testing.assert_close(annealed.nodes["z"]["log_prob_sum"], weight * plain.nodes["z"]["log_prob_sum"])
    torch.testing.assert_close(annealed.nodes["x"]["log_prob_sum"], plain.nodes["x"]["log_prob_sum"])
    assert annealed.nodes["c"]["log_prob_sum"] == plain.nodes["c"]["log_prob_sum"] == 0


def test_annealing_keeps_the_plate_s_scale_and_multiplies() -> None:
    batch = Batch(**{**vars(cells(observed=True)), "total": 60})
    trace = run(anneal(anneal(chain(), 0.5), 0.5), batch)
    trace.compute_log_prob()
    assert trace.nodes["z"]["scale"] == pytest.approx(10 * 0.25)
    assert trace.nodes["x"]["scale"] == pytest.approx(10)
