"""What the suite is measured against: idiomatic hand-written PyTorch, and Pyro as it is usually written."""

from collections.abc import Callable, Iterator

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn import functional as F

from guides import amortise
from pyro_scm import models
from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset


class HandWritten(nn.Module):
    """The Environment VAE as one `nn.Module` with a closed-form loss: no probabilistic programming at all.

    Args:
        genes: G.
        features: F.
        latent: d.
        hidden: units of the one hidden layer of each network.
        counts: negative binomial instead of Normal.
    """

    def __init__(self, genes: int, features: int, latent: int, hidden: int, counts: bool = False) -> None:
        super().__init__()
        self.counts = counts
        self.encoder1, self.encoder2 = nn.Linear(genes + features, hidden), nn.Linear(hidden, 2 * latent)
        self.decoder1, self.decoder2 = nn.Linear(latent, hidden), nn.Linear(hidden, genes)
        self.prior1, self.prior2 = nn.Linear(features, hidden), nn.Linear(hidden, 2 * latent)
        self.log_scale = nn.Parameter(torch.zeros(genes))

    def forward(self, x: Tensor, e: Tensor, size: Tensor | None) -> Tensor:
        """Negative ELBO per cell."""
        seen = torch.log1p(x * (1e3 / size[:, None])) if size is not None else x
        mean, raw = self.encoder2(F.relu(self.encoder1(torch.cat((seen, e), -1)))).chunk(2, -1)
        scale = F.softplus(raw) + 1e-3
        prior_mean, prior_log = self.prior2(F.relu(self.prior1(e))).chunk(2, -1)
        prior_mean = prior_mean * torch.softmax(prior_mean.abs(), -1)
        prior_log = prior_log * torch.softmax(prior_log.abs(), -1)
        z = mean + scale * torch.randn_like(scale)
        out = self.decoder2(F.relu(self.decoder1(z)))
        if size is None:
            reconstruction = (0.5 * ((x - out) * torch.exp(-self.log_scale)).square() + self.log_scale).sum()
        else:
            log_mean = torch.log_softmax(out, -1) + size.log()[:, None]
            theta = self.log_scale.exp()
            odds = F.softplus(log_mean - self.log_scale)
            reconstruction = -(
                torch.lgamma(x + theta)
                - torch.lgamma(theta)
                - torch.lgamma(x + 1)
                + x * (log_mean - self.log_scale)
                - (x + theta) * odds
            ).sum()
        inverse = torch.exp(-prior_log)
        gap = ((mean - prior_mean) * inverse).square()
        kl = (prior_log - scale.log() + 0.5 * ((scale * inverse).square() + gap - 1)).sum()
        return (reconstruction + kl) / len(x)


def hand_written(cells: EnvironmentDataset, latent: int, hidden: int, size: int) -> Iterator[float]:
    """Losses of its training, one a step: fused Adam, resident data, a new random order each epoch."""
    batch = cells.batch()
    model = HandWritten(len(cells.genes), len(cells.features), latent, hidden, cells.counts)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    assert batch.x is not None
    e = batch.r[batch.row]
    while True:
        for rows in torch.randperm(len(cells)).split(size):
            optimiser.zero_grad()
            library = batch.size[rows] if batch.size is not None else None
            loss = model(batch.x[rows], e[rows], library)
            loss.backward()
            optimiser.step()
            yield loss.item()


def usual_pyro(cells: EnvironmentDataset, latent: int, hidden: int, size: int) -> Iterator[float]:
    """Losses of `pyro.infer.SVI` with `pyro.optim.Adam` and `Trace_ELBO`, validation on: Pyro's tutorials."""
    pyro.clear_param_store()
    pyro.enable_validation(True)
    model = models.environment_vae(cells.schema, latent=latent, hidden=(hidden,), environment_hidden=(hidden,))
    guide = amortise(model, cells, hidden=(hidden,))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    while True:
        for rows in torch.randperm(len(cells)).split(size):
            yield svi.step(cells.batch(rows.numpy())) / len(cells)


Training = Callable[[], Iterator[float]]


def textbook_do(model: nn.Module, batch: Batch, name: str, value: float) -> Tensor:
    """One `poutine.do` and one run of the program."""
    trace = pyro.poutine.trace(pyro.poutine.do(model, data={name: torch.tensor(value)})).get_trace(batch)
    result: Tensor = trace.nodes["c"]["value"]
    return result
