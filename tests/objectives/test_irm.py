from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_scm import recording
from pyro_scm.distributions import NegativeBinomial, normal
from pyro_scm.ensemble import Ensemble, System, stack_initial
from pyro_scm.errors import ModelError
from pyro_scm.infer import fit
from pyro_scm.objectives import IRM, Objective, World
from pyro_scm.recipes import RECIPES
from tests.screens import cells, make

KINDS = [("normal", "gaussian"), ("normal-fixed", "gaussian"), ("student-t", "gaussian"), (None, "negative-binomial")]


def scaled(law: Any, w: Tensor) -> Any:
    """The law with its location multiplied by w."""
    base = law.base_dist
    if isinstance(base, NegativeBinomial):
        return NegativeBinomial(w * base.log_mean, base.log_dispersion).to_event(1)
    if isinstance(base, dist.StudentT):
        return dist.StudentT(base.df, w * base.loc, base.scale).to_event(1)
    return normal(w * base.loc, base.scale)


def world(likelihood: str | None, kind: str, name: str = "environment_vae") -> Any:
    model, guide = (m.double() for m in make(name, cells(kind).schema, likelihood=likelihood))
    from tests.screens import double

    return Objective().world(model, guide, double(cells(kind)[::3]))


@pytest.mark.parametrize(("likelihood", "kind"), KINDS)
def test_the_penalty_is_that_of_a_loop_over_environments(likelihood: str | None, kind: str) -> None:
    found = world(likelihood, kind)
    law, x, env = found.model["x"]["fn"], found.model["x"]["value"], found.batch.env
    squares = []
    for e in env.unique():
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        risk = -scaled(law, w).log_prob(x)[env == e].mean()
        (gradient,) = torch.autograd.grad(risk, w, retain_graph=True)
        squares.append(gradient**2)
    expected = found.batch.total * torch.stack(squares).mean()
    assert float(expected) > 0
    torch.testing.assert_close(IRM()(found), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(IRM(0.25)(found), 0.25 * expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("likelihood", "kind"), KINDS)
def test_the_slopes_are_finite_differences(likelihood: str | None, kind: str) -> None:
    found = world(likelihood, kind)
    law, x = found.model["x"]["fn"], found.model["x"]["value"]
    step = torch.tensor(1e-5, dtype=torch.float64)
    higher, lower = (-scaled(law, 1 + sign * step).log_prob(x) for sign in (1, -1))
    torch.testing.assert_close(IRM().slopes(found), (higher - lower) / (2 * step), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unbiased", [False, True])
def test_a_factor_of_each_gene_is_the_sum_over_genes_of_penalties_of_one(unbiased: bool) -> None:
    found = world("normal", "gaussian")
    law, site = found.model["x"]["fn"].base_dist, dict(found.model["x"])
    total = torch.zeros((), dtype=torch.float64)
    for g in range(site["value"].shape[1]):
        one = normal(law.loc[:, [g]], law.scale[..., [g]])
        alone = World(found.batch, {}, {"x": {**site, "fn": one, "value": site["value"][:, [g]]}})
        total = total + IRM(unbiased=unbiased)(alone)
    torch.testing.assert_close(IRM(each=True, unbiased=unbiased)(found), total)
    assert float(total.detach()) != pytest.approx(float(IRM(unbiased=unbiased)(found).detach()), rel=0.01)


def test_the_penaltys_own_gradient_is_that_of_the_loop() -> None:
    found = world(None, "negative-binomial")
    law, x, env = found.model["x"]["fn"], found.model["x"]["value"], found.batch.env
    w = torch.ones(len(env), 1, dtype=torch.float64, requires_grad=True)
    (each,) = torch.autograd.grad(-scaled(law, w).log_prob(x).sum(), w, create_graph=True)
    loop = torch.stack([each[env == e].mean().square() for e in env.unique()]).mean() * found.batch.total
    eta = law.base_dist.log_mean
    one, other = (torch.autograd.grad(v, eta, retain_graph=True)[0] for v in (IRM()(found), loop))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_without_the_products_of_a_cell_with_itself_the_square_is_unbiased() -> None:
    """Over all pairs of cells the estimate is the squared mean; the plain square has a variance on top."""
    found = world("normal", "gaussian")
    slopes, env = IRM().slopes(found), found.batch.env
    expected, biased = [], []
    for e in env.unique():
        own = slopes[env == e]
        pairs = own[:, None] * own[None, :]
        expected.append((pairs.sum() - pairs.diagonal().sum()) / (len(own) * (len(own) - 1)))
        biased.append(own.mean().square() - own.var(correction=1) / len(own))
    total = found.batch.total
    torch.testing.assert_close(IRM(unbiased=True)(found), total * torch.stack(expected).mean())
    torch.testing.assert_close(IRM(unbiased=True)(found), total * torch.stack(biased).mean())


def test_environments_without_enough_cells_say_nothing() -> None:
    model, guide = make("vae", cells().schema)
    one = Objective().world(model, guide, cells()[[0, 1, 2, 99]])  # three controls and one other cell
    slopes = IRM().slopes(one)
    torch.testing.assert_close(IRM()(one), 100 * (slopes[:3].mean().square() + slopes[3].square()) / 2)
    pairs = slopes[0] * slopes[1] + slopes[0] * slopes[2] + slopes[1] * slopes[2]
    torch.testing.assert_close(IRM(unbiased=True)(one), 100 * pairs / 3)
    alone = Objective().world(model, guide, cells()[[7]])
    assert float(IRM(unbiased=True)(alone).detach()) == 0


def test_a_decoder_that_is_optimal_everywhere_has_no_penalty() -> None:
    """With the location at its best scale in each environment the mean slope is 0, and not where it is off in one."""
    model, guide = make("vae", cells().schema)
    found = Objective().world(model, guide, cells()[:60])
    x, env = found.model["x"]["value"], found.batch.env
    location = torch.empty_like(x)
    for e in env.unique():
        direction = torch.ones(8)
        direction = direction * (x[env == e] @ direction).sum() / ((env == e).sum() * direction.square().sum())
        location[env == e] = direction
    found.model["x"]["fn"] = normal(location, torch.ones(8))
    best = float(IRM()(found))
    assert best == pytest.approx(0, abs=1e-5)
    found.model["x"]["fn"] = normal(torch.where((env == 0)[:, None], 1.5 * location, location), torch.ones(8))
    assert float(IRM()(found)) > 1


def test_the_weight_rises_over_the_warm_up() -> None:
    found = world("normal", "gaussian")
    penalty = IRM(2.0, warmup=0.5)
    full = float(IRM(2.0)(found).detach())
    for done, share in ((0.0, 0.0), (0.1, 0.2), (0.25, 0.5), (0.5, 1.0), (0.9, 1.0)):
        penalty.at(done)
        assert float(penalty(found).detach()) == pytest.approx(share * full)
    steady = IRM()
    steady.at(0.0)
    assert float(steady.ramp) == 1


def test_recorded_and_vectorised_steps_see_the_warm_up() -> None:
    penalty = IRM(warmup=1.0)
    system = System(*make("environment_vae", cells().schema), Objective(penalties={"irm": penalty}))
    parameters = stack_initial(system, (0, 1))
    both = Ensemble(system, parameters, [torch.Generator().manual_seed(s) for s in (0, 1)])
    batch = cells()[::4]
    noise = both.noise(batch)
    buffers = {n: b for n, b in system.named_buffers() if n not in both.parameters}
    kinds: dict[str, dict[str, Tensor]] = {
        "noise": noise, "parameter": both.parameters, "batch": batch.tensors(), "buffer": buffers
    }  # fmt: skip
    fixed = {f"{kind} {n}": v for kind, values in kinds.items() for n, v in values.items()}

    def losses(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        of = {k: {n.removeprefix(f"{k} "): v for n, v in arguments.items() if n.startswith(f"{k} ")} for k in kinds}
        same = batch.with_tensors(of["batch"])
        return both.losses(same, of["noise"], parameters=of["parameter"], buffers=of["buffer"])

    program = recording._record(losses, fixed)
    assert program is not None
    values = []
    for share in (0.25, 1.0):
        replayed = program({**fixed, "buffer penalties.irm.ramp": torch.tensor(share)})["irm"]
        penalty.at(share)
        torch.testing.assert_close(replayed, both.losses(batch, noise)["irm"], rtol=1e-5, atol=1e-6)
        values.append(replayed)
    torch.testing.assert_close(4 * values[0], values[1])
    for k in range(2):
        one = Ensemble(system, {n: p[k : k + 1] for n, p in parameters.items()}, [torch.Generator()])
        alone = one.losses(batch, {n: v[k : k + 1] for n, v in noise.items()})["irm"]
        torch.testing.assert_close(alone[0], values[1][k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "negative-binomial"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_model_trains_with_it(name: str, kind: str) -> None:
    data = cells(kind)

    def trained(weight: float) -> Any:
        model, guide = make(name, data.schema)
        objective = Objective(penalties={"irm": IRM(weight)})
        return fit(
            model, guide, data, objective=objective, epochs=3, batch_size=50, seeds=(0, 1), validation=data,
            progress=False,
        )  # fmt: skip

    free, held = trained(1e-6), trained(0.1)
    last = [run.history.groupby("epoch")["irm"].mean().iloc[-1] for run in (free, held)]
    assert last[1] / 0.1 < last[0] / 1e-6  # the penalty bites


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(ModelError, match=r"warmup = 1\.5: give a share of the epochs"):
        IRM(warmup=1.5)
    found = world("normal", "gaussian")
    found.model["x"]["fn"] = dist.Laplace(found.model["x"]["value"], 1.0).to_event(1)
    with pytest.raises(ModelError, match="IRM does not know the location of a Laplace: give slope="):
        IRM()(found)
    known = IRM(slope=lambda law, x: law.loc * (law.loc - x).sign() / law.scale)
    assert float(known(found)) == 0
