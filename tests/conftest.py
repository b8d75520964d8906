import os
from pathlib import Path

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_pyro() -> None:
    """One thread, one seed and an empty parameter store for every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.clear_param_store()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the real data sets."""
    folder = os.environ.get("PYRO_SCM_DATA")
    if not folder:
        pytest.skip("PYRO_SCM_DATA is not set: name the folder with the real data sets")
    return Path(folder)
