"""`LatentModel`: the one generative program of the suite."""

from collections.abc import Sequence
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_scm.batch import Batch
from pyro_scm.errors import ModelError
from pyro_scm.likelihoods import Likelihood
from pyro_scm.scm import IndependentSCM, LatentSCM
from pyro_scm.sites import Z

__all__ = ["LatentModel"]


class LatentModel(PyroModule):  # type: ignore[misc]
    """z | e ~ prior(e);  c = scm(z + shift(e));  x | c ~ likelihood(c).

    Args:
        prior: batch -> Normal of event shape (d,), p(z | e).
        likelihood: one for each observed site.
        scm: z -> c; c = z by default.
        shift: batch -> ``(n, d)``, added to the noise; none by default.
        regime: batch -> gain ``(n, d)`` of the structural equations; none (all 1) by default.

    Raises:
        ModelError: parts of different latent sizes.
    """

    def __init__(
        self,
        prior: nn.Module,
        likelihood: Likelihood | Sequence[Likelihood],
        scm: LatentSCM | None = None,
        shift: nn.Module | None = None,
        regime: nn.Module | None = None,
    ) -> None:
        super().__init__()
        latent = int(prior.latent)  # type: ignore[arg-type]
        self.scm = scm if scm is not None else IndependentSCM(latent)
        if self.scm.latent != latent:
            raise ModelError(f"the prior has {latent} latents and the causal layer {self.scm.latent}: make them equal")
        self.prior, self.shift, self.regime = prior, shift, regime
        self.likelihoods = nn.ModuleList([likelihood] if isinstance(likelihood, Likelihood) else likelihood)
        self.spec: dict[str, Any] | None = None
        """How a named model was built, for checkpoints; None for a composition of the user's own."""

    @property
    def latent(self) -> int:
        """Number d of causal variables."""
        return int(self.scm.latent)

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites of the causal variables, ``c_<node>``, in the order of c."""
        return tuple(self.scm.sites)

    def parts(self, batch: Batch) -> tuple[Any, Tensor | float, Tensor | None]:
        """Prior, shift and gain of the batch's cells; called outside the plate, because parts may own global sites."""
        shift = self.shift(batch) if self.shift is not None else 0.0
        gain = self.regime(batch) if self.regime is not None else None
        return self.prior(batch), shift, gain

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The generative program. Returns the value of each observed site."""
        prior, shift, gain = self.parts(batch)
        with batch.plate():
            z = pyro.sample(Z, prior)
            c = self.scm(z + shift, gain)
            return {str(likelihood.site): likelihood(c, batch) for likelihood in self.likelihoods}
