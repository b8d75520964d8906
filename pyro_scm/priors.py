"""Priors p(z | e) of the exogenous noise, and the sparsifiers that keep an environment's effect on few latents."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.batch import Batch
from pyro_scm.distributions import normal
from pyro_scm.errors import ModelError

__all__ = [
    "Dense",
    "EnvironmentPrior",
    "FlatPrior",
    "NarrowPrior",
    "SparseSoftmax",
    "Sparsifier",
    "StandardPrior",
    "TablePrior",
    "TopK",
]

# bounds of log sigma_e: a prior narrower or wider than this by a factor of e^3 means a badly scaled network
_LOG_SCALE_BOUND = 3.0


class Dense(nn.Module):
    """v -> v: no sparsity."""

    def forward(self, v: Tensor) -> Tensor:
        """v ``(..., d)`` -> ``(..., d)``."""
        return v


class SparseSoftmax(nn.Module):
    """v -> v * softmax(|v| / T): the lower T, the more of the effect lies on one latent (seed section 4.5).

    Args:
        temperature: T. It belongs to whoever trains the model (`fit(..., temperature=...)`): nothing here changes it.
    """

    replicated = ("temperature",)

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ModelError(f"temperature {temperature} of the sparse softmax: give a positive number")
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, v: Tensor) -> Tensor:
        """v ``(..., d)`` -> ``(..., d)``."""
        return v * torch.softmax(v.abs() / self.temperature, -1)


class TopK(nn.Module):
    """v -> v on its k largest |v|, 0 elsewhere; the gradient passes to all of v (straight-through).

    Args:
        k: number of latents an environment may move.
    """

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        if k < 1:
            raise ModelError(f"top-{k}: an environment must be allowed to move at least one latent")
        self.k = k

    def forward(self, v: Tensor) -> Tensor:
        """v ``(..., d)`` -> ``(..., d)``."""
        kept = torch.zeros_like(v).scatter(-1, v.abs().topk(min(self.k, v.shape[-1]), -1).indices, 1.0)
        return v + (v * kept - v).detach()


Sparsifier = Dense | SparseSoftmax | TopK


class StandardPrior(nn.Module):
    """z ~ N(0, I) in every environment.

    Args:
        latent: d.
    """

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, batch: Batch) -> dist.Independent:
        """Normal of batch shape (n,), event shape (d,)."""
        loc = self.zero.expand(len(batch), self.latent)
        return normal(loc, torch.ones_like(loc))


class NarrowPrior(StandardPrior):
    """z ~ N(0, 0.01^2 I): noise too small to say anything, for models in which a cell has no state of its own."""

    scale = 0.01

    def forward(self, batch: Batch) -> dist.Independent:
        """Normal of batch shape (n,), event shape (d,)."""
        loc = self.zero.expand(len(batch), self.latent)
        return normal(loc, torch.full_like(loc, self.scale))


class FlatPrior(StandardPrior):
    """No preference among values of z: an autoencoder's "prior".

    It is N(0, I) for simulation, but its density is left out of the loss; meant for a point (Delta) guide.
    """

    def forward(self, batch: Batch) -> dist.MaskedDistribution:
        """N(0, I) with its log-density masked out."""
        return super().forward(batch).mask(False)


class EnvironmentPrior(nn.Module):
    """z | e ~ N(s(mu(r_e)), exp(s(log sigma(r_e)))^2), s a sparsifier; N(0, I) in a reference environment (seed 4.5).

    Args:
        net: r ``(R, F)`` -> ``(R, 2 d)``: mu and log sigma.
        latent: d.
        sparsifier: of mu and of log sigma.
        scale: False keeps sigma_e at 1, so that an environment only moves the mean.
        anchored: False leaves reference environments to the network as well, as in a conditional VAE.
    """

    def __init__(
        self,
        net: nn.Module,
        latent: int,
        sparsifier: Sparsifier | None = None,
        scale: bool = True,
        anchored: bool = True,
    ) -> None:
        super().__init__()
        self.net, self.latent, self.scale, self.anchored = net, latent, scale, anchored
        self.sparsifier: nn.Module = sparsifier if sparsifier is not None else SparseSoftmax()

    def moments(self, r: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """mu_e and sigma_e of environments r ``(R, F)``: two tensors ``(R, d)``."""
        out = self.net(r).to(r.dtype)
        if self.anchored:
            out = out * perturbed.unsqueeze(-1)
        loc = self.sparsifier(out[..., : self.latent])
        if not self.scale:
            return loc, torch.ones_like(loc)
        raw = out[..., self.latent : 2 * self.latent]
        return loc, self.sparsifier(bounded_log_scale(raw)).exp()

    def forward(self, batch: Batch) -> dist.Independent:
        """Normal of batch shape (n,), event shape (d,)."""
        loc, scale = self.moments(batch.r, batch.perturbed)
        return normal(F.embedding(batch.row, loc), F.embedding(batch.row, scale))


def bounded_log_scale(raw: Tensor) -> Tensor:
    """A network's output as log sigma_e, smoothly kept within e^-3 and e^3."""
    return _LOG_SCALE_BOUND * torch.tanh(raw / _LOG_SCALE_BOUND)


class TablePrior(nn.Module):
    """z | e ~ N(mu[e], sigma[e]^2) from tables: the truth of a synthetic screen, or parameters of known environments.

    Args:
        loc: ``(E, d)``.
        scale: ``(E, d)``, positive.
        learn: whether both are parameters.
    """

    def __init__(self, loc: Tensor, scale: Tensor, learn: bool = False) -> None:
        super().__init__()
        self.loc: Tensor
        self.log_scale: Tensor
        if learn:
            self.loc, self.log_scale = nn.Parameter(loc.clone()), nn.Parameter(scale.log())
        else:
            self.register_buffer("loc", loc.clone())
            self.register_buffer("log_scale", scale.log())
        self.latent = loc.shape[-1]

    def reset_parameters(self) -> None:
        """Learnt tables start at the standard normal."""
        if isinstance(self.loc, nn.Parameter):
            with torch.no_grad():
                self.loc.zero_()
                self.log_scale.zero_()

    def forward(self, batch: Batch) -> dist.Independent:
        """Normal of batch shape (n,), event shape (d,)."""
        env = known(batch)
        return normal(F.embedding(env, self.loc), F.embedding(env, self.log_scale).exp())


def known(batch: Batch) -> Tensor:
    """Environment indices of a batch, for parts that keep one row an environment.

    Raises:
        ModelError: an environment outside the table.
    """
    if batch.outside:
        raise ModelError(
            "this model keeps a table of environments and cannot answer for one outside it: "
            "use an environment of the data set, or a model that reads the representation r"
        )
    return batch.env
