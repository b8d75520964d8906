"""How well a fitted model finds the latents, causes and targets of a synthetic screen whose truth is known."""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pyro_scm import metrics
from pyro_scm.chance import forked
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, listing
from pyro_scm.mean_predictions import on_device
from pyro_scm.query import abduct, embed, isolated
from pyro_scm.run import Run, members
from pyro_scm.sites import Z

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["recovery"]

FloatArray: TypeAlias = NDArray[np.float64]

_CHUNK = 512


def recovery(run: Run, cells: EnvironmentDataset, adata: "AnnData") -> pd.DataFrame:
    """How well each member finds the latents of a synthetic screen.

    The noise z of a member is taken with the shift of its environment, as the truth's is, so that models that shift z
    in the prior and after it are scored alike. The effect of an environment is the mean of its z minus that of the
    reference.

    Args:
        run: fitted to cells of the screen.
        cells: of `synthetic.dataset`, or a part of them, with some of the reference.
        adata: of `synthetic.simulate`.

    Returns:
        One row a member, with its seed; mcc_z, mcc_c (Pearson, matched one to one), linear_r2_z, linear_r2_c (affine);
        target_precision, target_recall, target_f1 of the effects (see `metrics.target_scores`); and concentration, the
        mean over environments of `metrics.effect_concentration`, in standard deviations of the reference cells' z.

    Raises:
        DataError: cells or a screen that the truth is not known of, or no cells of the reference or any other
            environment.
    """
    true, targets = _truth(cells, adata)
    found = embed(run, cells)
    present = cells.present
    perturbed = present[~cells.reference[present]]
    if len(perturbed) == len(present) or not len(perturbed):
        raise DataError("recovery needs cells of the reference and of another environment: give more of the cells")
    rows = []
    for k, (model, guide) in enumerate(members(run)):
        z, scale = _noise(model, guide, cells, found["z"][k])
        means = np.stack([z[cells.env == e].mean(axis=0) for e in perturbed])
        effects = means - z[cells.reference[cells.env]].mean(axis=0)
        matched, causes = metrics.mcc(true["z"], z), metrics.mcc(true["c"], found["c"][k])
        detected = metrics.target_scores(targets[perturbed], effects, matched.permutation)
        rows.append(
            {
                "seed": run.seeds[k],
                "mcc_z": matched.score,
                "mcc_c": causes.score,
                "linear_r2_z": metrics.linear_r2(true["z"], z),
                "linear_r2_c": metrics.linear_r2(true["c"], found["c"][k]),
                "target_precision": detected.precision,
                "target_recall": detected.recall,
                "target_f1": detected.f1,
                "concentration": float(np.nanmean(metrics.effect_concentration(effects, scale=scale))),
            }
        )
    return pd.DataFrame(rows)


def _truth(cells: EnvironmentDataset, adata: "AnnData") -> tuple[dict[str, FloatArray], NDArray[np.bool_]]:
    """True z and c of the cells, and the targets ``[E, d]`` in the order of their environment table."""
    if "truth" not in adata.uns or "z" not in adata.obsm:
        raise DataError("this AnnData has no uns['truth']: recovery is scored on a screen made by `simulate`")
    rows = adata.obs_names.get_indexer(pd.Index(cells.cells))
    if (rows < 0).any():
        unknown = [name for name, row in zip(cells.cells, rows, strict=True) if row < 0]
        raise DataError(f"{listing(unknown)} are not cells of this screen: give the screen that they come from")
    order = [str(name) for name in adata.obs["perturbation"].cat.categories]
    own = [order.index(str(name)) for name in cells.environments["perturbation"]]
    return {name: np.asarray(adata.obsm[name], np.float64)[rows] for name in ("z", "c")}, np.asarray(
        adata.uns["truth"]["targets"], dtype=bool
    )[own]


def _noise(model: Any, guide: Any, cells: EnvironmentDataset, z: NDArray[np.float32]) -> tuple[FloatArray, FloatArray]:
    """Noise with the shift of each cell's environment, and the standard deviation of posterior draws in the reference.

    Draws, because the posterior means of a latent that the model does not use vary by next to nothing.
    """
    total = z.astype(np.float64)
    with isolated(), forked():
        torch.manual_seed(0)
        if model.shift is not None:
            shifts = [model.shift(batch).cpu().numpy() for batch in on_device(model, cells, _CHUNK)]
            total += np.concatenate(shifts)
        references = cells.subset(cells.reference[cells.env])
        drawn = [abduct(guide, batch, 1)[Z][0].cpu().numpy() for batch in on_device(model, references, _CHUNK)]
    scale = np.concatenate(drawn).astype(np.float64).std(axis=0)
    return total, np.where(scale > 0, scale, 1.0)
