"""What holds for all metrics: names, docstrings, imports, input that is no dense array of numbers."""

import importlib
import pkgutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse

from pyro_scm import metrics
from pyro_scm.errors import DataError, PyroScmError


def test_sparse_input_is_named_with_its_cure():
    with pytest.raises(
        DataError, match=r"truth is not a dense array of numbers .* a sparse matrix needs \.toarray\(\)"
    ):
        metrics.energy_distance(scipy.sparse.eye_array(3, format="csr"), np.eye(3))
    with pytest.raises(PyroScmError, match="prediction is not a dense array of numbers"):
        metrics.r2([1.0, 2.0], ["a", "b"])


def test_every_score_states_its_direction_arguments_and_result():
    for name in metrics.__all__:
        assert getattr(metrics, name).__doc__, name
    results = {"Angle", "Calibration", "DCI", "Detection", "Interval", "Matching", "Probe"}
    not_scores = {"bootstrap_interval", "median_bandwidth", "paired_difference"}
    scored = set(metrics.__all__) - results - not_scores
    for name in sorted(scored):
        text = getattr(metrics, name).__doc__
        assert "better" in text or "best" in text, f"{name} does not say which direction is better"
        assert "Args:" in text, name
        assert "Returns:" in text, name


def test_every_public_name_of_a_module_is_exported_by_the_package():
    names = [module.name for module in pkgutil.iter_modules(metrics.__path__) if module.name != "arguments"]
    places = [importlib.import_module(f"pyro_scm.metrics.{name}") for name in names]
    defined = {
        name
        for place in places
        for name, value in vars(place).items()
        if getattr(value, "__module__", None) == place.__name__ and not name.startswith("_")
    }
    assert defined - {"detection", "determination", "deviations"} == set(metrics.__all__)  # three that modules share


def test_the_package_is_imported_without_its_heavy_dependencies():
    code = "import sys, pyro_scm.metrics; print({'scipy.stats', 'sklearn', 'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
