"""Targets known, unknown and partly known, and what each kind of intervention makes of them."""

import pandas as pd
import pytest
import torch

from guides import amortise
from pyro_scm import contracts, models
from pyro_scm.batch import Batch
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import ModelError
from pyro_scm.infer import fit
from pyro_scm.model import LatentModel
from pyro_scm.priors import EnvironmentPrior
from pyro_scm.recipes import load
from pyro_scm.regimes import (
    HardRegime,
    MechanismRegime,
    TargetedPrior,
    TargetedShift,
    TargetGate,
    Targets,
    target_labels,
    target_table,
)
from pyro_scm.scm import LinearSCM, MechanismSCM, OrderFreeSCM

NAN = float("nan")
STRUCTURED = ("structured_environment_vae", "structured_translation_vae")


def screen() -> EnvironmentDataset:
    adata = synthetic.simulate(latent=3, genes=6, environments=4, cells=20, interventions=("hard",), descriptors=4)
    return synthetic.dataset(adata, "descriptors")


CELLS = screen()
LABELS = target_labels(CELLS.environments)


def build(name: str, **options: object) -> LatentModel:
    torch.manual_seed(0)
    return getattr(models, name)(CELLS.schema, latent=3, hidden=(), environment_hidden=(4,), **options)


# ---------------------------------------------------------------------- targets
def test_labels_of_a_data_set_are_plain_and_none_where_unknown() -> None:
    assert LABELS[0] == ""
    assert sorted(str(label) for label in LABELS[1:]) == ["0", "1", "2"]
    table = pd.DataFrame({"targets": [None, "A+B", float("nan")], "is_reference": [True, False, False]})
    assert target_labels(table) == ["", "A+B", None]


def test_labels_that_are_nodes_name_them_and_others_take_the_next() -> None:
    found = target_table(["", "2", "0+1", None], (0, 1, 2))
    expected = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 0], [NAN] * 3])
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert target_table(["", "SPI1", "GATA1", "SPI1"], (0, 1, 2)).tolist() == [[0] * 3, [1, 0, 0], [0, 1, 0], [1, 0, 0]]
    with pytest.raises(ModelError, match=r"2 distinct targets \('A', 'B'\) for 1 latents: raise latent"):
        target_table(["A", "B"], (0,))


def test_known_targets_come_from_the_table_and_unknown_ones_from_the_gate() -> None:
    batch = CELLS.batch()
    net = torch.nn.Linear(4, 3)
    table = target_table(["", "1", None, "2"], (0, 1, 2))
    found = Targets(table, net, TargetGate(0.5))(batch)
    gate = torch.softmax(net(torch.as_tensor(CELLS.representation)) / 0.5, -1)
    for e, expected in enumerate((torch.zeros(3), torch.eye(3)[1], gate[2], torch.eye(3)[2])):
        assert torch.allclose(found[batch.env == e], expected, atol=1e-6)
    learnt = Targets(None, net)(batch)
    assert (learnt[batch.env == 0] == 0).all()  # the reference acts on nothing
    assert learnt[batch.env > 0].sum(-1).detach().numpy() == pytest.approx(1)


def test_environments_outside_the_table_are_the_gate_s_or_refused() -> None:
    outside = CELLS.batch(torch.arange(3)).under(torch.ones(4))
    table = target_table(["", "1", None, "2"], (0, 1, 2))
    assert Targets(table, torch.nn.Linear(4, 3))(outside).sum(-1).detach().numpy() == pytest.approx(1)
    with pytest.raises(ModelError, match="cannot answer for one outside it"):
        Targets(target_table(["", "1", "0", "2"], (0, 1, 2)))(outside)
    with pytest.raises(ModelError, match="some targets are not known and there is no gate"):
        Targets(table)
    with pytest.raises(ModelError, match="some targets are not known and there is no gate"):
        Targets(None)


# ---------------------------------------------------------------------- kinds of intervention
@pytest.mark.parametrize("name", STRUCTURED)
def test_a_hard_intervention_cuts_its_target_and_moves_nothing_else(name: str) -> None:
    model = build(name, interventions="hard", targets=LABELS)
    batch = CELLS.batch()
    assert isinstance(model.regime, HardRegime)
    prior, shift, gain = model.parts(batch)
    assert gain is not None
    on = target_table(LABELS, (0, 1, 2))[batch.env] == 1
    assert torch.equal(gain == 0, on)
    assert torch.equal(gain == 1, ~on)
    moved = prior.base_dist.loc + shift
    assert (moved[~on] == 0).all()
    assert (moved[on] != 0).all()
    if name == "structured_environment_vae":
        assert (prior.base_dist.scale[~on] == 1).all()
        assert (prior.base_dist.scale[on] != 1).all()


@pytest.mark.parametrize("name", STRUCTURED)
def test_a_change_of_mechanism_rescales_the_targets_alone(name: str) -> None:
    model = build(name, interventions="mechanism", targets=LABELS)
    batch = CELLS.batch()
    gain = model.parts(batch)[2]
    assert isinstance(model.regime, MechanismRegime)
    assert gain is not None
    on = target_table(LABELS, (0, 1, 2))[batch.env] == 1
    assert (gain[~on] == 1).all()
    assert (gain[on] != 1).all()
    with torch.no_grad():
        for p in model.regime.net.parameters():
            p.mul_(1e4)
    assert bool(((model.parts(batch)[2] - 1).abs() <= 3).all())  # type: ignore[operator]


@pytest.mark.parametrize("name", STRUCTURED)
def test_noise_on_known_targets_needs_no_regime(name: str) -> None:
    model = build(name, targets=LABELS)
    assert model.regime is None
    part = model.prior if name == "structured_environment_vae" else model.shift
    assert isinstance(part, TargetedPrior | TargetedShift)
    assert part.targets is not None
    assert part.targets.table is not None
    assert type(build("structured_environment_vae").prior) is EnvironmentPrior  # unknown: the sparse prior


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("targets", [LABELS, [*LABELS[:2], None, None], None], ids=["known", "partly", "unknown"])
@pytest.mark.parametrize("interventions", ["noise", "hard", "mechanism"])
@pytest.mark.parametrize("edges", ["all", "order-free"])
def test_every_combination_keeps_the_contract(name: str, targets: object, interventions: str, edges: str) -> None:
    model = build(name, interventions=interventions, targets=targets, edges=edges)
    with torch.no_grad():  # c = z to begin with would hide faults, and gates below the cut have no weight to show
        model.scm.weight.mul_(3.0)  # type: ignore[union-attr, operator]
    guide = amortise(model, CELLS, hidden=(4,))
    with torch.no_grad():
        for p in guide.parameters():
            p.normal_(0, 0.3)
    contracts.check(model, guide, CELLS.batch(torch.arange(0, 80, 4)))


def test_a_saved_run_with_targets_is_read_back(tmp_path: object) -> None:
    model = build("structured_environment_vae", interventions="hard", targets=[*LABELS[:3], None], edges="gated")
    guide = amortise(model, CELLS, hidden=(4,))
    run = fit(model, guide, CELLS, epochs=2, seeds=(0, 1), temperature=(1.0, 0.1), progress=False)
    again = load(run.save(f"{tmp_path}/run"))
    batch = CELLS.batch()
    for k in range(2):
        first, second = run.member(k)[0], again.member(k)[0]
        assert torch.equal(first.parts(batch)[2], second.parts(batch)[2])
        assert torch.equal(first.prior(batch).base_dist.loc, second.prior(batch).base_dist.loc)
    assert not torch.equal(run.member(0)[0].parts(batch)[2], run.member(1)[0].parts(batch)[2])
    assert float(run.model.regime.targets.gate.temperature) == pytest.approx(0.1)


# ---------------------------------------------------------------------- options
@pytest.mark.parametrize("name", STRUCTURED)
def test_options_that_do_not_exist_or_fit_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="unknown interventions 'soft': use 'noise', 'hard' or 'mechanism'"):
        build(name, interventions="soft")
    with pytest.raises(ModelError, match="2 targets for 4 environments: give one label each"):
        build(name, targets=["", "1"])
    with pytest.raises(ModelError, match="unknown edges 'some': use 'all', 'gated' or 'order-free'"):
        build(name, edges="some")
    with pytest.raises(ModelError, match="order-free edges are of a linear layer"):
        build(name, edges="order-free", mechanism="network")


def test_the_causal_layer_has_the_edges_asked_for() -> None:
    assert type(build("structured_environment_vae", edges="order-free").scm) is OrderFreeSCM
    gated = build("structured_environment_vae", edges="gated", cut=0.2).scm
    assert isinstance(gated, LinearSCM)
    assert gated.cut == 0.2
    network = build("structured_environment_vae", edges="gated", mechanism="network").scm
    assert isinstance(network, MechanismSCM)
    assert all(m.cut == 0.05 for m in network.mechanisms)
    plain = build("structured_environment_vae").scm
    assert isinstance(plain, LinearSCM)
    assert plain.cut == 0
    assert isinstance(CELLS.batch(), Batch)
