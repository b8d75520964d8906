"""Simulation-based calibration: cells that the model made itself, inferred by its own guide."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine

from pyro_scm.abduction import device_of
from pyro_scm.chance import forked
from pyro_scm.criticism.ranks import pit, uniformity
from pyro_scm.criticism.verdicts import Check, skipped
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.posterior_draws import Drawn
from pyro_scm.query import isolated
from pyro_scm.run import Fitted, members
from pyro_scm.sites import X, Y, Z

__all__ = ["sbc", "sbc_ranks"]

_CHUNK = 1 << 24


def sbc(
    fitted: Fitted, cells: EnvironmentDataset, *, draws: int = 100, most_cells: int = 500, seed: int = 0
) -> list[Check]:
    """Ranks of simulated latents, and of the expected expression they mean, among the guide's draws for them.

    z ~ p(z | e), x ~ p(x | z), then the rank of z among draws of q(z | x): uniform if and only if the guide is, on
    average, the posterior of this model. Nothing is said about whether the model is right.

    Args:
        fitted: a run, or (model, guide).
        cells: whose environments, covariates and library sizes are used.
        draws: of the guide for each simulated cell.
        most_cells: simulated for each member.
        seed: of everything.

    Source: Talts et al. 2018; Säilynoja, Bürkner and Vehtari, Statistics and Computing 2022 (ECDF).
    """
    names = ("guide: SBC of latents", "guide: SBC of predictions")
    ranks = sbc_ranks(fitted, cells, draws=draws, most_cells=most_cells, seed=seed)
    if ranks is None:
        why = "This model's encoder gives points, or its prior is flat: it has no posterior to calibrate."
        return [skipped(name, why) for name in names]
    z, x, nodes, genes = ranks
    words = {
        "good": "On cells that the model made itself the encoder's intervals cover as they should.",
        "look": "On cells that the model made itself the encoder's intervals are somewhat off.",
        "bad": "On cells that the model made itself the encoder's intervals are wrong: do not use them as uncertainty.",
    }
    return [
        uniformity(names[0], z, nodes, words),
        uniformity(names[1], x, genes, {v: text.replace("intervals", "intervals of expression") for v, text in
                                        words.items()}, 0.9),
    ]  # fmt: skip


def sbc_ranks(
    fitted: Fitted, cells: EnvironmentDataset, *, draws: int = 100, most_cells: int = 500, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str], list[str]] | None:
    """Ranks in (0, 1) of latents ``[n, K d]`` and of expected expression ``[K n, G]``, and what the columns are.

    None for a model without a posterior. Arguments as of `sbc`.
    """
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(cells))[:most_cells]
    rows = np.resize(rows, most_cells)  # fewer cells are used again: only their environments matter
    size = max(1, _CHUNK // (draws * len(cells.genes)))
    latents, expected, labels = [], [], []
    for k, (model, guide) in enumerate(members(fitted)):
        own: list[Any] = []
        with isolated(), forked():
            torch.manual_seed(seed + k)
            for start in range(0, len(rows), size):
                found = _ranks(model, guide, cells, rows[start : start + size], draws, rng)
                if found is None:
                    return None
                own.append(found)
        latents.append(np.concatenate([z for z, _ in own]))
        expected.append(np.concatenate([x for _, x in own]))
        labels += [f"member {k}: {node}" for node in model.scm.nodes]
    return np.concatenate(latents, 1), np.concatenate(expected), labels, list(cells.genes)


def _ranks(model: Any, guide: Any, cells: EnvironmentDataset, rows: Any, draws: int, rng: Any) -> Any:
    device = device_of(model)
    batch = cells.batch(rows).to(device)
    shared = Drawn.of(model, guide, batch, 1, {}).shared
    with pyro.plate("draws", 1, dim=-2):
        truth = poutine.trace(poutine.condition(model, data=shared)).get_trace(batch.unobserved())
    made = {name: truth.nodes[name]["value"].reshape(len(batch), -1) for name in (X, Y) if name in truth.nodes}
    seen = replace(batch, **{name: value for name, value in made.items() if getattr(batch, name) is not None})
    shared = {name: value.expand(draws, *value.shape[1:]) for name, value in shared.items()}
    drawn = Drawn.of(model, guide, seen, draws, shared)
    if drawn.left_out:
        return None
    ranks = []
    for name, value in ((Z, "value"), (X, "mean")):
        true, guess = (
            trace.nodes[name]["value"] if value == "value" else trace.nodes[name]["fn"].mean
            for trace in (truth, drawn.p)
        )
        guess = guess.expand(draws, len(batch), guess.shape[-1]).double().cpu().numpy()
        true = true.reshape(len(batch), -1).double().cpu().numpy()
        ranks.append(pit(true, guess, seed=int(rng.integers(2**31))))
    return ranks
