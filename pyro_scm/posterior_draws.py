"""Draws of single cells' latents by one member, and the densities and simulations that go with them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from pyro_scm.batch import Batch
from pyro_scm.query import abduct
from pyro_scm.sites import DATA, C, X, Y, Z

__all__ = ["JOINT", "Drawn", "Values", "array", "estimates", "observed", "simulated"]

JOINT = "joint"
"""Log-likelihood of all that was measured of a cell, where that is more than expression."""

Values: TypeAlias = dict[tuple[str, str], NDArray[np.float32]]
"""(group, name) -> ``[S, n, ...]``."""

_DRAWS = "draws"


class Drawn(NamedTuple):
    """Posterior draws of a batch by one member.

    Args:
        batch: n cells.
        draws: S.
        latents: site -> ``(S, n, ...)``, or ``(S, 1, ...)`` of sites outside the plate.
        shared: those outside the plate.
        reported: latents that mean something; the others are noise that a mask is drawn from.
        q: trace of the guide.
        p: trace of the model.
    """

    batch: Batch
    draws: int
    latents: Mapping[str, Tensor]
    shared: dict[str, Tensor]
    reported: tuple[str, ...]
    q: Any
    p: Any

    @staticmethod
    def of(model: Any, guide: Any, batch: Batch, draws: int, shared: Mapping[str, Tensor]) -> "Drawn":
        """Draws of the guide; `shared` are those of sites outside the plate, once they have been drawn."""
        given = poutine.condition(guide, data=dict(shared)) if shared else guide
        latents = {**shared, **abduct(given, batch, draws)}
        q, p = _traces(model, guide, batch, latents, draws)
        outside = {n: v for n, v in latents.items() if not _is_local(p.nodes[n])}
        reported = tuple(n for n in latents if n not in (Z, C) and not p.nodes[n]["infer"].get("fresh"))
        return Drawn(batch, draws, latents, outside, reported, q, p)

    @property
    def local(self) -> list[str]:
        """Latents of single cells."""
        return [n for n in self.latents if n not in self.shared]

    @property
    def point(self) -> bool:
        """Whether the guide gives points."""
        return any(_is_point(self.q.nodes[n]["fn"]) for n in self.local)

    @property
    def flat(self) -> bool:
        """Whether the prior has no density."""
        return type(self.p.nodes[Z]["fn"]).__name__ == "MaskedDistribution"

    @property
    def left_out(self) -> str:
        """What these two mean for the groups."""
        reasons = ["an encoder that gives points has no density: no log_likelihood"] if self.point else []
        if self.flat:
            reasons.append("a flat prior has no density: no log_likelihood, prior, prior_predictive")
        return "; ".join(reasons)

    def values(self) -> Values:
        """Of `posterior`, `posterior_predictive` and `sample_stats`."""
        p, batch, s = self.p, self.batch, self.draws
        found: dict[tuple[str, str], Any] = {("posterior", n): p.nodes[n]["value"] for n in (Z, C)}
        found |= {("posterior", n): self.latents[n] for n in self.local if n in self.reported}
        sites = observed(p, batch)
        found |= {("posterior_predictive", n): p.nodes[n]["fn"].sample() for n in sites}
        fit = sum(_log_prob(p.nodes[n]) for n in sites)
        found["sample_stats", "log_px_z"] = fit
        if not self.left_out:
            found["sample_stats", "lp"] = fit + sum(_log_prob(p.nodes[n]) for n in self.local)
            found["sample_stats", "log_q"] = sum(_log_prob(self.q.nodes[n]) for n in self.local)
        shape = (s, len(batch))
        return {key: array(value.expand(*shape, *value.shape[2:])) for key, value in found.items()}


def _traces(model: Any, guide: Any, batch: Batch, latents: Mapping[str, Tensor], draws: int) -> tuple[Any, Any]:
    with pyro.plate(_DRAWS, draws, dim=-2):
        q = poutine.trace(poutine.condition(guide, data=dict(latents))).get_trace(batch)
        return q, poutine.trace(poutine.condition(model, data=dict(latents))).get_trace(batch)


def estimates(model: Any, guide: Any, batch: Batch, drawn: Drawn, particles: int) -> Values:
    """`log_likelihood` of each draw, from particles of its own."""
    if drawn.left_out or not particles:
        return {}
    shared = {n: v.repeat_interleave(particles, 0) for n, v in drawn.shared.items()}
    each = Drawn.of(model, guide, batch, drawn.draws * particles, shared)
    sites = observed(each.p, batch)
    parts = [_log_prob(each.p.nodes[n]) for n in (*sites, *each.local)]
    weight = torch.stack(parts).sum(0) - torch.stack([_log_prob(each.q.nodes[n]) for n in each.local]).sum(0)
    log_p = torch.logsumexp(weight.reshape(drawn.draws, particles, len(batch)), 1) - math.log(particles)
    return {("log_likelihood", JOINT if Y in sites else X): array(log_p)}


def simulated(model: Any, batch: Batch, drawn: Drawn) -> Values:
    """`prior` and `prior_predictive`: new cells of the same environments and library sizes."""
    with pyro.plate(_DRAWS, drawn.draws, dim=-2):
        trace = poutine.trace(poutine.condition(model, data=drawn.shared)).get_trace(batch.unobserved())
    latents = (Z, C, *(n for n in drawn.local if n in drawn.reported))
    groups = {"prior": latents, "prior_predictive": observed(trace, batch)}
    shape = (drawn.draws, len(batch))
    return {
        (group, name): array(trace.nodes[name]["value"].expand(*shape, *trace.nodes[name]["value"].shape[2:]))
        for group, names in groups.items()
        for name in names
    }


def observed(trace: Any, batch: Batch) -> list[str]:
    """Sites of the model that these cells have been measured at."""
    return [name for name, value in ((X, batch.x), (Y, batch.y)) if value is not None and name in trace.nodes]


def _is_local(site: Any) -> bool:
    return any(frame.name == DATA for frame in site["cond_indep_stack"])


def _is_point(law: Any) -> bool:
    return type(getattr(law, "base_dist", law)).__name__ == "Delta" or type(law).__name__ == "Delta"


def _log_prob(site: Any) -> Tensor:
    """``(S, n)`` without the plate's scale."""
    value: Tensor = site["fn"].log_prob(site["value"])
    return value


def array(value: Tensor) -> NDArray[np.float32]:
    """Of numpy, in single precision."""
    found: NDArray[np.float32] = value.detach().float().cpu().numpy()
    return found
