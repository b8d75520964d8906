"""`Objective`: the evidence lower bound plus named penalties and adversaries, itself a `pyro.infer.ELBO`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_scm.batch import Batch
from pyro_scm.errors import ModelError

__all__ = ["Adversary", "Objective", "Penalty", "Terms", "World"]

Program = Callable[..., Any]


class _Record(Messenger):
    """Keeps every sample message of a run; with `values`, replays them at the sites of these names."""

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.values = values or {}
        self.sites: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ != "_Subsample":
            self.sites[msg["name"]] = msg


@dataclass(frozen=True)
class World:
    """One joint run of guide and model over a batch: what a penalty may look at.

    Args:
        batch: the cells.
        guide: site -> Pyro message (``["value"]``, ``["fn"]``, ``["scale"]``) of the guide's run.
        model: the same of the model's run, deterministic sites included.
    """

    batch: Batch
    guide: Mapping[str, Any]
    model: Mapping[str, Any]


@dataclass(frozen=True)
class Terms:
    """The parts of a loss, each summed over the data set's cells.

    Args:
        reconstruction: -E_q log p(x | z).
        kl: KL(q || p) of every latent site.
        penalties: name -> weighted penalty.
    """

    reconstruction: Tensor
    kl: Tensor
    penalties: Mapping[str, Tensor]

    def loss(self, kl_weight: float | Tensor = 1.0) -> Tensor:
        """Negative ELBO with the KL weighted, plus the penalties."""
        return self.reconstruction + kl_weight * self.kl + sum(self.penalties.values(), torch.zeros(()))


class Penalty(nn.Module):
    """Abstract: a term added to the negative ELBO, of the same scale (summed over the data set's cells).

    Args:
        weight: its factor.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def penalty(self, world: World) -> Tensor:
        """The unweighted term."""
        raise NotImplementedError  # abstract

    def at(self, done: float) -> None:
        """Training has done this share of its epochs: a penalty that changes with it overrides this."""

    def forward(self, world: World) -> Tensor:
        """Weight * penalty."""
        return self.weight * self.penalty(world)


class Adversary(Penalty):
    """min over critic, max over model, of the critic's cross-entropy for reading an environment off z.

    The model's side, a penalty, is minus the critic's loss; the critic's side is `critic_loss`, which `fit` minimises
    in steps of its own. Gradients equal those of a gradient-reversal layer, but no factor enters the joint density.

    Args:
        critic: site value ``(n, d)`` -> logits ``(n, classes)``.
        site: the guide's site that it reads.
        target: ``"env"`` or the name of a covariate.
        weight: lambda of the model's side.
    """

    def __init__(self, critic: nn.Module, site: str = "z", target: str = "env", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.critic, self.site, self.target = critic, site, target

    def _cross_entropy(self, value: Tensor, batch: Batch) -> Tensor:
        labels = batch.env if self.target == "env" else batch.covariates[self.target]
        loss = nn.functional.cross_entropy(self.critic(value), labels, reduction="sum")
        return loss * (batch.total / len(batch))

    def critic_loss(self, world: World) -> Tensor:
        """The critic's side, of a world in which the guide alone has run: no gradient reaches the encoder."""
        return self._cross_entropy(world.guide[self.site]["value"].detach(), world.batch)

    def penalty(self, world: World) -> Tensor:
        """The model's side."""
        return -self._cross_entropy(world.guide[self.site]["value"], world.batch)


class Objective(ELBO):  # type: ignore[misc]
    """-ELBO + penalties, with the KL in closed form wherever torch knows one (mean-field bound).

    One light messenger around guide and model each: the same loss and gradients as `pyro.infer.TraceMeanField_ELBO`,
    without the cost of traces, and safe under `torch.func.vmap`. The mean-field proviso holds for every model here:
    no latent's parents in the model are its descendants in the guide.

    Args:
        kl_weight: beta of a beta-VAE; a warm-up schedule of `fit` multiplies it.
        penalties: name -> `Penalty`.
        particles: samples of the guide that the loss is averaged over.
        site_weights: factors of the log-likelihoods of observed sites, where they are not 1.
    """

    def __init__(
        self,
        *,
        kl_weight: float = 1.0,
        penalties: Mapping[str, Penalty] | None = None,
        particles: int = 1,
        site_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(num_particles=particles)
        self.kl_weight, self.site_weights = kl_weight, dict(site_weights or {})
        self.penalties = dict(penalties or {})

    @property
    def adversaries(self) -> list[Adversary]:
        """Those penalties that train a critic."""
        return [p for p in self.penalties.values() if isinstance(p, Adversary)]

    def world(self, model: Program, guide: Program, batch: Batch, handlers: Sequence[Messenger] = ()) -> World:
        """Run the guide on a batch, then the model with the guide's values.

        Args:
            model: generative program.
            guide: its guide.
            batch: observed cells.
            handlers: around the guide, for example a source of noise.
        """
        inferred = self.inferred(guide, batch, handlers)
        p = _Record({name: site["value"] for name, site in inferred.guide.items()})
        p(model)(batch)
        return World(batch, inferred.guide, p.sites)

    def inferred(self, guide: Program, batch: Batch, handlers: Sequence[Messenger] = ()) -> World:
        """Run the guide alone: all that a critic looks at. See `world`."""
        q = _Record()
        run = guide
        for handler in handlers:
            run = handler(run)
        q(run)(batch)
        return World(batch, q.sites, {})

    def terms(self, world: World) -> Terms:
        """The loss of one run, in its parts.

        Raises:
            ModelError: a latent site of the model that the guide lacks.
        """
        reconstruction = kl = torch.zeros(())
        for name, site in world.model.items():
            if site["infer"].get("_deterministic"):
                continue
            if site["is_observed"]:
                log_prob = site["fn"].log_prob(site["value"])
                own = scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
                reconstruction = reconstruction - self.site_weights.get(name, 1.0) * own
            elif name not in world.guide:
                raise ModelError(f"the guide has no site {name!r}: it must sample every latent site of the model")
            else:
                kl = kl + divergence(world.guide[name], site)
        penalties = {name: penalty(world) for name, penalty in self.penalties.items()}
        return Terms(reconstruction, kl, penalties)

    def parts(self, world: World) -> dict[str, Tensor]:
        """What one particle contributes to the loss; `combine` takes these of all particles."""
        terms = self.terms(world)
        return {"reconstruction": terms.reconstruction, "kl": terms.kl, **terms.penalties}

    def combine(self, parts: Mapping[str, Tensor], kl_weight: float | Tensor = 1.0) -> dict[str, Tensor]:
        """The loss, and its parts for the history: means over the particles.

        Args:
            parts: name -> ``(S, ...)``, `parts` of each of S particles.
            kl_weight: of a schedule; multiplies the objective's own.
        """
        means = {name: value.mean(0) for name, value in parts.items()}
        penalties = {name: means[name] for name in self.penalties}
        terms = Terms(means["reconstruction"], means["kl"], penalties)
        return {"loss": terms.loss(self.kl_weight * kl_weight), **means}

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor; model and guide are called with the batch."""
        each = [self.parts(self.world(model, guide, *args, **kwargs)) for _ in range(self.num_particles)]
        return self.combine({name: torch.stack([parts[name] for parts in each]) for name in each[0]})["loss"]

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        """Full Pyro traces of model and guide: what `pyro.infer.ELBO` asks of its subclasses; the loss needs none."""
        return get_importance_trace("flat", math.inf, model, guide, args, kwargs)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number: what `pyro.infer.SVI.evaluate_loss` calls."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, its gradients accumulated: what `pyro.infer.SVI.step` calls."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


def divergence(q: Any, p: Any) -> Tensor:
    """KL(q || p) of one site, scaled and masked; from the sample where there is no closed form."""
    try:
        kl = kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        kl = q["fn"].log_prob(q["value"]) - p["fn"].log_prob(p["value"])
    result: Tensor = scale_and_mask(kl, q["scale"], q["mask"]).sum()
    return result
