from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from guides import amortise
from pyro_scm import graphs
from pyro_scm.batch import Batch
from pyro_scm.contracts import check
from pyro_scm.data import synthetic
from pyro_scm.errors import ModelError
from pyro_scm.handlers import addressed
from pyro_scm.model import LatentModel
from pyro_scm.nn import mlp
from pyro_scm.objectives import Objective, Penalty, World
from pyro_scm.recipes import RECIPES
from pyro_scm.scm import LinearSCM
from pyro_scm.shifts import LinearShift
from pyro_scm.sites import C
from tests.screens import KINDS, cells, hierarchical, make, objective

CHAIN = graphs.from_edges([(0, 1), (1, 2)])


def batch(kind: str = "gaussian") -> Batch:
    """Ten cells of four environments."""
    return cells(kind)[::10]


def faults(model: Any, guide: Any, cells_: Batch | None = None) -> list[str]:
    """What `check` finds at fault."""
    with pytest.raises(ModelError, match="the model breaks its contract:") as error:
        check(model, guide, batch() if cells_ is None else cells_)
    return str(error.value).split("\n- ")[1:]


def chain() -> tuple[Any, Any]:
    """A structured model over a chain of three nodes whose edges matter."""
    model, guide = make("structured_environment_vae", cells().schema, graph=CHAIN)
    with torch.no_grad():
        model.scm.weight.fill_(0.7)
    return model, guide


# ---------------------------------------------------------------------- what holds
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_named_model_keeps_the_contract(name: str, kind: str) -> None:
    model, guide = make(name, cells(kind).schema)
    check(model, guide, batch(kind), objective(name, model))


@pytest.mark.parametrize(
    "options",
    [
        {"mechanism": "network"},
        {"graph": CHAIN},
        {"graph": graphs.full(3), "mechanism": "network"},
        {"graph": graphs.independent(3)},
        {"sparsity": "top-k", "k": 2},
        {"sparsity": "dense", "likelihood": "student-t"},
        {"likelihood": "normal-fixed", "hidden": ()},
        {"conditioning": "film", "inputs": ("x", "e", "plate")},
    ],
)
@pytest.mark.parametrize("name", ["structured_environment_vae", "structured_translation_vae"])
def test_every_option_of_the_structured_models_keeps_it(name: str, options: dict[str, Any]) -> None:
    check(*make(name, cells().schema, **options), batch())


def test_compositions_with_latent_sites_outside_the_plate_keep_it() -> None:
    model = hierarchical()
    check(model, amortise(model, cells()), batch())


class UncertainShift(LinearShift):
    """shift(e) = r_e V with V latent."""

    def forward(self, batch: Batch) -> Tensor:
        effects = pyro.sample("effects", dist.Normal(self.effects, 1.0).to_event(2))  # (F, d), or (S, 1, F, d)
        return (batch.e.unsqueeze(-2) @ effects).squeeze(-2)


def test_uncertain_shifts_keep_it_when_draws_are_conditioned_on_with_the_noise() -> None:
    base, _ = make("vae", cells().schema)
    model = LatentModel(base.prior, base.likelihoods[0], scm=LinearSCM(CHAIN), shift=UncertainShift(5, 3))
    check(model, amortise(model, cells()), batch())


def test_the_truth_of_a_synthetic_screen_keeps_it_under_hard_interventions_too() -> None:
    adata = synthetic.simulate(
        latent=3, genes=5, environments=4, cells=3, graph="growing", interventions=("hard", "mechanism")
    )
    data, model = synthetic.dataset(adata), synthetic.truth(adata)
    check(model, amortise(model, data), data.batch())


def test_frozen_parts_need_no_gradient() -> None:
    model, guide = make("vae", cells().schema)
    model.likelihoods[0].requires_grad_(False)
    check(model, guide, batch())


def test_checking_leaves_no_trace() -> None:
    model, guide = make("vae", cells().schema)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    check(model, guide, batch())
    assert len(pyro.get_param_store()) == 0
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_users_own_objective_is_checked() -> None:
    class Broken(Penalty):
        def penalty(self, world: World) -> Tensor:
            return world.guide["z"]["value"].sum() * torch.nan

    model, guide = make("vae", cells().schema)
    check(model, guide, batch(), Objective(kl_weight=2.0))
    with pytest.raises(ModelError, match="the loss is nan"):
        check(model, guide, batch(), Objective(penalties={"broken": Broken()}))


# ---------------------------------------------------------------------- what does not
def test_a_parameter_that_is_not_used_is_named() -> None:
    model, guide = make("vae", cells().schema)
    model.extra = nn.Linear(2, 2)
    guide.local["z"].spare = nn.Parameter(torch.ones(1))
    assert faults(model, guide) == [
        f"parameter {name} gets no gradient: it is not used, or the graph is cut before it"
        for name in ("model.extra.weight", "model.extra.bias", "guide.local.z.spare")
    ]


def test_a_cut_graph_is_noticed() -> None:
    class Cut(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, c: Tensor) -> Tensor:
            out: Tensor = self.net(c.detach())
            return out

    model, guide = make("ae", cells().schema)
    model.likelihoods[0].net = Cut(model.likelihoods[0].net)
    found = faults(model, guide)
    assert len(found) == 4
    assert all("guide.local.z.net" in fault and "gets no gradient" in fault for fault in found)


def test_a_decoder_of_the_wrong_size_is_noticed() -> None:
    model, guide = make("vae", cells().schema)
    model.likelihoods[0].net = mlp(3, (6,), 9)
    found = faults(model, guide)
    assert any(fault.startswith("loss and gradients: ") and "(9)" in fault and "(8)" in fault for fault in found)


def test_a_loss_that_is_not_finite_is_noticed() -> None:
    model, guide = make("vae", cells().schema)
    with torch.no_grad():
        model.likelihoods[0].net[2].bias[0] = torch.nan
    found = faults(model, guide)
    assert any(fault.startswith("loss and gradients: ValueError: Expected parameter loc") for fault in found)


def test_a_gradient_that_is_not_finite_is_noticed() -> None:
    class Root(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.power = net, nn.Parameter(torch.zeros(1))

        def forward(self, c: Tensor) -> Tensor:
            out: Tensor = self.net(c)
            return out + self.power.abs().sqrt()

    model, guide = make("vae", cells().schema)
    model.likelihoods[0].net = Root(model.likelihoods[0].net)
    assert faults(model, guide) == ["the gradient of parameter model.likelihoods.0.net.power is not finite"]


def test_a_guide_that_forgets_a_site_is_noticed() -> None:
    model = hierarchical()
    guide = amortise(model, cells())
    del guide.outside["share"]
    found = faults(model, guide)
    assert any("Found vars in model but not guide" in fault and "share" in fault for fault in found)
    assert any("the guide has no site 'share'" in fault for fault in found)


def test_a_guide_with_a_site_too_many_is_noticed() -> None:
    model, guide = make("vae", cells().schema)
    outside = amortise(hierarchical(), cells()).outside
    guide.outside = outside
    found = faults(model, guide)
    assert any("Found non-auxiliary vars in guide but not model" in fault and "spread" in fault for fault in found)


class Deaf(LinearSCM):
    """Emits c and no node, whoever asks."""

    def forward(self, z: Tensor, gain: Tensor | None = None) -> Tensor:
        result: Tensor = pyro.deterministic(C, self.solve(z, gain), event_dim=1)
        return result


class Stiff(LinearSCM):
    """Sets a node and lets nothing follow."""

    def forward(self, z: Tensor, gain: Tensor | None = None) -> Tensor:
        c = self.solve(z, gain)
        for name in addressed(self.sites):
            j = self.sites.index(name)
            value = pyro.deterministic(name, c[..., j], event_dim=0)
            c = torch.where(torch.arange(self.latent) == j, torch.as_tensor(value).unsqueeze(-1), c)
        result: Tensor = pyro.deterministic(C, c, event_dim=1)
        return result


class Acausal(LinearSCM):
    """Moves every node when one is set."""

    def forward(self, z: Tensor, gain: Tensor | None = None) -> Tensor:
        c = self.solve(z, gain)
        for name in addressed(self.sites):
            j = self.sites.index(name)
            before = c[..., j]
            value = torch.as_tensor(pyro.deterministic(name, before, event_dim=0))
            moved = c + (value - before).unsqueeze(-1)
            c = torch.where(torch.arange(self.latent) == j, value.unsqueeze(-1), moved)
        result: Tensor = pyro.deterministic(C, c, event_dim=1)
        return result


def with_layer(kind: type[LinearSCM]) -> tuple[Any, Any]:
    model, guide = chain()
    layer = kind(CHAIN)
    layer.load_state_dict(model.scm.state_dict())
    model.scm = layer
    return model, guide


def test_the_layers_own_interventions_pass() -> None:
    check(*with_layer(LinearSCM), batch())


def test_an_scm_that_ignores_interventions_is_noticed() -> None:
    found = faults(*with_layer(Deaf))
    assert [fault.split(" does not")[1] for fault in found] == [" set c_0", " set c_1", " set c_2"]


def test_an_scm_whose_descendants_do_not_follow_is_noticed() -> None:
    assert faults(*with_layer(Stiff)) == [
        f"do({name}) does not solve the equations with {name} set: its descendants must follow"
        for name in ("c_0", "c_1")
    ]


def test_an_scm_that_moves_what_does_not_descend_is_noticed() -> None:
    found = faults(*with_layer(Acausal))
    assert "do(c_1) moves c_0, which do not descend from it" in found
    assert "do(c_2) moves c_0, c_1, which do not descend from it" in found
    assert not any(fault.startswith("do(c_0) moves") for fault in found)


class Flat(nn.Module):
    """A decoder for one batch dimension only."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, c: Tensor) -> Tensor:
        out: Tensor = self.net(c.reshape(-1, c.shape[-1])[:10])
        return out


def test_a_part_that_does_not_broadcast_is_noticed() -> None:
    model, guide = make("vae", cells().schema)
    model.likelihoods[0].net = Flat(model.likelihoods[0].net)
    assert faults(model, guide) == [
        "two draws at once differ from each evaluated alone: parts must broadcast over leading dimensions"
    ]


def test_a_part_that_mixes_draws_is_noticed() -> None:
    class Mixing(Flat):
        def forward(self, c: Tensor) -> Tensor:
            out: Tensor = self.net(c)
            return out - out.mean(0, keepdim=True) if out.dim() > 2 else out

    model, guide = make("vae", cells().schema)
    model.likelihoods[0].net = Mixing(model.likelihoods[0].net)
    assert len(faults(model, guide)) == 1


def test_simulated_expression_of_another_shape_is_noticed() -> None:
    model, guide = make("vae", cells().schema)
    likelihood = model.likelihoods[0]
    whole = likelihood.distribution

    def distribution(c: Tensor, batch: Batch) -> Any:
        law = whole(c, batch)
        return law if batch.x is not None else dist.Normal(law.mean[..., :5], 1.0).to_event(1)

    likelihood.distribution = distribution
    assert "forward simulation gives x of shape (10, 5), the data have (10, 8)" in faults(model, guide)


def test_every_fault_is_listed_at_once() -> None:
    model, guide = with_layer(Deaf)
    model.extra = nn.Linear(1, 1)
    model.likelihoods[0].net = Flat(model.likelihoods[0].net)
    found = faults(model, guide)
    assert len(found) == 2 + 3 + 1


def test_a_program_without_the_suites_sites_is_reported_not_raised() -> None:
    class Program(nn.Module):
        def forward(self, batch: Batch) -> None:
            with batch.plate():
                pyro.sample("w", dist.Normal(0.0, 1.0))

    found = faults(Program(), Program())
    assert any(fault.startswith("simulates: KeyError") for fault in found)
    assert any(fault.startswith("interventions: AttributeError") and "sites" in fault for fault in found)


def test_the_cells_may_be_of_counts_at_any_library_size() -> None:
    data = cells("negative-binomial")
    rows = np.argsort(data.size)[[0, 1, -2, -1]]
    check(*make("structured_environment_vae", data.schema), data.batch(rows))
