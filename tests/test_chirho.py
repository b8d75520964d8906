"""ChiRho's handlers on our models, unchanged: its `do` and its worlds against our own answers."""

from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

from pyro_scm.actions import do as our_do
from pyro_scm.query import abduct, counterfactual, isolated
from tests.screens import cells, fitted
from tests.test_handlers import cells as six
from tests.test_handlers import chain, solution

indexed = pytest.importorskip("chirho.indexed.ops", reason="needs ChiRho: pip install 'pyro-scm[chirho]'")
interventional = pytest.importorskip("chirho.interventional.handlers")
worlds = pytest.importorskip("chirho.counterfactual.handlers")
do = interventional.do


def trace(program: Any, batch: Any = None) -> Any:
    torch.manual_seed(7)
    with torch.no_grad():
        return poutine.trace(program).get_trace(six() if batch is None else batch)


@pytest.mark.parametrize("action", [{"c_1": 2.0}, {"c_0": np.arange(6.0)}, {"c_1": 2.0, "c_2": 1.0}])
def test_its_do_is_ours(action: dict[str, Any]) -> None:
    action = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in action.items()}
    model = chain()
    ours = trace(our_do(model, action))
    with worlds.SingleWorldCounterfactual(), do(actions=dict(action)):
        theirs = trace(model)
    for site in ("z", "c", "x"):
        torch.testing.assert_close(theirs.nodes[site]["value"], ours.nodes[site]["value"])
    with worlds.SingleWorldFactual(), do(actions=dict(action)):
        factual = trace(model)
    torch.testing.assert_close(factual.nodes["c"]["value"], trace(model).nodes["c"]["value"])


def test_a_function_of_the_natural_value_is_imposed() -> None:
    with worlds.SingleWorldCounterfactual(), do(actions={"c_1": lambda c: c + 1}):
        found = trace(chain())
    torch.testing.assert_close(found.nodes["c"]["value"], solution(found.nodes["z"]["value"], c_1=lambda c: c + 1))


@pytest.mark.parametrize("kind", ["MultiWorldCounterfactual", "TwinWorldCounterfactual"])
def test_several_worlds_share_their_noise(kind: str) -> None:
    model, z = chain(), torch.randn(6, 3)
    with getattr(worlds, kind)(-2), do(actions={"c_1": torch.tensor(2.0)}):
        found = trace(poutine.condition(model, data={"z": z}))
        c = found.nodes["c"]["value"]
        name = next(iter(indexed.indices_of(c, event_dim=1)))
        factual, asked = (indexed.gather(c, indexed.IndexSet(**{name: {w}}), event_dim=1).reshape(6, 3) for w in (0, 1))
    torch.testing.assert_close(factual, solution(z))
    torch.testing.assert_close(asked, solution(z, c_1=2.0))
    assert found.nodes["x"]["fn"].batch_shape == (2, 6)  # expression of both worlds, of each its own
    means = found.nodes["x"]["fn"].mean.reshape(2, 6, 2)
    with torch.no_grad():
        expected = [model.likelihoods[0].mean(c, six()) for c in (factual, asked)]  # type: ignore[operator]
    torch.testing.assert_close(means, torch.stack(expected))


def test_two_interventions_make_four_worlds() -> None:
    model, z = chain(), torch.randn(6, 3)
    actions = {"c_0": torch.tensor(-1.0), "c_2": torch.tensor(3.0)}
    with worlds.MultiWorldCounterfactual(-2), do(actions=actions):
        c = trace(poutine.condition(model, data={"z": z})).nodes["c"]["value"]
        for first in (0, 1):
            for second in (0, 1):
                one = indexed.gather(c, indexed.IndexSet(c_0={first}, c_2={second}), event_dim=1)
                chosen = {k: float(v) for (k, v), w in zip(actions.items(), (first, second), strict=True) if w}
                torch.testing.assert_close(one.reshape(6, 3), solution(z, **chosen))


def test_counterfactuals_of_a_fitted_model_agree() -> None:
    model, guide = fitted().member(0)
    data = cells().subset(np.arange(10))
    ours = counterfactual((model, guide), data, do={"c_1": 2.0})
    batch = data.batch()
    with isolated():
        latents = abduct(guide, batch)
        with worlds.MultiWorldCounterfactual(-2), do(actions={"c_1": torch.tensor(2.0)}):
            theirs = poutine.trace(poutine.condition(model, data=latents)).get_trace(batch.unobserved())
    c = theirs.nodes["c"]["value"].reshape(2, 10, 3).numpy()
    x = theirs.nodes["x"]["fn"].mean.reshape(2, 10, 8).numpy()
    np.testing.assert_allclose(c[0], ours.factual_c[0, 0], atol=1e-5)
    np.testing.assert_allclose(c[1], ours.c[0, 0], atol=1e-5)
    np.testing.assert_allclose(x[0], ours.factual_x[0, 0], atol=1e-4)
    np.testing.assert_allclose(x[1], ours.x[0, 0], atol=1e-4)
    assert len(pyro.get_param_store()) == 0
