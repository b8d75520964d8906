"""Nothing needs the CPU but what asks for it: everything runs on a device made of Python, with the CPU's own numbers.

The device ``pretend`` keeps its tensors apart from those of the CPU, as a GPU does, and computes on the CPU. An
operation that mixes the two raises an error, as on a GPU, and so do the few that a GPU would answer with a silent copy.

Torch cannot forget a device, nor learn of one once it has differentiated anything: these tests need a process of their
own, which `test_devices.py` starts (pytest does not look for tests in a file of this name by itself).
"""

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

from experiments.benchmarks import gpu
from guides import amortise
from pyro_scm import evaluation, feeding, posterior, query, recipes
from pyro_scm.baselines import BASELINES
from pyro_scm.batch import Batch
from pyro_scm.contracts import check
from pyro_scm.data import splits
from pyro_scm.distributions import normal
from pyro_scm.infer import fit
from pyro_scm.likelihoods import likelihood_for
from pyro_scm.model import LatentModel
from pyro_scm.nn import mlp
from pyro_scm.objectives import Adversary, Objective, Penalty, World
from pyro_scm.run import Run
from tests import screens

NAME = "pretend"
DEVICE = f"{NAME}:0"
MOVES = ("_to_copy", "copy_", "_copy_from")


# ---------------------------------------------------------------------- the device
class Pretend(torch.Tensor):
    """A tensor of the device; `kept` holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    kept: Tensor

    @staticmethod
    def __new__(cls, kept: Tensor) -> "Pretend":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            kept.size(),
            strides=kept.stride(),
            storage_offset=kept.storage_offset(),
            dtype=kept.dtype,
            device=torch.device(DEVICE),
        )
        made.kept = kept
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretend({self.kept})"

    def tolist(self) -> Any:
        moved(1)
        return self.kept.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        strangers = [tuple(t.shape) for t in given if not isinstance(t, Pretend) and t.dim()]
        leaves = torch.device(kwargs.get("device") or DEVICE).type == "cpu"
        if strangers and name not in MOVES:
            raise RuntimeError(f"{name} mixes tensors of two devices: those of shape {strangers} are the CPU's")
        if leaves or strangers or name == "_local_scalar_dense":
            moved(name)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        values, named = tree_map(lambda t: t.kept if isinstance(t, Pretend) else t, (args, kwargs))
        result = func(*values, **named)
        written = [
            args[i] if i < len(args) else kwargs[argument.name]
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written:  # in place: the very tensors that were given
            assert all(t.shape == plain(t).shape for t in tree_leaves(written)), f"{name} resizes a tensor"
            return (written[0] if len(func._schema.returns) == 1 else tuple(written)) if func._schema.returns else None
        return result if leaves else tree_map(lambda t: Pretend(t) if isinstance(t, Tensor) else t, result)


WATCH: list[Counter[Any]] = []


def moved(what: Any) -> None:
    """Count what a GPU would have to be waited for."""
    for counter in WATCH:
        counter[what] += 1


def plain(tensor: Tensor) -> Tensor:
    return tensor.kept if isinstance(tensor, Pretend) else tensor


class Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    """What torch asks of a device; autocast does nothing here."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@functools.cache
def registered() -> torch.library.Library:
    """The device, made known to torch; it cannot be taken back."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    library = torch.library.Library("aten", "IMPL")

    def make(operation: Any, *args: Any, **kwargs: Any) -> Tensor:
        return Pretend(operation(*args, **{**kwargs, "device": torch.device("cpu"), "pin_memory": False}))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        plain(target).copy_(plain(source))
        return target

    aten = torch.ops.aten
    # all other factories fill what these have made
    for factory in (aten.empty.memory_format, aten.empty_strided.default, aten.eye.default, aten.arange.default,
                    aten.arange.start, aten.arange.start_step):  # fmt: skip
        library.impl(factory.name().partition("::")[2], functools.partial(make, factory), "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


class Generator(torch.Generator):
    """Random numbers on the device: the CPU's, so that results can be compared to the last bit."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls) if torch.device(device).type == NAME else REAL(device)

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return torch.device(DEVICE)


REAL = torch.Generator


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    registered()
    monkeypatch.setattr(torch, "Generator", Generator)


@pytest.fixture
def watch() -> Iterator[Counter[Any]]:
    WATCH.append(Counter())
    yield WATCH[-1]
    WATCH.pop()


def test_the_device_is_apart_as_a_gpu_is() -> None:
    x, y = torch.randn(3, 4, device=NAME), torch.randn(3, 4)
    assert (x.device.type, (x + torch.tensor(1.0)).device.type, y.to(NAME).device.type) == (NAME, NAME, NAME)
    for mix in (
        lambda: x + y,
        lambda: torch.cat((x, y)),
        lambda: nn.functional.linear(x, y),
        lambda: torch.where(x > 0, x, y),
        lambda: x.index_select(0, torch.tensor([1])),
        lambda: x[torch.tensor([1])],
        lambda: torch.func.vmap(lambda a: a + y[0])(x),
    ):
        with pytest.raises(RuntimeError, match="mixes tensors of two devices"):
            mix()
    with pytest.raises(TypeError, match="can't convert pretend"):
        x.numpy()
    torch.testing.assert_close((x.cpu() + y).tolist(), (x + y.to(NAME)).tolist(), rtol=0, atol=0)


def test_the_device_differentiates_and_draws_as_the_cpu_does() -> None:
    layer = nn.Linear(4, 2)
    x = torch.randn(3, 4, generator=torch.Generator(NAME).manual_seed(5), device=NAME)
    assert x.tolist() == torch.randn(3, 4, generator=torch.Generator().manual_seed(5)).tolist()
    expected = torch.autograd.grad(layer(x.cpu()).square().sum(), list(layer.parameters()))
    found = torch.autograd.grad(layer.to(NAME)(x).square().sum(), list(layer.parameters()))
    assert [g.tolist() for g in found] == [g.tolist() for g in expected]
    assert found[0].device.type == NAME


# ---------------------------------------------------------------------- training
def histories(run: Run) -> pd.DataFrame:
    return run.history.drop(columns="seconds")


def same_training(name: str, data: Any, options: Any = None, **settings: Any) -> Run:
    """A model trained on the CPU and on the device: the same numbers, and the parameters where they belong."""
    runs = []
    for device in ("cpu", NAME):
        model, guide = screens.make(name, data.schema, **(options or {}))
        chosen: Any = {"epochs": 2, "batch_size": 60, "progress": False, "seeds": (0, 1), **settings}
        chosen = {key: value() if callable(value) else value for key, value in chosen.items()}
        runs.append(fit(model, guide, data, device=device, **chosen))
    cpu, own = runs
    pd.testing.assert_frame_equal(histories(own), histories(cpu), check_exact=True)
    assert {p.device.type for p in own.parameters.values()} == {NAME}
    assert {t.device.type for m in (own.model, own.guide) for t in (*m.parameters(), *m.buffers())} == {NAME}
    for parameter, value in own.parameters.items():
        assert torch.equal(plain(value), cpu.parameters[parameter]), parameter
    return own


@pytest.mark.parametrize("observation", screens.KINDS)
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_model_trains_there_as_on_the_cpu(name: str, observation: str) -> None:
    same_training(name, screens.cells(observation))


@pytest.mark.parametrize("name", ["ae", "structured_environment_vae"])
def test_one_member_trains_there_as_on_the_cpu(name: str) -> None:
    same_training(name, screens.cells("negative-binomial"), seeds=(3,))


@pytest.mark.parametrize(
    "options",
    [
        {"conditioning": "film"},
        {"inputs": ("x", "e", "plate")},
        {"inputs": ("x", "e", "plate"), "conditioning": "film"},
        {"sparsity": "top-k", "scale": False},
        {"sparsity": "dense"},
        {"likelihood": "normal-fixed"},
        {"likelihood": "student-t"},
        {"mechanism": "network"},
        {"guide_hidden": (), "hidden": ()},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_every_part_trains_there_as_on_the_cpu(options: dict[str, Any]) -> None:
    same_training("structured_environment_vae", screens.cells(), options)


def held_out() -> splits.Split:
    return splits.by_row(screens.cells(), fraction=0.3)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": lambda: Objective(penalties={"env": Adversary(nn.Linear(3, 4), weight=0.5)}), "critic_steps": 2},
        {"objective": lambda: Objective(particles=3, kl_weight=0.5)},
        {"schedule": "cosine", "clip": 0.1, "weight_decay": 0.1, "kl_warmup": 0.5},
        {"temperature": (1.0, 0.1)},
        {"validation": lambda: held_out().test, "patience": 1, "epochs": 4},
        {"fresh": False},
        {"epochs": 12, "batch_size": 20},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_way_of_training_is_the_same_there(settings: dict[str, Any]) -> None:
    same_training("environment_vae", held_out().train, **settings)


def test_cells_that_do_not_fit_there_are_brought_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "_RESIDENT_BYTES", 0)
    same_training("translation_vae", screens.cells("negative-binomial"))


def test_a_step_moves_no_tensor_and_waits_for_the_device_twice_at_most(watch: Counter[Any]) -> None:
    """A GPU idles while Python waits for a number; those of a step say whether the gradient is finite, and too long."""
    found = []
    for size in (25, 10):  # 4 and 10 steps an epoch
        watch.clear()
        screens.train(epochs=2, batch_size=size, device=NAME, seeds=(0, 1))
        found.append(watch.copy())
    steps = {name: (found[1][name] - found[0][name]) / 12 for name in found[1]}
    assert steps.pop("_local_scalar_dense") <= 2
    assert set(steps.values()) == {0}, steps


def test_a_training_goes_on_there_where_it_stopped(tmp_path: Any) -> None:
    settings: Any = {"device": NAME, "validation": screens.cells(), "kl_warmup": 0.0}
    whole = screens.train(epochs=4, **settings)
    screens.train(epochs=2, checkpoint=tmp_path, **settings)
    again = screens.train(epochs=4, checkpoint=tmp_path, **settings)
    pd.testing.assert_frame_equal(histories(again), histories(whole), check_exact=True)
    assert {name: value.tolist() for name, value in again.parameters.items()} == {
        name: value.tolist() for name, value in whole.parameters.items()
    }


class Prior(nn.Module):
    """z ~ N(centre, spread^2), both latent; their own priors are buffers, as they must be to follow the model."""

    latent = 3

    def __init__(self) -> None:
        super().__init__()
        self.zeros: Tensor
        self.register_buffer("zeros", torch.zeros(3))

    def forward(self, batch: Batch) -> dist.Independent:
        spread = pyro.sample("spread", dist.Gamma(self.zeros[0] + 4.0, self.zeros[0] + 4.0))
        centre = pyro.sample("centre", dist.Normal(self.zeros, 1.0).to_event(1))
        return normal(centre.expand(len(batch), 3), spread.unsqueeze(-1).expand(len(batch), 3))


def hierarchical() -> tuple[LatentModel, nn.Module]:
    schema = screens.cells().schema
    model = LatentModel(Prior(), likelihood_for(schema, mlp(3, (6,), len(schema.genes))))
    return model, amortise(model, schema, hidden=(7,))


def test_sites_outside_the_plate_are_inferred_there() -> None:
    runs = []
    for device in ("cpu", NAME):
        model, guide = hierarchical()
        runs.append(fit(model, guide, screens.cells(), seeds=(0, 1), epochs=2, progress=False, device=device))
    pd.testing.assert_frame_equal(histories(runs[1]), histories(runs[0]), check_exact=True)


class Forgetful(Penalty):
    """A penalty with a tensor that is no buffer, so that nothing moves it: what these tests are there to find."""

    def __init__(self) -> None:
        super().__init__()
        self.target = torch.ones(3)

    def penalty(self, world: World) -> Tensor:
        return (world.guide["z"]["value"] - self.target).square().sum()


def test_a_tensor_that_stayed_behind_is_found() -> None:
    objective = Objective(penalties={"pull": Forgetful()})
    screens.train(objective=objective, device="cpu")
    with pytest.raises(Exception, match="mixes tensors of two devices: those of shape"):
        screens.train(objective=objective, device=NAME)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_contract_holds_there(name: str) -> None:
    data = screens.cells("negative-binomial")
    model, guide = screens.make(name, data.schema)
    objective = screens.objective(name, model)
    for penalty in objective.penalties.values() if objective is not None else ():
        penalty.to(NAME)
    check(model.to(NAME), guide.to(NAME), data.batch(np.arange(20)).to(NAME), objective)


def test_usual_pyro_trains_the_model_there() -> None:
    data = screens.cells()
    losses = []
    for device in ("cpu", NAME):
        pyro.clear_param_store()
        model, guide = screens.make("environment_vae", data.schema)
        svi = pyro.infer.SVI(model.to(device), guide.to(device), pyro.optim.Adam({"lr": 1e-2}), Objective())
        torch.manual_seed(2)
        losses.append([svi.step(data.batch().to(device)) for _ in range(3)])
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------- questions
@functools.cache
def trained(observation: str) -> Run:
    """Two members, on the CPU."""
    return screens.train("structured_environment_vae", screens.cells(observation), seeds=(0, 1), epochs=2, device="cpu")


def there(observation: str) -> Run:
    """The same on the device."""
    run = trained(observation)
    model, guide = screens.make("structured_environment_vae", screens.cells(observation).schema)
    model.load_state_dict(run.model.state_dict())
    guide.load_state_dict(run.guide.state_dict())
    return Run(**{**vars(run), "model": model, "guide": guide}).to(NAME)


def laws(device: str) -> dict[str, Any]:
    return {"c_0": dist.Normal(torch.tensor(1.0, device=device), torch.tensor(0.5, device=device))}


QUESTIONS: dict[str, Any] = {
    "factual": lambda run, cells: query.counterfactual(run, cells),
    "do a number": lambda run, cells: query.counterfactual(run, cells, do={"c_1": 2.0}, draws=3),
    "do a value for each cell": lambda run, cells: query.counterfactual(run, cells, do={"c_1": np.arange(len(cells))}),
    "do a tensor": lambda run, cells: query.counterfactual(run, cells, do={"c_1": torch.arange(len(cells))}, draws=2),
    "do a function": lambda run, cells: query.counterfactual(run, cells, do={"c_0": lambda c: c + 1, "c_2": 0.0}),
    "another environment": lambda run, cells: query.counterfactual(run, cells, environment="env_2", draws=2),
    "drawn expression": lambda run, cells: query.counterfactual(run, cells, do={"c_1": 1.0}, draws=2, sample=True),
    "noise": lambda run, cells: query.counterfactual(run, cells, noise=laws("cpu"), draws=2),
    "effect": lambda run, cells: query.effect(run, cells, do={"c_1": 1.0}, versus={"c_1": -1.0}),
    "sweep": lambda run, cells: query.sweep(run, cells, [-1.0, 1.0]),
    "sweep of some": lambda run, cells: query.sweep(run, cells, [2.0], ["c_2"], expression=False),
    "predict": lambda run, cells: query.predict(run, "env_1", cells=12),
    "predict the mean": lambda run, cells: query.predict(run, "env_1", cells=12, mean=True),
    "predict the unknown": lambda run, cells: query.predict(run, np.ones(len(cells.features)), cells=12),
    "embed": lambda run, cells: query.embed(run, cells),
    "means": lambda run, cells: evaluation.predict_means(run, cells, ["env_1", "env_3"], cells=20),
}


def arrays(answer: Any) -> list[Any]:
    if isinstance(answer, np.ndarray):
        return [answer]
    values = answer.values() if isinstance(answer, dict) else vars(answer).values()
    return [value for value in values if isinstance(value, np.ndarray)]


@pytest.mark.parametrize("observation", screens.KINDS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_has_the_same_answer_there(question: str, observation: str) -> None:
    cells = screens.cells(observation)
    expected, found = (arrays(QUESTIONS[question](run, cells)) for run in (trained(observation), there(observation)))
    assert expected
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(b, a)


@pytest.mark.parametrize("given", [1.5, "a tensor"])
def test_interventions_on_the_program_itself_run_there(given: Any) -> None:
    run, batch = there("gaussian"), screens.cells().batch(np.arange(10)).to(NAME)
    value = torch.arange(10.0, device=NAME) if given == "a tensor" else given
    for program in (
        query.do(run.model, {"c_1": value}),
        pyro.poutine.do(run.model, data={"c_1": torch.as_tensor(value)}),
    ):
        with torch.no_grad():
            trace = pyro.poutine.trace(query.expose(program) if given == 0 else program).get_trace(batch)
        assert trace.nodes["c"]["value"].device.type == NAME
        assert trace.nodes["c"]["value"][:, 1].tolist() == (list(range(10)) if given == "a tensor" else [1.5] * 10)


def test_a_noise_intervention_with_tensors_of_the_device_runs_there() -> None:
    run, batch = there("gaussian"), screens.cells().batch(np.arange(10)).to(NAME)
    with torch.no_grad():
        trace = pyro.poutine.trace(query.noise(run.model, laws(NAME))).get_trace(batch)
    assert trace.nodes["c"]["value"].device.type == NAME


def test_models_are_compared_there_as_on_the_cpu() -> None:
    split = splits.by_environment(screens.cells("negative-binomial"), held_out=["env_3"])
    options: Any = {"baselines": tuple(BASELINES), "degs": 0, "seeds": (0, 1), "epochs": 2, "progress": False}
    models = {"environment_vae": screens.options("environment_vae")}
    tables = [evaluation.compare(split, models, device=device, **options).scores for device in ("cpu", NAME)]
    pd.testing.assert_frame_equal(tables[1], tables[0], check_exact=True)


def test_posteriors_are_handed_over_from_there() -> None:
    cells = screens.cells().subset(np.arange(12))
    found = [posterior.to_arviz(run, cells, draws=5) for run in (trained("gaussian"), there("gaussian"))]
    np.testing.assert_array_equal(found[1].posterior["z"], found[0].posterior["z"])


def test_a_run_there_is_saved_and_read_on_the_cpu(tmp_path: Any) -> None:
    again = recipes.load(there("gaussian").save(tmp_path))
    assert {p.device.type for p in again.parameters.values()} == {"cpu"}
    assert all(torch.equal(value, trained("gaussian").parameters[name]) for name, value in again.parameters.items())


def test_the_benchmark_puts_everything_on_the_device_and_compares_it_with_the_cpu(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", NAME, "--small", "--parts", "agreement,ensemble", "--out", str(tmp_path / "gpu.csv")]
    assert gpu.main(words) == 0
    table = pd.read_csv(tmp_path / "gpu.csv")
    assert (table["part"] == "agreement").sum() == 2 * len(recipes.RECIPES)
    assert table["gradient_difference"].max() == 0
    monkeypatch.setattr(gpu, "TOLERANCE", -1.0)
    assert gpu.main([*words, "--parts", "agreement"]) == 1
    assert "DISAGREES" in capsys.readouterr().out
