"""Small drug screens with doses, combinations, two cell types and proteins, whose additive truth is known."""

import functools
from typing import Any

import anndata
import numpy as np
import pandas as pd

from pyro_scm.data.dataset import EnvironmentDataset

GENES = 12
CONDITIONS = (("DMSO", "0"), ("A", "1"), ("A", "10"), ("B", "1"), ("B", "10"), ("C", "10"), ("A+B", "10+10"))
SMILES = {"DMSO": "", "A": "CCO", "B": "CCN", "C": "c1ccccc1O", "A+B": "CCO..CCN"}
DIRECTIONS = {"A": (3.0, 0.0, 0.0), "B": (0.0, 3.0, 0.0), "C": (-2.0, 0.0, 2.0)}


@functools.cache
def screen(counts: bool = False, cells: int = 30) -> anndata.AnnData:
    """x = W (z + sum of doses' effects + cell type) + noise, W positive in blocks of four genes."""
    rng = np.random.default_rng(0)
    rows = [(p, d, t) for p, d in CONDITIONS for t in ("T", "B") for _ in range(cells)]
    z = 0.5 * rng.normal(size=(len(rows), 3))
    for own, (perturbation, dose, cell_type) in zip(z, rows, strict=True):
        for part, amount in zip(perturbation.split("+"), dose.split("+"), strict=True):
            own += np.array(DIRECTIONS.get(part, (0, 0, 0))) * np.log10(1 + float(amount)) / np.log10(11)
        own += (0, 0, 2.0) if cell_type == "T" else 0
    decoder = np.kron(np.eye(3), np.array([1.0, 0.8, -0.6, 0.5]))
    x = z @ decoder
    x = rng.poisson(20 * np.exp(0.4 * x)) if counts else x + 0.3 * rng.normal(size=x.shape)
    proteins = rng.poisson(np.exp(1 + 0.8 * np.clip(z[:, [0, 1, 2, 2]], -1, 3))).astype(float)
    obs = pd.DataFrame(rows, columns=["drug", "dose", "cell_type"], index=[f"cell{i}" for i in range(len(rows))])
    obs["smiles"] = obs["drug"].map(SMILES)
    adata = anndata.AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(GENES)]))
    adata.obsm["protein"] = pd.DataFrame(proteins, adata.obs_names, ["CD3", "CD4", "CD8", "CD19"])
    return adata


def cells(representation: Any = "multi-dose", counts: bool = False, **options: Any) -> EnvironmentDataset:
    """The cells of `screen`; environments are drugs at doses."""
    given: dict[str, Any] = {"smiles": "smiles", "bits": 64, "covariates": ("cell_type",), "proteins": "protein"}
    return EnvironmentDataset.from_anndata(
        screen(counts), environment="drug", control="DMSO", dose="dose", representation=representation,
        **{**given, **options},
    )  # fmt: skip
