"""Unseen drugs in A375 cells from their SMILES (LINCS L1000, GSE70138 / GSE92742, level 3).

Trained on plate LJP005 (59 compounds) and the compounds of plate LJP009 that are also on it, five by name and one under
another name; the other 57 compounds of LJP009 are predicted from their Morgan fingerprint and dose. Expression is
centred on the vehicle wells of its plate. An environment is a compound at a low (<= 0.37 uM) or high (>= 1.1 uM) dose:
three wells each.

Needs PYRO_SCM_DATA with l1000_a375/.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.launch import UNSEEN_ENVIRONMENT_MODELS, Results, data_folder, launch
from pyro_scm import evaluation
from pyro_scm.data import l1000, splits
from pyro_scm.data.dataset import EnvironmentDataset

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class L1000:
    """Sizes; the seed's section 6.5 has latent 200 and 500 hidden units for 682 environments."""

    latent: int = 20
    hidden: int = 100
    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    bits: int = 1024
    radius: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)
    likelihood: str = "normal"

    @classmethod
    def preset(cls, name: str) -> "L1000":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return L1000(epochs=1, seeds=(0,), hidden=16, bits=64)
        return L1000() if name == "paper" else L1000(epochs=20)


def wells(scale: bool = False) -> "AnnData":
    """Wells of both plates, controls and compounds with a structure, centred on their vehicle wells.

    Args:
        scale: also in units of the vehicle wells' spread.
    """
    folder = data_folder("l1000_a375")
    plates = [folder / "LJP005_A375_24H_X1_level3.gct", folder / "LJP009_A375_24H_X1_level3_qnorm.gct"]
    adata = l1000.centre_on_vehicle(l1000.load_plates(plates, obs=pd.read_csv(folder / "obs.csv.gz")), scale=scale)
    adata = adata[adata.obs["control"].to_numpy(dtype=bool) | adata.obs["smiles"].notna().to_numpy()].copy()
    control = adata.obs["control"].to_numpy(dtype=bool)
    adata.obs["drug"] = np.where(control, "DMSO", adata.obs["perturbation"].astype(str))
    adata.obs.loc[control, "smiles"] = None
    return adata


def read(config: L1000) -> EnvironmentDataset:
    """The wells; the representation is fingerprint and log dose."""
    adata = wells()
    control = adata.obs["control"].to_numpy(dtype=bool)
    dose = adata.obs["dose"].astype(float)
    level = np.where(control, 0.0, np.where(dose <= 0.5, 0.12, 3.3))
    adata.obs["dose_level"] = level
    return EnvironmentDataset.from_anndata(
        adata,
        environment="drug",
        control="DMSO",
        dose="dose_level",
        smiles="smiles",
        representation=("morgan", "dose"),
        radius=config.radius,
        bits=config.bits,
    )


def main(config: L1000) -> Results:
    cells = read(config)
    plate = cells.obs["plate"].to_numpy().astype(str)
    table = cells.environments
    drugs = {p: set(cells.obs.loc[np.char.startswith(plate, p), "drug"]) - {"DMSO"} for p in ("LJP005", "LJP009")}
    # a compound that was trained on under another name is not unseen: names are not enough to tell
    names = table["perturbation"].to_numpy()
    prints = {str(n): r[: config.bits].tobytes() for n, r in zip(names, cells.representation, strict=True)}
    known = {prints[n] for n in drugs["LJP005"]}
    unseen = [n for n in sorted(drugs["LJP009"]) if prints[n] not in known]
    held_out = [str(n) for n in table.index[table["perturbation"].isin(unseen)]]
    split = splits.by_environment(cells, held_out=held_out)
    # the vehicle wells of the held-out plate are what its compounds are compared with, and are not trained on
    vehicle = cells.reference[cells.env]
    theirs = vehicle & np.char.startswith(plate, "LJP009")
    rows = np.flatnonzero(~theirs)
    split = replace(split, train=split.train.subset(np.isin(split.train.origin, rows)))
    options = {
        name: {"latent": config.latent, "hidden": (config.hidden,), "likelihood": config.likelihood, **given}
        for name, given in UNSEEN_ENVIRONMENT_MODELS.items()
    }
    comparison = evaluation.compare(
        split,
        options,
        seeds=config.seeds,
        references=cells.subset(theirs),
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        schedule="cosine",
    )
    high = comparison.scores[comparison.scores["environment"].isin(table.index[table["dose"] > 1])]
    return Results(
        tables={
            "summary_high_dose": evaluation.Comparison(high).brief(),
            "summary": comparison.brief(),
            "scores": comparison.scores,
        },
        figures={"scores": comparison.figure(), "scores_high_dose": evaluation.Comparison(high).figure()},
        text=(
            f"{len(split.train)} training wells, {len(split.test)} held-out wells of {len(unseen)} unseen compounds; "
            f"{len(cells.genes)} genes."
        ),
    )


if __name__ == "__main__":
    raise SystemExit(launch(__file__, L1000, main))
