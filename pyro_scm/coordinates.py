"""Two coordinates of one model: the noise z, in which it is written, and the causal variables c.

c = f(c) + z + shift(e) has unit Jacobian: p(c | e) = p_Z(c - f(c) - shift(e)). A guide that proposes c therefore needs
one pass through all mechanisms at once where a guide that proposes z needs one after the other.
"""

import copy
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import Independent, TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_scm.batch import Batch
from pyro_scm.errors import ModelError
from pyro_scm.model import LatentModel
from pyro_scm.nn import replicated
from pyro_scm.run import Run
from pyro_scm.scm import LatentSCM
from pyro_scm.sites import C, Z

__all__ = ["InCausalVariables", "in_noise"]


class _Pushed(TorchDistribution):  # type: ignore[misc]
    """Law of c = scm(z + shift) for z of a given law: density in one pass, samples by solving.

    Args:
        noise: law of z, event ``(d,)``.
        scm: additive mechanisms.
        shift: ``(n, d)`` or 0.
        gain: ``(n, d)`` or None.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, noise: Independent, scm: LatentSCM, shift: Tensor | float, gain: Tensor | None) -> None:
        self.noise, self.scm, self.shift, self.gain = noise, scm, shift, gain
        self.has_rsample = noise.has_rsample
        super().__init__(noise.batch_shape, noise.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.noise.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Pushed":
        return _Pushed(self.noise.expand(batch_shape), self.scm, self.shift, self.gain)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.scm.solve(self.noise.rsample(torch.Size(sample_shape)) + self.shift, self.gain)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.scm.solve(self.noise.sample(torch.Size(sample_shape)) + self.shift, self.gain)

    def log_prob(self, value: Tensor) -> Tensor:
        result: Tensor = self.noise.log_prob(self.scm.noise(value, self.gain) - self.shift)
        return result


class _Pulled(TorchDistribution):  # type: ignore[misc]
    """Law of z = scm.noise(c) - shift for c of a given law: the inverse of `_Pushed`."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, causal: Independent, scm: LatentSCM, shift: Tensor | float, gain: Tensor | None) -> None:
        self.causal, self.scm, self.shift, self.gain = causal, scm, shift, gain
        self.has_rsample = causal.has_rsample
        super().__init__(causal.batch_shape, causal.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.causal.support

    @property
    def mean(self) -> Tensor:
        """The noise of the mean causal variables: the most likely z where the mechanisms are smooth."""
        return self.scm.noise(self.causal.mean, self.gain) - self.shift

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Pulled":
        return _Pulled(self.causal.expand(batch_shape), self.scm, self.shift, self.gain)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.scm.noise(self.causal.rsample(torch.Size(sample_shape)), self.gain) - self.shift

    def log_prob(self, value: Tensor) -> Tensor:
        result: Tensor = self.causal.log_prob(self.scm.solve(value + self.shift, self.gain))
        return result


class InCausalVariables(PyroModule):  # type: ignore[misc]
    """The same model with c as its latent site, for training: ``amortise(InCausalVariables(model), cells)`` proposes c.

    Parameters are the model's own. Afterwards `in_noise` makes of the run one of the model itself, which all queries
    take. The divergence is taken at the sample, so that gradients are noisier than in z, where it has a closed form.

    Args:
        model: of additive mechanisms.

    Example:
        >>> in_c = InCausalVariables(model)
        >>> run = ps.fit(in_c, amortise(in_c, cells, hidden=(8,)), cells, epochs=1, progress=False)
        >>> ps.embed(in_noise(run), cells)["z"].shape
        (1, 180, 2)
    """

    def __init__(self, model: LatentModel) -> None:
        super().__init__()
        self.model = model
        self.spec: dict[str, Any] | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """c | e ~ push-forward of p(z | e);  x | c ~ likelihood(c)."""
        prior, shift, gain = self.model.parts(batch)
        with batch.plate():
            c = pyro.sample(C, _Pushed(prior, self.model.scm, shift, gain))
            return {str(likelihood.site): likelihood(c, batch) for likelihood in self.model.likelihoods}


class _NoiseGuide(nn.Module):
    """q(z | x) of a guide that proposes c, with mechanisms, shift and regime of its own copy."""

    def __init__(self, guide: nn.Module, model: LatentModel) -> None:
        super().__init__()
        self.guide = guide
        self.scm, self.shift, self.regime = (
            copy.deepcopy(model.scm),
            copy.deepcopy(model.shift),
            copy.deepcopy(model.regime),
        )
        self.spec: dict[str, Any] | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The Pyro program: site ``z``, and the guide's own sites outside the plate ``data``."""
        law = self.guide.local[C](batch)  # type: ignore[union-attr, operator, index]
        shift = self.shift(batch) if self.shift is not None else 0.0
        gain = self.regime(batch) if self.regime is not None else None
        values = {name: pyro.sample(name, q()) for name, q in self.guide.outside.items()}  # type: ignore[union-attr, operator]
        with batch.plate():
            return {**values, Z: pyro.sample(Z, _Pulled(law, self.scm, shift, gain))}


def in_noise(run: Run) -> Run:
    """A run that was trained on `InCausalVariables(model)` as a run of the model, with a guide that proposes z.

    Raises:
        ModelError: another kind of run.
    """
    if not isinstance(run.model, InCausalVariables):
        raise ModelError("this run was trained in z already: in_noise takes a run of InCausalVariables(model)")
    model = run.model.model
    guide = _NoiseGuide(run.guide, model)
    parameters = {}
    for name, value in run.parameters.items():
        if name.startswith("model.model."):
            own = name.removeprefix("model.model.")
            parameters[f"model.{own}"] = value
            if own.split(".")[0] in ("scm", "shift", "regime"):
                parameters[f"guide.{own}"] = value.clone()
        elif name.startswith("guide."):
            parameters[f"guide.{name}"] = value
        else:
            parameters[name] = value
    missing = [name for name in replicated(guide) if f"guide.{name}" not in parameters]
    assert not missing, missing
    return Run(
        model=model,
        guide=guide,
        parameters=parameters,
        seeds=run.seeds,
        schema=run.schema,
        environments=run.environments,
        history=run.history,
        settings=run.settings,
        stopped=run.stopped,
        losses=run.losses,
    )
