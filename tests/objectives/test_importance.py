import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from guides import amortise
from pyro_scm.batch import Batch
from pyro_scm.ensemble import System
from pyro_scm.errors import ModelError
from pyro_scm.objectives import ImportanceWeighted, Objective, Penalty, World
from tests.screens import cells, make


def loss(objective: Objective, model: nn.Module, guide: nn.Module, batch: Batch, seed: int = 0) -> float:
    torch.manual_seed(seed)
    return objective.loss(model.forward, guide.forward, batch)


class Line(nn.Module):
    """z ~ N(0, 1), x_g ~ N(w_g z, 1): log p(x) is known."""

    def __init__(self, genes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, genes))

    def forward(self, batch: Batch) -> None:
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * self.weight, 1.0).to_event(1), obs=batch.x)

    def evidence(self, x: Tensor) -> Tensor:
        w = self.weight.detach()
        return dist.MultivariateNormal(torch.zeros(len(w)), torch.eye(len(w)) + torch.outer(w, w)).log_prob(x).sum()


class Wide(nn.Module):
    """A guide for it that is off the posterior."""

    def forward(self, batch: Batch) -> None:
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(len(batch), 1), 1.5).to_event(1))


def test_more_particles_bring_the_bound_to_the_evidence() -> None:
    batch = cells()[::4]
    assert batch.x is not None
    model, guide = Line(batch.x.shape[1]), Wide()
    evidence = float(model.evidence(batch.x)) * batch.total / len(batch)
    bounds = [
        np.mean([-loss(ImportanceWeighted(s), model, guide, batch, seed) for seed in range(20)]) for s in (1, 8, 400)
    ]
    assert bounds[0] < bounds[1] - 10 < bounds[2] - 10
    assert bounds[2] < evidence + 1
    assert bounds[2] == pytest.approx(evidence, rel=5e-3)


def test_one_particle_is_the_bound_with_a_sampled_divergence() -> None:
    model, guide = make("environment_vae", cells().schema)
    batch = cells()[::3]
    expected = loss(pyro.infer.Trace_ELBO(), model, guide, batch)
    assert loss(ImportanceWeighted(1), model, guide, batch) == pytest.approx(expected, rel=1e-5)


def test_weights_are_those_of_single_cells() -> None:
    model, guide = make("vae", cells().schema)
    batch = cells()[:3]
    torch.manual_seed(0)
    each = []
    for _ in range(4):
        q = pyro.poutine.trace(guide.forward).get_trace(batch)
        p = pyro.poutine.trace(pyro.poutine.replay(model.forward, q)).get_trace(batch)
        p.compute_log_prob(), q.compute_log_prob()
        values = p.nodes["x"]["unscaled_log_prob"] + p.nodes["z"]["unscaled_log_prob"]
        each.append(values - q.nodes["z"]["unscaled_log_prob"])
    bound = (torch.logsumexp(torch.stack(each), 0) - math.log(4)).sum() * batch.total / 3
    assert loss(ImportanceWeighted(4), model, guide, batch) == pytest.approx(-float(bound.detach()), rel=1e-5)


def test_its_parts_are_those_of_the_bound() -> None:
    model, guide = make("vae", cells().schema)
    batch = cells()[::3]
    system = System(model, guide, ImportanceWeighted(5))
    noise = {"z": torch.randn(5, len(batch), 3)}
    with torch.no_grad():
        parts, weighted = system(batch, noise), system(batch, noise, 0.0)
        each = [System(model, guide, ImportanceWeighted(1))(batch, {"z": one[None]}) for one in noise["z"]]
    for name in ("reconstruction", "kl"):
        torch.testing.assert_close(parts[name], torch.stack([e[name] for e in each]).mean())
    assert float(parts["loss"]) < float(parts["reconstruction"] + parts["kl"])  # tighter
    assert float(weighted["loss"]) < float(parts["reconstruction"])


class Globe(nn.Module):
    """A latent outside the plate, and one inside."""

    def forward(self, batch: Batch) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with batch.plate():
            z = pyro.sample("z", dist.Normal(theta, 1.0).expand([len(batch), 2]).to_event(1))
            assert batch.x is not None
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand(batch.x.shape).to_event(1), obs=batch.x)


def test_latents_outside_the_plate_enter_by_their_divergence() -> None:
    guide = amortise(Globe(), cells())
    batch = cells()[::3]
    system, narrow = System(Globe(), guide, ImportanceWeighted(1)), System(Globe(), guide, Objective())
    noise = {"z": torch.randn(1, len(batch), 2), "theta": torch.randn(1)}
    with torch.no_grad():
        inner = system(batch, noise, 0.0)["loss"], narrow(batch, noise, 0.0)["loss"]
    torch.testing.assert_close(inner[0], inner[1])
    kl = torch.distributions.kl_divergence(guide.outside["theta"](), dist.Normal(0.0, 1.0)).detach()
    parts = system.objective.parts(system.objective.world(Globe().forward, guide.forward, batch))
    torch.testing.assert_close(parts["outside"].detach(), kl)


def test_penalties_are_averaged_over_particles() -> None:
    class Size(Penalty):
        def penalty(self, world: World) -> Tensor:
            return world.guide["z"]["value"].square().sum()

    model, guide = make("vae", cells().schema)
    batch, noise = cells()[:5], {"z": torch.randn(3, 5, 3)}
    with torch.no_grad():
        plain = System(model, guide, ImportanceWeighted(3))(batch, noise)["loss"]
        found = System(model, guide, ImportanceWeighted(3, penalties={"size": Size(0.5)}))(batch, noise)
        law = guide.local["z"](batch)
        sizes = [(law.base_dist.loc + law.base_dist.scale * one).square().sum() for one in noise["z"]]
    expected = 0.5 * torch.stack(sizes).mean() / batch.total
    torch.testing.assert_close(found["size"], expected)
    torch.testing.assert_close(found["loss"], plain + expected)


def test_a_site_that_the_guide_lacks_is_named() -> None:
    model, _ = make("vae", cells().schema)
    with pytest.raises(ModelError, match="the guide has no site 'z'"):
        loss(ImportanceWeighted(2), model, nn.Identity(), cells()[:3])


# ---------------------------------------------------------------------- what many particles cost
@pytest.mark.parametrize("objective", [Objective(particles=5), ImportanceWeighted(5)])
def test_particles_share_one_evaluation_of_encoder_and_environment_network(objective: Objective) -> None:
    model, guide = make("environment_vae", cells().schema)
    batch = cells()[::3]
    calls = {"encoder": 0, "prior": 0, "decoder": 0}
    shapes: list[torch.Size] = []

    def count(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] += 1
            shapes.append(output.shape)

        {"encoder": guide.local["z"].net, "prior": model.prior.net, "decoder": model.likelihoods[0].net}[
            name
        ].register_forward_hook(hook)

    for name in calls:
        count(name)
    flops = FlopCounterMode(display=False)
    with flops:
        System(model, guide, objective)(batch, {"z": torch.randn(5, len(batch), 3)})
    assert calls == {"encoder": 1, "prior": 1, "decoder": 1}
    once = FlopCounterMode(display=False)
    with once:
        guide.local["z"].net(batch.x, batch.r, rows=[None, batch.row])
    total, encoder = flops.get_total_flops(), once.get_total_flops()
    decoder = (
        5
        * 2
        * len(batch)
        * sum(m.in_features * m.out_features for m in model.likelihoods[0].net if hasattr(m, "in_features"))
    )
    assert total < 1.5 * (encoder + decoder)  # five encoders alone would be more


@pytest.mark.parametrize("objective", [Objective(particles=4), ImportanceWeighted(4)])
def test_vectorised_particles_are_those_of_a_loop(objective: Objective) -> None:
    model, guide = make("structured_environment_vae", cells().schema)
    batch = cells()[::3]
    torch.manual_seed(3)
    noise = {"z": torch.stack([torch.randn(len(batch), 3) for _ in range(4)])}
    found = System(model, guide, objective)(batch, noise)["loss"].detach() * batch.total
    assert float(found) == pytest.approx(loss(objective, model, guide, batch, seed=3), rel=1e-5)
