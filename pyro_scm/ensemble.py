"""One program, K sets of parameters: an ensemble evaluated in one vectorised call."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.func import functional_call

from pyro_scm.batch import Batch
from pyro_scm.chance import forked
from pyro_scm.errors import ModelError
from pyro_scm.handlers import reparametrised
from pyro_scm.nn import replicated, reset_parameters
from pyro_scm.objectives import Objective
from pyro_scm.sites import DATA

__all__ = ["Ensemble", "System", "stack_initial"]


class _Noise(Messenger):
    """Draws Normal sites, and transforms of them, from given standard noise: each member's noise is its own seed's."""

    def __init__(self, noise: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.noise and not msg["is_observed"]:
            law, transforms = reparametrised(msg["fn"])
            value = law.loc + law.scale * self.noise[msg["name"]]
            for transform in transforms:
                value = transform(value)
            msg["value"] = value
            msg["done"] = True


class System(nn.Module):
    """Model, guide and objective as one module whose `forward` is a loss: what is replicated, differentiated, moved.

    Args:
        model: generative program.
        guide: its guide.
        objective: the loss; its penalties become part of this module.
    """

    def __init__(self, model: nn.Module, guide: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.guide, self.objective = model, guide, objective
        self.penalties = nn.ModuleDict(objective.penalties)

    def critic_names(self) -> set[str]:
        """Names of the parameters that the critics own; all others are the model's."""
        return {
            f"penalties.{key}.critic.{name}"
            for key, penalty in self.objective.penalties.items()
            if penalty in self.objective.adversaries
            for name, _ in penalty.critic.named_parameters()  # type: ignore[union-attr]
        }

    def forward(
        self,
        batch: Batch,
        noise: Mapping[str, Tensor],
        kl_weight: float | Tensor = 1.0,
        critics: bool = False,
    ) -> dict[str, Tensor]:
        """Losses per cell: the model's (loss, reconstruction, kl, each penalty), or the critics' (loss).

        Bound methods are called, not the modules: nothing is then registered with Pyro's global parameter store.
        Particles are a dimension that `torch.func.vmap` adds to the noise alone: what does not depend on it, such as
        the encoder and the environment network, is evaluated once for all of them.

        Args:
            batch: cells.
            noise: site -> ``(S, n, ...)`` standard noise of S particles.
            kl_weight: of a schedule.
            critics: whether the critics' side is asked for.
        """
        particles = self.objective.num_particles

        def parts(one: Mapping[str, Tensor]) -> dict[str, Tensor]:
            if not critics:
                return self.objective.parts(
                    self.objective.world(self.model.forward, self.guide.forward, batch, [_Noise(one)])
                )
            with torch.no_grad():  # the encoder is not the critics' to train
                world = self.objective.inferred(self.guide.forward, batch, [_Noise(one)])
            return {"loss": sum((a.critic_loss(world) for a in self.objective.adversaries), torch.zeros(()))}

        if particles == 1:
            each = {k: v.unsqueeze(0) for k, v in parts({k: v.squeeze(0) for k, v in noise.items()}).items()}
        else:
            counter = torch.arange(particles, device=batch.env.device)  # a guide without Normal sites has no noise
            with pyro.validation_enabled(False):  # checks of values cannot run inside vmap
                each = torch.func.vmap(lambda one, _: parts(one), randomness="different")(dict(noise), counter)
        losses = {"loss": each["loss"].mean(0)} if critics else self.objective.combine(each, kl_weight)
        return {name: value / batch.total for name, value in losses.items()}


class Ensemble:
    """K members of a system.

    Args:
        system: the structure; its buffers are shared by all members, but for those that are `nn.replicated`.
        parameters: name -> ``(K, ...)``, replicated buffers among them.
        generators: K random generators, one a member, of the latent noise.
    """

    def __init__(self, system: System, parameters: Mapping[str, Tensor], generators: Sequence[torch.Generator]) -> None:
        self.system = system
        trained = {name for name, p in system.named_parameters() if p.requires_grad}
        self.parameters = {
            name: nn.Parameter(value.detach().clone(), requires_grad=name in trained)
            for name, value in parameters.items()
        }
        self.generators = list(generators)
        # torch looks for parameters that modules share at each call, which takes long where there are none
        unique = sum(1 for _ in system.named_parameters())
        self.tied = sum(1 for _ in system.named_parameters(remove_duplicate=False)) > unique
        self.sites: dict[str, tuple[bool, torch.Size]] | None = None

    def __len__(self) -> int:
        return len(self.generators)

    def _noise_sites(self, batch: Batch) -> dict[str, tuple[bool, torch.Size]]:
        """Sites of the guide that are Normal or a transform of it: whether inside the plate, the shape of the rest."""
        if self.sites is None:
            with torch.no_grad():
                guide = poutine.block(self.system.guide.forward, hide_types=["param"])
                trace = poutine.trace(guide).get_trace(batch)
            self.sites = {}
            for name in trace.stochastic_nodes:
                site = trace.nodes[name]
                law, transforms = reparametrised(site["fn"])
                if not isinstance(law, torch.distributions.Normal):
                    continue  # a site that draws for itself
                local = any(frame.name == DATA for frame in site["cond_indep_stack"])
                shape = law.batch_shape if transforms else site["value"].shape
                self.sites[name] = (local, shape[1:] if local else shape)
        return self.sites

    def noise(
        self,
        batch: Batch,
        generators: Iterable[torch.Generator] | None = None,
        particles: int = 1,
        share: tuple[int, slice] | None = None,
    ) -> dict[str, Tensor]:
        """Standard noise ``(K, S, n, ...)`` for every Normal latent site, member k's from its own generator.

        Args:
            batch: n cells.
            generators: others than the members' own.
            particles: S.
            share: (cells, which of them) if the batch is one process's share of more cells: noise is drawn for all of
                them, so that every cell has the noise that it would have in one process.
        """
        sites = self._noise_sites(batch)
        cells, own = share or (len(batch), slice(None))
        draws: dict[str, list[Tensor]] = {name: [] for name in sites}
        for generator in generators or self.generators:
            each: dict[str, list[Tensor]] = {name: [] for name in sites}
            for _ in range(particles):
                for name, (local, rest) in sites.items():
                    shape = (cells, *rest) if local else tuple(rest)
                    drawn = torch.randn(shape, generator=generator, device=generator.device)
                    each[name].append(drawn[own] if local else drawn)
            for name, values in each.items():
                draws[name].append(torch.stack(values))
        return {name: torch.stack(values) for name, values in draws.items()}

    def losses(
        self,
        batch: Batch,
        noise: Mapping[str, Tensor],
        kl_weight: float | Tensor = 1.0,
        critics: bool = False,
        parameters: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses ``(K,)`` of every member on the same cells; see `System.forward`.

        Args:
            batch: n cells.
            noise: site -> ``(K, S, n, ...)``.
            kl_weight: one number, or ``(K,)``.
            critics: see `System.forward`.
            parameters: others than the ensemble's own.
            buffers: others than the system's own.
        """
        values = dict(parameters if parameters is not None else self.parameters)
        shared = dict(buffers or {})
        weight = torch.as_tensor(kl_weight, device=batch.env.device).expand(len(self))

        def one(member: dict[str, Tensor], tape: dict[str, Tensor], weight: Tensor) -> Any:
            arguments = (batch, tape, weight, critics)
            return functional_call(self.system, (member, shared), arguments, tie_weights=self.tied)

        if len(self) == 1:  # the usual case pays nothing for the ensemble
            first = one(_first(values), _first(noise), weight.squeeze(0))
            return {name: value.unsqueeze(0) for name, value in first.items()}
        with pyro.validation_enabled(False):  # checks of values cannot run inside vmap
            result: dict[str, Tensor] = torch.func.vmap(one, randomness="different")(values, dict(noise), weight)
        return result

    def load_member(self, k: int, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Put member k's parameters into the system's own modules."""
        values = parameters if parameters is not None else self.parameters
        with torch.no_grad():
            for name, own in replicated(self.system).items():
                own.copy_(values[name][k])


def _first(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # squeezing, unlike indexing, has a gradient that copies nothing
    return {name: value.squeeze(0) for name, value in values.items()}


def stack_initial(system: System, seeds: Sequence[int], fresh: bool = True) -> dict[str, Tensor]:
    """Initial parameters ``(K, ...)``: drawn anew from each seed, or K copies of the present ones.

    Frozen parameters (``requires_grad`` off) keep their values.

    Raises:
        ModelError: a parameter that `reset_parameters` does not draw, so that all members would share its value.
    """
    present = {name: p.detach().clone() for name, p in replicated(system).items()}
    if not fresh:
        return {name: p.expand(len(seeds), *p.shape).clone() for name, p in present.items()}
    drawn = [_drawn(system, seed) for seed in seeds]
    system.load_state_dict(present, strict=False)
    trained = {name for name, p in system.named_parameters() if p.requires_grad}
    frozen = {name: value for name, value in present.items() if name not in trained}
    forgotten = [name for name, p in drawn[0].items() if name not in frozen and p.isnan().any()]
    if forgotten:
        raise ModelError(
            f"parameter {forgotten[0]!r} has no initial value: give the module that holds it a method reset_parameters "
            "which draws it (torch's own layers have one)"
        )
    return {name: torch.stack([{**d, **frozen}[name] for d in drawn]) for name in present}


def _drawn(system: System, seed: int) -> dict[str, Tensor]:
    """Parameters drawn from a seed; NaN where nothing draws them."""
    with forked(), torch.no_grad():
        torch.manual_seed(seed)
        for p in system.parameters():
            p.fill_(torch.nan)
        reset_parameters(system)
        return {name: p.detach().clone() for name, p in system.named_parameters()}
