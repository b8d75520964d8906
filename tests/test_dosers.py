import math

import pytest
import torch

from pyro_scm.dosers import DOSERS, MONOTONE, AmortisedDoser, Doser, MLPDoser, doser_for
from pyro_scm.errors import ModelError
from pyro_scm.nn import reset_parameters

AMOUNTS = torch.cat((torch.zeros(1), torch.logspace(-3, 4, 60)))


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """The same module with arbitrary parameters."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=1.5)
    return module


@pytest.mark.parametrize("kind", DOSERS)
def test_no_dose_has_no_effect_exactly(kind: str) -> None:
    free = shaken(doser_for(kind, 5))(torch.zeros(7, 5))
    amortised = shaken(AmortisedDoser(4, kind))(torch.randn(7, 5, 4), torch.zeros(7, 5))
    assert (free == 0).all()
    assert (amortised == 0).all()


@pytest.mark.parametrize("kind", MONOTONE)
def test_monotone_curves_never_fall(kind: str) -> None:
    free = shaken(doser_for(kind, 5))(AMOUNTS[:, None].expand(-1, 5))
    amortised = shaken(AmortisedDoser(4, kind))(torch.randn(5, 4).expand(61, 5, 4), AMOUNTS[:, None].expand(-1, 5))
    for curve in (free, amortised):
        assert (curve.diff(dim=0) >= 0).all()
        assert (curve[-1] > 0.5 * curve[-1].amax()).any()
        assert (curve >= 0).all()
    if kind != "linear":
        assert (free <= 1).all()
        assert (amortised <= 1).all()


def test_a_network_s_curve_may_fall() -> None:
    assert (shaken(MLPDoser(50))(torch.linspace(0, 3, 20)[:, None].expand(-1, 50)).diff(dim=0) < 0).any()


def test_curves_are_those_of_their_formulas() -> None:
    a = torch.tensor([[2.0, 9.0]])
    assert torch.equal(Doser(2, "linear")(a), a)
    sigmoid, logarithmic, hill = (Doser(2, kind) for kind in ("sigmoid", "log-sigmoid", "hill"))
    torch.testing.assert_close(sigmoid(a), 2 * torch.sigmoid(a) - 1)
    torch.testing.assert_close(logarithmic(a), 2 * torch.sigmoid(a.log1p()) - 1)
    with torch.no_grad():
        sigmoid.raw[1] = 0.7
    base = torch.sigmoid(torch.tensor(0.7))
    torch.testing.assert_close(sigmoid(a), (torch.sigmoid(a + 0.7) - base) / (1 - base))
    with torch.no_grad():
        hill.raw[0] = torch.tensor([math.log(2.0), math.log(3.0)])
        hill.raw[1] = math.log(math.expm1(2.0))
    torch.testing.assert_close(hill(a), torch.tensor([[0.5, 0.9]]))


def test_each_perturbation_has_a_curve_of_its_own() -> None:
    for kind in ("sigmoid", "log-sigmoid", "hill", "mlp"):
        strengths = shaken(doser_for(kind, 3))(torch.full((1, 3), 2.0)).squeeze()
        assert len(set(strengths.tolist())) == 3


@pytest.mark.parametrize("kind", DOSERS)
def test_gradients_are_finite_at_no_dose_and_at_huge_ones(kind: str) -> None:
    doser, amortised = doser_for(kind, 3), AmortisedDoser(4, kind)
    amounts = torch.tensor([[0.0, 1e-9, 1e6]])
    total = doser(amounts).sum() + amortised(torch.randn(1, 3, 4), amounts).sum()
    if kind != "linear":
        total.backward()  # type: ignore[no-untyped-call]
    for p in (*doser.parameters(), *amortised.parameters()):
        assert p.grad is not None
        assert p.grad.isfinite().all()


def test_a_hill_curve_is_recovered() -> None:
    torch.manual_seed(0)
    doser = Doser(2, "hill")
    dose = torch.logspace(-2, 2, 9)[:, None].expand(-1, 2)
    truth = dose**1.5 / (dose**1.5 + torch.tensor([0.3, 5.0]) ** 1.5)
    optimiser = torch.optim.Adam(doser.parameters(), 0.05)
    for _ in range(300):
        optimiser.zero_grad()
        (doser(dose) - truth).square().mean().backward()
        optimiser.step()
    error = (doser.raw[0].detach() - torch.tensor([0.3, 5.0]).log()).abs() / math.log(10)
    assert (error < 0.05).all()


def test_drawing_anew_reaches_every_parameter() -> None:
    for module in (*(doser_for(kind, 3) for kind in DOSERS), *(AmortisedDoser(4, kind) for kind in DOSERS)):
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(torch.nan)
        reset_parameters(module)
        assert all(p.isfinite().all() for p in module.parameters())


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ModelError, match="unknown doser 'cubic': use one of linear, sigmoid, log-sigmoid, hill, mlp"):
        doser_for("cubic", 2)
    with pytest.raises(ModelError, match="unknown doser 'cubic'"):
        AmortisedDoser(2, "cubic")
