"""`ImportanceWeighted`: the bound of importance-weighted autoencoders."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_scm.errors import ModelError
from pyro_scm.objectives.elbo import Objective, Penalty, World, divergence
from pyro_scm.sites import DATA

__all__ = ["ImportanceWeighted"]


class ImportanceWeighted(Objective):
    """-E log (1/S) sum_s p(x, z_s) / q(z_s | x) for each cell, z_s ~ q: tighter than the ELBO (Burda et al. 2016).

    S = 1 is the ELBO with its KL taken at the sample. Latent sites outside the plate ``data`` enter as in the ELBO:
    weights are those of single cells. The weight of the KL multiplies log p(z) - log q(z | x) inside them.

    Args:
        particles: S.
        kl_weight: see `Objective`.
        penalties: see `Objective`; averaged over the particles.

    Example:
        >>> run = ps.fit(model, guide, cells, objective=ImportanceWeighted(3), epochs=1, progress=False)
    """

    def __init__(
        self, particles: int = 5, *, kl_weight: float = 1.0, penalties: Mapping[str, Penalty] | None = None
    ) -> None:
        super().__init__(kl_weight=kl_weight, penalties=penalties, particles=particles)

    def parts(self, world: World) -> dict[str, Tensor]:
        """Of one particle: log p(x | z) and log q(z | x) - log p(z) of each cell ``(n,)``, the KL of other sites."""
        outside = torch.zeros((), device=world.batch.env.device)
        fit = excess = outside.expand(len(world.batch))
        for name, site in world.model.items():
            if site["infer"].get("_deterministic"):
                continue
            if not site["is_observed"] and name not in world.guide:
                raise ModelError(f"the guide has no site {name!r}: it must sample every latent site of the model")
            local = any(frame.name == DATA for frame in site["cond_indep_stack"])
            if site["is_observed"]:
                fit = fit + _log_prob(site)
            elif local:
                excess = excess + _log_prob(world.guide[name]) - _log_prob(site)
            else:
                outside = outside + divergence(world.guide[name], site)
        penalties = {name: penalty(world) for name, penalty in self.penalties.items()}
        scale = torch.as_tensor(world.batch.total / len(world.batch))
        return {"fit": fit, "excess": excess, "outside": outside, "scale": scale, **penalties}

    def combine(self, parts: Mapping[str, Tensor], kl_weight: float | Tensor = 1.0) -> dict[str, Tensor]:
        """The loss; reconstruction and kl are means over the particles, so that their sum is minus the ELBO."""
        weight, scale = self.kl_weight * kl_weight, parts["scale"].mean(0)
        bound = torch.logsumexp(parts["fit"] - weight * parts["excess"], 0) - math.log(len(parts["fit"]))
        outside = parts["outside"].mean(0)
        penalties = {name: parts[name].mean(0) for name in self.penalties}
        return {
            "loss": weight * outside - scale * bound.sum() + sum(penalties.values(), torch.zeros(())),
            "reconstruction": -scale * parts["fit"].mean(0).sum(),
            "kl": scale * parts["excess"].mean(0).sum() + outside,
            **penalties,
        }


def _log_prob(site: Any) -> Tensor:
    """``(n,)`` without the plate's scale."""
    value = site["fn"].log_prob(site["value"])
    result: Tensor = scale_and_mask(value, 1.0, site["mask"])
    return result
