import pytest
import torch
from torch.distributions import kl_divergence

from pyro_scm import models
from pyro_scm.contracts import check
from pyro_scm.errors import ModelError
from pyro_scm.priors import EnvironmentPrior, StandardPrior
from tests.screens import cells, make


def test_the_prior_is_standard_unless_asked_for() -> None:
    assert type(make("conditional_vae", cells().schema)[0].prior) is StandardPrior
    with pytest.raises(ModelError, match="unknown prior 'sohn': use 'standard' or 'conditional'"):
        models.conditional_vae(cells().schema, prior="sohn")


def test_a_conditional_prior_is_the_networks_in_every_environment_the_reference_too() -> None:
    model, _ = make("conditional_vae", cells().schema, prior="conditional")
    assert isinstance(model.prior, EnvironmentPrior)
    batch = cells()[::4]
    law = model.prior(batch).base_dist
    out = model.prior.net(batch.r)[batch.row]
    torch.testing.assert_close(law.loc, out[:, :3])
    torch.testing.assert_close(law.scale, (3 * torch.tanh(out[:, 3:] / 3)).exp())
    assert (law.loc[batch.env == 0] != 0).all()


def test_its_divergence_agrees_with_monte_carlo() -> None:
    model, guide = make("conditional_vae", cells().schema, prior="conditional")
    batch = cells()[::20]
    with torch.no_grad():
        q, p = guide.local["z"](batch), model.prior(batch)
        z = q.expand((20_000, len(batch))).sample()
        ratio = q.log_prob(z) - p.log_prob(z)
    error = ratio.std(0) / 20_000**0.5
    assert ((ratio.mean(0) - kl_divergence(q, p)).abs() < 5 * error).all()


@pytest.mark.parametrize("conditioning", ["concatenate", "film"])
@pytest.mark.parametrize("inputs", [("x",), ("x", "e"), ("x", "e", "plate")])
def test_it_keeps_the_contract_under_every_guide(inputs: tuple[str, ...], conditioning: str) -> None:
    made = make("conditional_vae", cells().schema, prior="conditional", inputs=inputs, conditioning=conditioning)
    check(*made, cells()[::10])
