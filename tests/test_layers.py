"""Imports point one way: the table below says which module may import which."""

import ast
import functools
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyro_scm

ROOT = Path(__file__).resolve().parent.parent

# A module may import modules of earlier rows only, never one of its own row. A new module goes into the first row after
# everything that it imports; if that is too far up for what it is, it imports too much.
LAYERS = (
    # words
    "chance errors sites threads",
    "nn batch distributions graphs ordering directions orders signal_space",
    # the parts of a model
    "handlers dosers",
    "scm priors likelihoods composition",
    "shifts regimes masks attention",
    "model",
    # data
    "data data.checks data.chemcpa_files data.chemistry data.download data.gct",
    "data.representations data.l1000 data.stored",
    "data.dataset",
    "data.splits data.single_cell data.synthetic",
    "data.leaks",
    # named models and what is minimised
    "models.building",
    "models.ae models.vae models.conditional_vae models.environment_vae models.translation_vae"
    " models.structured_environment_vae models.structured_translation_vae models.adversarial_prior_ae"
    " models.cpa models.chemcpa models.multicpa models.scgen models.sams_vae models.svae_plus models.discrepancy_vae"
    " models.latent_additive models.decoder_only",
    "models",
    "objectives.elbo",
    "objectives.importance objectives.irm objectives.counterfactual objectives.structure objectives.sparsity"
    " objectives.independence",
    "objectives.compositional objectives.discrepancy",
    "objectives",
    "linear_gaussian hard_gaussian hard_network",
    # training
    "ensemble checkpoints feeding parallel recording",
    "run",
    "training coordinates effects",
    # what is asked of a trained model
    "metrics.arguments",
    "metrics.prediction metrics.rotation",
    "metrics.distances metrics.recovery",
    "metrics.graph metrics.uncertainty metrics.probe metrics.intervals",
    "metrics",
    "actions conditions",
    "abduction couplings",
    "support effect_spectrum",
    "counterfactuals",
    "contrasts simulations",
    "mediation",
    "infer query baselines gate hill",
    "soundness counterfactual_recovery comparison mean_predictions posterior_draws posterior_files contracts"
    " report programmes identify unmixing dictionaries",
    "structure_search latent_recovery probing posterior criticism.verdicts",
    "criticism.ranks criticism.predictive criticism.members",
    "criticism.weights criticism.simulation criticism.coverage",
    "criticism.suite",
    "criticism",
    # models with their guides: from here on `guides` is known
    "recipes",
    "evaluation pretraining",
    "demo tuning doses combinations agreement",
    # the command line
    "cli.parsing cli.outputs",
    "cli.pictures cli.inputs cli.models cli.data cli.demo cli.simulate",
    "cli.runs",
    "cli.fit cli.check cli.predict cli.counterfactual cli.embed cli.identify cli.unmix"
    " cli.dictionary cli.dose_response cli.interactions cli.scatter",
    "cli.compare",
    "cli.evaluate cli.tune",
    "cli",
    "__main__",
)
GUIDES = ("guides.encoders guides.mean_field", "guides.amortise", "guides")
GUIDES_MAY_IMPORT = {"nn", "sites", "batch", "distributions", "errors"}

# Beyond the order of rows: who may import these at all.
ONLY_FOR = {
    "guides": {"recipes"},
    "recipes": {"evaluation", "pretraining", "demo", "tuning", "cli"},
    "cli": {"__main__"},
    "demo": {"cli"},
    "pyro_scm": {"cli"},  # the lazy names of the package itself
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
HEAVY = ("torch", "pyro", "anndata", "scanpy", "arviz", "matplotlib", "sklearn", "rdkit", "pandas", "h5py", "networkx")


# ---------------------------------------------------------------------- reading the code
def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


@functools.cache
def modules() -> dict[str, Path]:
    """Short name -> file: ``scm``, ``data.dataset``, ``data`` for a package, ``guides.amortise``."""
    found = {}
    for path in sources("pyro_scm", "guides"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(p for p in parts if p != "__init__").removeprefix("pyro_scm").removeprefix(".")
        if name:
            found[name] = path
    return found


def imports(code: str, package: str = "") -> set[str]:
    """Short names of what code imports from this repository, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}: write imports in full, from pyro_scm.part import name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "pyro_scm":
                found.add(_module_of(rest) or "pyro_scm")
            elif top == "guides":
                found.add(_module_of(name) or "guides")
            elif top in ("experiments", "tests"):
                found.add(top)
    return found


def _module_of(name: str) -> str:
    """The longest prefix of a dotted name that is a module."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name


@functools.cache
def imported_by(name: str) -> set[str]:
    return imports(modules()[name].read_text(encoding="utf-8"), name)


def ranks(layers: tuple[str, ...]) -> dict[str, int]:
    rows = {name: row for row, names in enumerate(layers) for name in names.split()}
    assert len(rows) == sum(len(names.split()) for names in layers), "a module stands in the table twice"
    return rows


# ---------------------------------------------------------------------- the table
@pytest.mark.parametrize("name", sorted(modules()))
def test_every_module_imports_from_earlier_rows_only(name: str) -> None:
    rows = ranks(GUIDES if name.partition(".")[0] == "guides" else LAYERS)
    assert name in rows, (
        f"{modules()[name].relative_to(ROOT)} is not in the table of layers: add {name!r} to tests/test_layers.py, in "
        f"the first row after all that it imports ({', '.join(sorted(imported_by(name))) or 'nothing'})"
    )
    for other in imported_by(name) & rows.keys():
        assert rows[other] < rows[name], (
            f"{name} imports {other}, which stands in "
            + ("the same row" if rows[other] == rows[name] else "a later row")
            + " of the table in tests/test_layers.py: imports point to earlier rows only"
        )


def test_the_table_lists_no_module_that_is_gone() -> None:
    assert sorted((ranks(LAYERS) | ranks(GUIDES)).keys() - modules().keys()) == []


@pytest.mark.parametrize("name", sorted(modules()))
def test_some_modules_are_for_few(name: str) -> None:
    top = name.partition(".")[0]
    for other in imported_by(name):
        target = other.partition(".")[0]
        assert target not in ("experiments", "tests"), f"{name} imports {other}: the library stands on its own"
        if target in ONLY_FOR and target != top:
            assert top in ONLY_FOR[target], f"{name} imports {other}: only {sorted(ONLY_FOR[target])} may"


@pytest.mark.parametrize("name", [n for n in sorted(modules()) if n.partition(".")[0] == "guides"])
def test_guides_know_little_of_the_library(name: str) -> None:
    foreign = {other for other in imported_by(name) if other.partition(".")[0] != "guides"}
    assert foreign <= GUIDES_MAY_IMPORT


def test_experiments_use_the_library_not_the_command_line() -> None:
    for path in sources("experiments"):
        used = {name.partition(".")[0] for name in imports(path.read_text(encoding="utf-8"), path.name)}
        assert not used & {"cli", "demo", "tests"}, path


def test_the_reader_of_imports_sees_every_kind() -> None:
    assert imports("import os, torch\nfrom collections import abc") == set()
    assert imports("from pyro_scm.data.dataset import EnvironmentDataset") == {"data.dataset"}
    assert imports("from pyro_scm.data import splits, synthetic") == {"data.splits", "data.synthetic"}
    assert imports("from pyro_scm import graphs, metrics") == {"graphs", "metrics"}
    assert imports("from pyro_scm import do, fit") == {"pyro_scm"}
    assert imports("import pyro_scm as ps") == {"pyro_scm"}
    assert imports("import pyro_scm.scm") == {"scm"}
    assert imports("def f():\n    from pyro_scm.objectives import Objective") == {"objectives"}
    assert imports("if TYPE_CHECKING:\n    from guides.encoders import GaussianEncoder") == {"guides.encoders"}
    assert imports("import guides\nfrom experiments import launch") == {"guides", "experiments"}
    with pytest.raises(AssertionError, match="write imports in full"):
        imports("from . import scm")


# ---------------------------------------------------------------------- the package itself
def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, pyro_scm; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_asking_the_command_line_for_help_loads_nothing_heavy() -> None:
    code = (
        f"import sys; from pyro_scm.cli import build_parser; build_parser().format_help(); "
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_what_type_checkers_are_told() -> None:
    tree = ast.parse((ROOT / "pyro_scm" / "__init__.py").read_text(encoding="utf-8"))
    told = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pyro_scm":
            told |= {alias.name: node.module for alias in node.names}
    assert set(told) == set(pyro_scm.__all__) == set(dir(pyro_scm))
    for name, place in told.items():
        is_module = name in modules()
        module = importlib.import_module(f"{place}.{name}" if is_module else str(place))
        expected = module if is_module else getattr(module, name)
        assert getattr(pyro_scm, name) is expected, name
        assert expected.__doc__, name
    with pytest.raises(AttributeError, match="module 'pyro_scm' has no attribute 'wings'"):
        pyro_scm.wings


# ---------------------------------------------------------------------- what is nowhere
def test_no_file_is_named_for_having_no_subject() -> None:
    named = [p for p in sources("pyro_scm", "guides", "experiments", "tests") if p.stem.strip("_") in FORBIDDEN_NAMES]
    assert named == []


PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def unsafe(code: str) -> list[str]:
    """What in the code could run somebody else's: pickles, and readers that fall back on them."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES:
            found.append(str(node.module))
        elif isinstance(node, ast.Attribute) and node.attr in ("read_pickle", "to_pickle"):
            found.append(node.attr)
        elif isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            name = ast.unparse(node.func)
            if given.get("allow_pickle", "False") != "False":
                found.append(f"{name}(allow_pickle={given['allow_pickle']})")
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if name.endswith("get_param_store().load"):
                found.append(name)
    return found


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    import os, joblib.memory", "joblib.memory"),
        ("from cloudpickle import dumps", "cloudpickle"),
        ("np.load(path, allow_pickle=True)", "np.load(allow_pickle=True)"),
        ("np.load(path, allow_pickle=trusted)", "np.load(allow_pickle=trusted)"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("pyro.get_param_store().load(path)", "pyro.get_param_store().load"),
        ("pd.read_pickle(path)", "read_pickle"),
    ],
)
def test_the_search_for_pickles_finds_them(code: str, fault: str) -> None:
    assert unsafe(code) == [fault]


def test_safe_readers_are_not_mistaken_for_pickles() -> None:
    assert unsafe("torch.load(p, weights_only=True); np.load(p, allow_pickle=False); np.load(p); json.load(f)") == []
    assert unsafe("'import pickle'; pyro.get_param_store().clear()") == []


def test_nothing_loads_a_pickle() -> None:
    found = {
        str(path.relative_to(ROOT)): faults
        for path in sources("pyro_scm", "guides", "experiments")
        if (faults := unsafe(path.read_text(encoding="utf-8")))
    }
    assert found == {}
