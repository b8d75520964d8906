"""`to_arviz`: a fitted ensemble as `arviz.InferenceData`, its members as chains."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine

from pyro_scm.chance import forked
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError
from pyro_scm.query import abduct, isolated, member_count
from pyro_scm.run import Fitted, members
from pyro_scm.sites import C, X, Z

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["to_arviz"]

_LARGEST = 4 << 30


def to_arviz(fitted: Fitted, cells: EnvironmentDataset, *, draws: int = 100, seed: int = 0) -> "InferenceData":
    """Posterior draws of cells as InferenceData.

    Groups: ``posterior`` (z, c), ``posterior_predictive`` (x), ``log_likelihood`` (x: log p(x | z) of each cell),
    ``sample_stats`` (lp: log p(x, z); log_q: log q(z | x)), ``observed_data`` (x) and ``constant_data`` (environment).
    Dimensions: chain (member of the ensemble), draw, cell, node, gene, with names as coordinates. Draws of a guide are
    independent, so effective sample sizes say nothing about it; R-hat says whether the members agree.

    Args:
        fitted: a run, or (model, guide).
        cells: to infer; memory grows with draws x cells x genes, so give some of them (``cells.subset``).
        draws: of each member.
        seed: of the draws.

    Raises:
        DataError: an answer too large for memory.
    """
    with warnings_of_arviz():
        import arviz as az

    count = member_count(fitted)
    need = count * draws * len(cells) * len(cells.genes) * 8
    if need > _LARGEST:
        raise DataError(
            f"{count} x {draws} draws of {len(cells)} cells x {len(cells.genes)} genes take {need / 2**30:.1f} GiB: "
            "ask for fewer draws, or for some of the cells (cells.subset)"
        )
    parts = []
    nodes: tuple[Any, ...] = ()
    for k, (model, guide) in enumerate(members(fitted)):
        with isolated(), forked():
            torch.manual_seed(seed + k)  # chains must not share their noise
            parts.append(_draws(model, guide, cells, draws))
        nodes = tuple(str(n) for n in model.scm.nodes)  # type: ignore[union-attr]
    stacked = {name: np.stack([p[name] for p in parts]) for name in parts[0]}
    observed = cells.batch().x
    assert observed is not None
    with warnings_of_arviz():
        return az.from_dict(
            posterior={name: stacked[name] for name in (Z, C)},
            posterior_predictive={X: stacked[X]},
            log_likelihood={X: stacked["log_likelihood"]},
            sample_stats={"lp": stacked["lp"], "log_q": stacked["log_q"]},
            observed_data={X: observed.numpy()},
            constant_data={"environment": np.array(cells.environments.index.astype(str))[cells.env]},
            coords={"cell": list(cells.cells), "gene": list(cells.genes), "node": list(nodes)},
            dims={
                Z: ["cell", "node"],
                C: ["cell", "node"],
                X: ["cell", "gene"],
                "lp": ["cell"],
                "log_q": ["cell"],
                "environment": ["cell"],
            },
            pred_dims={X: ["cell", "gene"]},
        )


def _draws(model: Any, guide: Any, cells: EnvironmentDataset, draws: int) -> dict[str, NDArray[np.float32]]:
    """Arrays ``[S, n, ...]`` of one member."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = cells.batch().to(device)
    latents = abduct(guide, batch, draws)
    with pyro.plate("draws", draws, dim=-2):
        q = poutine.trace(poutine.condition(guide, data=latents)).get_trace(batch)
        p = poutine.trace(poutine.condition(model, data=latents)).get_trace(batch)
        log_q = sum(q.nodes[n]["fn"].log_prob(latents[n]) for n in latents)
        log_prior = sum(p.nodes[n]["fn"].log_prob(latents[n]) for n in latents)
        log_likelihood = p.nodes[X]["fn"].log_prob(batch.x)
        predictive = p.nodes[X]["fn"].sample()
    values = {
        Z: p.nodes[Z]["value"],
        C: p.nodes[C]["value"],
        X: predictive,
        "log_likelihood": log_likelihood,
        "lp": log_prior + log_likelihood,
        "log_q": log_q,
    }
    return {name: torch.as_tensor(value).cpu().numpy() for name, value in values.items()}


@contextlib.contextmanager
def warnings_of_arviz() -> Iterator[None]:
    """ArviZ 0.23 announces its successor on import and use, and takes more members than draws for a mistake."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "More chains", UserWarning)
        yield
