"""`check`: what every model, guide and objective must satisfy; run it on a model of your own."""

import math
import warnings
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_scm.batch import Batch
from pyro_scm.errors import ModelError
from pyro_scm.handlers import FROZEN, Expose, unstored
from pyro_scm.objectives import Objective
from pyro_scm.query import do
from pyro_scm.sites import C, X, Z

__all__ = ["check"]


def check(model: nn.Module, guide: nn.Module, batch: Batch, objective: Objective | None = None) -> None:
    """Sites match, the ELBO is finite, every parameter has a gradient, do clamps and propagates, simulation has shapes.

    Args:
        model: generative program with sites ``c`` and ``x``.
        guide: its guide.
        batch: a few observed cells of the data set, more than one environment among them.
        objective: the evidence lower bound by default.

    Raises:
        ModelError: lists every clause that does not hold.

    Example:
        >>> check(model, guide, cells[::20])
    """
    faults: list[str] = []
    for clause in (_sites_match, _loss_and_gradients, _simulates, _interventions, _vectorises):
        try:
            with unstored():
                faults += clause(model, guide, batch, objective or Objective())
        except Exception as error:  # a broken model may fail in any way: report it with the others
            faults.append(f"{clause.__name__.strip('_').replace('_', ' ')}: {type(error).__name__}: {error}")
    if faults:
        raise ModelError("the model breaks its contract:\n- " + "\n- ".join(faults))


def _sites_match(model: Any, guide: Any, batch: Batch, objective: Objective) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, pyro.validation_enabled(True):
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", FROZEN)
        guide_trace = poutine.trace(guide).get_trace(batch)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(batch)
        pyro.util.check_model_guide_match(model_trace, guide_trace)
    return [str(w.message) for w in caught]


def _loss_and_gradients(model: Any, guide: Any, batch: Batch, objective: Objective) -> list[str]:
    parameters = {**_named("model", model), **_named("guide", guide)}
    loss = objective.differentiable_loss(model.forward, guide.forward, batch)
    if not math.isfinite(float(loss.detach())):
        return [f"the loss is {float(loss.detach())}"]
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    faults = []
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            faults.append(f"parameter {name} gets no gradient: it is not used, or the graph is cut before it")
        elif not bool(torch.isfinite(gradient).all()):
            faults.append(f"the gradient of parameter {name} is not finite")
    return faults


def _named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": p for name, p in module.named_parameters() if p.requires_grad}


def _simulates(model: Any, guide: Any, batch: Batch, objective: Objective) -> list[str]:
    assert batch.x is not None
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(batch.unobserved())
    value = trace.nodes[X]["value"]
    if value.shape != batch.x.shape:
        return [f"forward simulation gives x of shape {tuple(value.shape)}, the data have {tuple(batch.x.shape)}"]
    return []


def _interventions(model: Any, guide: Any, batch: Batch, objective: Objective) -> list[str]:
    """do(c_j := v) sets c_j, leaves its non-descendants, and equals the solution of the equations with c_j clamped."""
    faults = []
    names = list(model.sites)
    with torch.no_grad():
        latents = poutine.trace(guide).get_trace(batch)
        factual = poutine.trace(poutine.replay(Expose(names)(model), trace=latents)).get_trace(batch)
        for j, name in enumerate(names):
            value = float(factual.nodes[C]["value"][..., j].mean()) + 1.0
            asked = poutine.trace(poutine.replay(do(model, {name: value}), trace=latents)).get_trace(batch)
            moved = (asked.nodes[C]["value"] - factual.nodes[C]["value"]).abs().amax(0)
            if not torch.allclose(asked.nodes[C]["value"][..., j], torch.tensor(value)):
                faults.append(f"do({name} := {value:.3g}) does not set {name}")
            elif not torch.allclose(asked.nodes[C]["value"], _solution(model, batch, latents, j, value), atol=1e-4):
                faults.append(f"do({name}) does not solve the equations with {name} set: its descendants must follow")
            fixed = [i for i, n in enumerate(model.scm.nodes) if not _descends(model, j, n)]
            wrong = [names[i] for i in fixed if float(moved[i]) > 1e-5]
            if wrong:
                faults.append(f"do({name}) moves {', '.join(wrong)}, which do not descend from it")
    return faults


def _solution(model: Any, batch: Batch, latents: Any, j: int, value: float) -> Tensor:
    """Causal variables by the equations themselves, c_j clamped, outside any handler of interventions."""
    with poutine.replay(trace=latents):
        shift = model.shift(batch) if model.shift is not None else 0.0
        gain = model.regime(batch) if model.regime is not None else None
    noise = latents.nodes[Z]["value"] + shift
    clamp = torch.full_like(noise[0], torch.nan)
    clamp[j] = value
    result: Tensor = model.scm.solve(noise, gain, clamp)
    return result


def _descends(model: Any, j: int, node: Any) -> bool:
    import networkx as nx

    source = model.scm.nodes[j]
    return bool(node == source or nx.has_path(model.scm.graph, source, node))


def _vectorises(model: Any, guide: Any, batch: Batch, objective: Objective) -> list[str]:
    """A program run under an outer plate of draws gives what separate runs give: it broadcasts."""
    with torch.no_grad():
        latents = poutine.trace(guide).get_trace(batch)
        sites = {n: latents.nodes[n] for n in latents.stochastic_nodes}
        sites = {n: site for n, site in sites.items() if type(site["fn"]).__name__ != "_Subsample"}
        local = {n for n, site in sites.items() if site["fn"].batch_shape}
        draws = [{n: site["value"] + k * (n in local) for n, site in sites.items()} for k in (0, 1)]
        apart = [_mean(poutine.condition(model, data=draw), batch) for draw in draws]
        stacked = {n: torch.stack([draw[n] for draw in draws]) for n in sites}
        stacked = {n: value if n in local else value.unsqueeze(1) for n, value in stacked.items()}
        with pyro.plate("draws", 2, dim=-2):
            together = _mean(poutine.condition(model, data=stacked), batch)
    expected = torch.stack(apart)
    if together.shape != expected.shape or not torch.allclose(together, expected, atol=1e-4, rtol=1e-4):
        return ["two draws at once differ from each evaluated alone: parts must broadcast over leading dimensions"]
    return []


def _mean(program: Any, batch: Batch) -> Tensor:
    """E[x | c] of a run."""
    mean: Tensor = poutine.trace(program).get_trace(batch.unobserved()).nodes[X]["fn"].mean
    return mean
