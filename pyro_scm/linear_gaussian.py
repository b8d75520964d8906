"""Linear decoder, linear SCM, Gaussian noise: the marginal likelihood in closed form, and its maximum.

z | e ~ N(mu_e, diag sigma_e^2),  c = D_e A c + z,  x = b + W c + N(0, diag psi), with D_e the diagonal of gains: 0 on
the targets of a hard intervention. Then x | e ~ N(b + W m_e, W S_e W' + diag psi): no guide, no sampling, and
a fit reads nothing but the mean and covariance of each environment. The setting of Squires et al., "Linear causal
disentanglement via interventions", ICML 2023, here with observation noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from torch import Tensor

from pyro_scm import graphs
from pyro_scm.errors import DataError, ModelError, TrainingError
from pyro_scm.objectives.structure import acyclicity
from pyro_scm.threads import few_threads

__all__ = ["KINDS", "LinearGaussian", "maximise"]

KINDS = ("noise", "hard", "mechanism")
_LOG_2PI = math.log(2 * math.pi)
_RIDGE = 1e-9  # in units of a matrix's mean diagonal
_FLOOR = 1e-6  # of psi, in units of each gene's variance
# |gain - 1| of a changed mechanism: without a bound A could be as small as the lasso likes, and the gain as large
_CHANGE_BOUND = 3.0
# nats per cell of a unit of h, and temperature of the gates, stage by stage
_CYCLE_WEIGHTS = (0.0, 0.3, 10.0)
_TEMPERATURES = (0.4, 0.1, 0.02)


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """Parameters of K fits, one row a restart; the reference environment has mu = 0, sigma = 1, gain = 1.

    Args:
        mixing: W ``(K, G, d)``.
        offset: b ``(K, G)``.
        psi: ``(K, G)`` variance of the observation noise.
        matrix: A ``(K, d, d)``, entry [j, i] the effect of c_i on c_j.
        loc: mu ``(K, E, d)``.
        log_scale: log sigma ``(K, E, d)``.
        gain: ``(K, E, d)``.
        targets: ``(K, E, d)`` 1 where an environment acts on a latent, given or learnt.
        log_likelihood: ``[K]`` nats per training cell.
    """

    mixing: Tensor
    offset: Tensor
    psi: Tensor
    matrix: Tensor
    loc: Tensor
    log_scale: Tensor
    gain: Tensor
    targets: Tensor
    log_likelihood: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def best(self) -> int:
        """Restart of the highest likelihood."""
        return int(np.argmax(self.log_likelihood))

    def graph(self, cut: float = 0.3, k: int | None = None) -> nx.DiGraph:
        """The edges of |A| > cut, which is in standard deviations of the reference's noise.

        Args:
            cut: size below which an edge counts as absent.
            k: restart, the best by default.
        """
        a = self.matrix[self.best if k is None else k].abs().numpy()
        return graphs.strongest(a, range(len(a)), cut)

    def log_prob(self, x: ArrayLike, env: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log density of cells ``[K, n]``, noise and causal variables integrated out.

        Args:
            x: ``[n, G]``.
            env: ``[n]``.
        """
        values = torch.as_tensor(np.asarray(x, np.float64))
        out = np.empty((len(self), len(values)))
        for e in np.unique(env):
            rows = np.flatnonzero(env == e)
            mean, covariance = self._moments(int(e))
            deviation = values[rows] - mean.unsqueeze(1)  # (K, n, G)
            factor = _cholesky(covariance)
            whitened = torch.linalg.solve_triangular(factor, deviation.mT, upper=False)
            log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            out[:, rows] = (
                -0.5 * (whitened.square().sum(1) + log_det.unsqueeze(-1) + values.shape[1] * _LOG_2PI)
            ).numpy()
        return out

    def noise(self, x: ArrayLike, env: NDArray[np.int64], k: int | None = None) -> NDArray[np.float64]:
        """Posterior mean of z ``[n, d]``, exact.

        Args:
            x: ``[n, G]``.
            env: ``[n]``.
            k: restart, the best by default.
        """
        k = self.best if k is None else k
        values = torch.as_tensor(np.asarray(x, np.float64))
        out = np.empty((len(values), self.matrix.shape[-1]))
        w, psi = self.mixing[k], self.psi[k]
        for e in np.unique(env):
            rows = np.flatnonzero(env == e)
            system = _system(self.matrix[k], self.gain[k, e])
            precision_z = (-2 * self.log_scale[k, e]).exp()
            mixed = w @ torch.linalg.inv(system)  # x = b + mixed z
            weighted = mixed.T / psi
            precision = torch.diag(precision_z) + weighted @ mixed
            right = (values[rows] - self.offset[k]) @ weighted.T + precision_z * self.loc[k, e]
            out[rows] = torch.linalg.solve(precision, right.T).T.numpy()
        return out

    def _moments(self, e: int) -> tuple[Tensor, Tensor]:
        """Mean ``(K, G)`` and covariance ``(K, G, G)`` of an environment's cells."""
        mixed = self.mixing @ torch.linalg.inv(_system(self.matrix, self.gain[:, e]))
        mean = self.offset + (mixed @ self.loc[:, e].unsqueeze(-1)).squeeze(-1)
        scaled = mixed * self.log_scale[:, e].exp().unsqueeze(-2)
        return mean, scaled @ scaled.mT + torch.diag_embed(self.psi)


def _cholesky(matrix: Tensor) -> Tensor:
    """Of ``(..., n, n)``; with hardly any cells a scale runs to its bound, and rounding makes the matrix indefinite."""
    ridge = _RIDGE * matrix.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    factor: Tensor = torch.linalg.cholesky(matrix + torch.diag_embed(ridge.expand(matrix.shape[:-1])))
    return factor


def _system(a: Tensor, gain: Tensor) -> Tensor:
    """I - D A."""
    return torch.eye(a.shape[-1], dtype=a.dtype) - gain.unsqueeze(-1) * a


def maximise(
    x: ArrayLike,
    env: NDArray[np.int64],
    targets: ArrayLike,
    *,
    kind: str = "hard",
    mask: ArrayLike | None = None,
    sparsity: float = 0.003,
    cut: float = 0.3,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 300,
    start: tuple[ArrayLike, ArrayLike] | None = None,
) -> LinearGaussian:
    """Maximum likelihood under the lasso on A and without cycles; the edges that survive `cut` are then fitted freely.

    Args:
        x: ``[n, G]`` continuous expression.
        env: ``[n]`` environment of each cell; 0 is the reference.
        targets: ``[E, d]`` 1 where an environment acts on a latent; NaN where its one target is to be learnt.
        kind: of the interventions: ``"noise"``, ``"hard"`` or ``"mechanism"``; each frees mu and sigma of a target.
        mask: ``[d, d]`` the edges that may be, entry [j, i] of i -> j: all (in any order) by default, zeros for none.
        sparsity: nats per cell that a unit of |A| must be worth.
        cut: see `LinearGaussian.graph`.
        seeds: one restart each.
        steps: largest number of L-BFGS iterations of each stage.
        start: W (I - A)^-1 ``[G, d]`` and A ``[d, d]`` to start from, as `hard_gaussian` finds them; each restart adds
            a little noise. By default the shifts of the means give the former.

    Raises:
        DataError: shapes that do not fit, an environment with fewer than two cells.
        ModelError: an unknown kind.
        TrainingError: a likelihood that is not finite.
    """
    if kind not in KINDS:
        raise ModelError(f"unknown interventions {kind!r}: use one of {', '.join(KINDS)}")
    table = torch.as_tensor(np.asarray(targets, np.float64))
    allowed = _allowed(mask, table.shape[-1])
    moments = _Moments.of(np.asarray(x, np.float64), np.asarray(env), len(table))
    fit = _Fit(moments, table, kind, allowed, seeds, start)
    cyclic = _cyclic(allowed)
    stages = [s for s in zip(_CYCLE_WEIGHTS, _TEMPERATURES, strict=True) if s[0] == 0 or cyclic or fit.learns_targets]
    with few_threads():
        for cycles, temperature in stages:
            fit.train(steps, sparsity, cycles if cyclic else 0.0, temperature)
        fit.keep_strongest(cut)
        fit.train(steps, 0.0, 0.0, _TEMPERATURES[-1])
    return fit.result()


def _allowed(mask: ArrayLike | None, d: int) -> Tensor:
    allowed = 1 - torch.eye(d, dtype=torch.float64) if mask is None else torch.as_tensor(np.asarray(mask, np.float64))
    if allowed.shape != (d, d):
        raise DataError(f"mask has shape {tuple(allowed.shape)} for {d} latents: expected ({d}, {d})")
    return allowed


def _cyclic(mask: Tensor) -> bool:
    return not nx.is_directed_acyclic_graph(nx.from_numpy_array(mask.numpy().T, create_using=nx.DiGraph))


@dataclass(frozen=True)
class _Moments:
    """Of standardised genes: share ``(E)`` of the cells, mean ``(E, G)``, covariance ``(E, G, G)`` by environment."""

    share: Tensor
    mean: Tensor
    covariance: Tensor
    centre: Tensor
    spread: Tensor

    @staticmethod
    def of(x: NDArray[np.float64], env: NDArray[np.int64], environments: int) -> "_Moments":
        if x.ndim != 2 or env.shape != x.shape[:1]:
            raise DataError(f"x has shape {x.shape} and env {env.shape}: expected (n, G) and (n,)")
        count = np.bincount(env, minlength=environments)
        if len(count) > environments:
            raise DataError(
                f"env holds environment {env.max()}, targets has {environments} rows: give one row for each"
            )
        if count[0] < 2:
            raise DataError(f"environment 0, the reference, has {count[0]} cells: give at least 2")
        centre = x[env == 0].mean(0)
        spread = np.where(x.std(0) > 0, x.std(0), 1.0)
        y = (x - centre) / spread
        mean = np.stack([y[env == e].mean(0) if count[e] else np.zeros(y.shape[1]) for e in range(environments)])
        covariance = np.stack(
            [np.cov(y[env == e].T, bias=True) if count[e] else np.eye(y.shape[1]) for e in range(environments)]
        )
        as_tensor = torch.as_tensor
        return _Moments(*(as_tensor(v) for v in (count / len(x), mean, covariance, centre, spread)))


class _Fit:
    """K restarts side by side: parameters with a leading K, one loss, one optimiser."""

    def __init__(
        self,
        moments: _Moments,
        targets: Tensor,
        kind: str,
        allowed: Tensor,
        seeds: Sequence[int],
        start: tuple[ArrayLike, ArrayLike] | None = None,
    ) -> None:
        self.moments, self.kind = moments, kind
        self.unknown = targets.isnan().any(-1)
        self.learns_targets = bool(self.unknown.any())
        self.targets = targets.nan_to_num()
        k, (e, d), g = len(seeds), targets.shape, moments.mean.shape[-1]
        self.mask = allowed.expand(k, d, d).clone()
        generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

        def draw(*shape: int) -> Tensor:
            return torch.stack([torch.randn(shape, generator=gen, dtype=torch.float64) for gen in generators])

        self.principal, rotation, gate, psi = _start(moments, self.targets, self.unknown)
        self.unit = psi.sqrt()  # of deviations from the principal part: all parameters then have curvatures of order 1
        self.p = {
            "rotation": rotation + 0.1 * draw(d, d),
            "rest": torch.zeros(k, g, d, dtype=torch.float64),
            "centre": torch.zeros(k, d, dtype=torch.float64),
            "offset": torch.zeros(k, g, dtype=torch.float64),
            "log_psi": psi.log().expand(k, g).clone(),
            "a": 0.1 * draw(d, d),
            "loc": torch.zeros(k, e, d, dtype=torch.float64),
            "log_scale": torch.zeros(k, e, d, dtype=torch.float64),
            "change": torch.zeros(k, e, d, dtype=torch.float64),
            "gate": gate + 0.1 * draw(e, d),
        }
        if start is not None:
            given, matrix = (torch.as_tensor(np.asarray(v, np.float64)) for v in start)
            if given.shape != (g, d) or matrix.shape != (d, d):
                raise DataError(
                    f"start has shapes {tuple(given.shape)} and {tuple(matrix.shape)}: expected ({g}, {d}), ({d}, {d})"
                )
            given = given / moments.spread.unsqueeze(-1)
            turn = torch.linalg.lstsq(self.principal, given).solution
            self.p["rotation"] = turn + 0.01 * draw(d, d)
            self.p["rest"] = ((given - self.principal @ turn) / self.unit.unsqueeze(-1)).expand(k, g, d).clone()
            self.p["a"] = matrix + 0.01 * draw(d, d)
        total = self.total().detach()
        shifts = self.moments.mean.T.expand(k, g, e)
        self.p["loc"] = torch.linalg.lstsq(total, shifts).solution.mT.clone()
        for value in self.p.values():
            value.requires_grad_(True)

    def total(self) -> Tensor:
        """W (I - A)^-1 ``(K, G, d)``: what the data of the reference settle, whatever A is."""
        return self.principal @ self.p["rotation"] + self.unit.unsqueeze(-1) * self.p["rest"]

    def mixing(self) -> Tensor:
        """W ``(K, G, d)``."""
        return self.total() @ _system(self.p["a"] * self.mask, torch.ones_like(self.p["centre"]))

    def offset(self) -> Tensor:
        """b ``(K, G)``."""
        return self.p["centre"] @ self.principal.mT + self.unit * self.p["offset"]

    def acted(self, temperature: float) -> Tensor:
        """t ``(K, E, d)``."""
        gate = torch.softmax(self.p["gate"] / temperature, -1)
        known = self.targets.expand_as(gate)
        return torch.where(self.unknown[None, :, None], gate, known)

    def parts(self, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, mu, log sigma and gain."""
        t = self.acted(temperature)
        gain = torch.ones_like(t)
        if self.kind == "hard":
            gain = 1 - t
        elif self.kind == "mechanism":
            gain = 1 + t * _CHANGE_BOUND * torch.tanh(self.p["change"] / _CHANGE_BOUND)
        log_scale = 3 * torch.tanh(self.p["log_scale"] / 3)
        return self.p["a"] * self.mask, t * self.p["loc"], t * log_scale, gain

    def log_likelihood(self, temperature: float) -> Tensor:
        """Nats per cell ``(K,)`` of the standardised genes, by d x d matrices alone."""
        a, loc, log_scale, gain = self.parts(temperature)
        m, w = self.moments, self.mixing()
        psi = self.psi()
        g = w.shape[-2]
        system = _system(a.unsqueeze(1), gain)  # (K, E, d, d): I - D A
        scaled = system / log_scale.exp().unsqueeze(-1)
        precision = scaled.mT @ scaled  # of c
        weighted = w / psi.unsqueeze(-1)
        posterior = precision + (w.mT @ weighted).unsqueeze(1)
        factor = _cholesky(posterior)
        mean = torch.linalg.solve(system, loc.unsqueeze(-1))
        deviation = m.mean - self.offset().unsqueeze(1) - (w.unsqueeze(1) @ mean).squeeze(-1)  # (K, E, G)
        second = weighted.mT.unsqueeze(1) @ m.covariance @ weighted.unsqueeze(1)
        projected = deviation @ weighted
        second = second + projected.unsqueeze(-1) * projected.unsqueeze(-2)
        within = m.covariance.diagonal(dim1=-2, dim2=-1) + deviation.square()
        quadratic = (within / psi.unsqueeze(1)).sum(-1) - (torch.cholesky_inverse(factor) * second).sum((-2, -1))
        log_det = (
            psi.log().sum(-1, keepdim=True)
            - 2 * torch.linalg.slogdet(scaled).logabsdet
            + 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        )
        each = -0.5 * (quadratic + log_det + g * _LOG_2PI)
        total: Tensor = (each * m.share).sum(-1) - m.spread.log().sum()
        return total

    def psi(self) -> Tensor:
        psi: Tensor = _FLOOR + self.p["log_psi"].exp()
        return psi

    def train(self, steps: int, sparsity: float, cycles: float, temperature: float) -> None:
        """L-BFGS on the sum over restarts of -log-likelihood + sparsity |A| + cycles h(A), all restarts at once."""
        names = list(self.p)
        shapes = [self.p[n].shape for n in names]
        sizes = [v.numel() for v in self.p.values()]

        def put(flat: NDArray[np.float64]) -> None:
            for name, shape, part in zip(names, shapes, torch.as_tensor(flat).split(sizes), strict=True):
                self.p[name] = part.reshape(shape).clone().requires_grad_(True)

        def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            put(flat)
            a = self.p["a"] * self.mask
            # smooth at 0, within 1e-3 of |a|
            value = -self.log_likelihood(temperature) + sparsity * (a.square() + 1e-6).sqrt().sum((1, 2))
            if cycles > 0:
                value = value + cycles * acyclicity(a)
            gradients = torch.autograd.grad(value.sum(), [self.p[n] for n in names], allow_unused=True)
            parts = [torch.zeros(n) if g is None else g.reshape(-1) for g, n in zip(gradients, sizes, strict=True)]
            return float(value.detach().sum()), torch.cat([q.double() for q in parts]).numpy()

        start = torch.cat([v.detach().reshape(-1) for v in self.p.values()]).numpy()
        message = "the likelihood is not finite: give more cells, fewer latents than genes, or leave constant genes out"
        options: dict[str, Any] = {"maxiter": steps, "maxcor": 20, "ftol": 1e-10}
        try:
            found: Any = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)  # type: ignore[call-overload]
        except RuntimeError as error:  # torch names its LinAlgError in no public place
            raise TrainingError(message) from error
        if not np.isfinite(found.fun):
            raise TrainingError(message)
        put(found.x)

    def keep_strongest(self, cut: float) -> None:
        """Each restart's own DAG."""
        with torch.no_grad():
            t = self.acted(_TEMPERATURES[-1])
            self.targets = torch.nn.functional.one_hot(t.argmax(-1), t.shape[-1]).double() * self.unknown[
                None, :, None
            ] + (self.targets * ~self.unknown[:, None])
            self.unknown = torch.zeros_like(self.unknown)
            for k, a in enumerate((self.p["a"] * self.mask).detach()):
                dag = graphs.strongest(a.abs().numpy(), range(len(a)), cut)
                self.mask[k] = torch.as_tensor(nx.to_numpy_array(dag, nodelist=range(len(a)), weight=None).T)

    def result(self) -> LinearGaussian:
        with torch.no_grad():
            a, loc, log_scale, gain = self.parts(_TEMPERATURES[-1])
            m = self.moments
            value = self.log_likelihood(_TEMPERATURES[-1]).numpy()
            return LinearGaussian(
                mixing=self.mixing() * m.spread.unsqueeze(-1),
                offset=m.centre + m.spread * self.offset(),
                psi=self.psi() * m.spread.square(),
                matrix=a,
                loc=loc,
                log_scale=log_scale,
                gain=gain,
                targets=self.acted(_TEMPERATURES[-1]),
                log_likelihood=value,
            )


def _start(m: _Moments, targets: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Principal part ``(G, d)``, rotation ``(d, d)``, gates ``(E, d)`` and psi ``(G)`` of a start.

    The reference's covariance is T T' + psi with T = W (I - A)^-1, so T = L R for its principal part L and a rotation
    R; an environment that acts on latent j moves the mean along column j of T, which gives column j of R. Latents that
    no environment is known to act on take those that are left, the one farthest from the columns so far first.
    """
    e, d = targets.shape
    values, vectors = torch.linalg.eigh(m.covariance[0])
    rest = float(values[:-d].mean().clamp(min=_FLOOR)) if len(values) > d else 0.1
    principal = vectors[:, -d:] * (values[-d:] - rest).clamp(min=0.01).sqrt()
    moved = torch.linalg.lstsq(principal, m.mean.T).solution.T  # (E, d): mean shifts in the coordinates of L
    rotation = torch.zeros(d, d, dtype=torch.float64)
    free = [i for i in range(1, e) if bool(unknown[i]) and float(m.share[i]) > 0]
    for j in range(d):
        own = [i for i in range(e) if not bool(unknown[i]) and targets[i].sum() == 1 and targets[i, j] == 1]
        if own:
            rotation[:, j] = moved[max(own, key=lambda i: float(moved[i].norm()))]
    for j in (j for j in range(d) if not bool(rotation[:, j].any())):
        basis = torch.linalg.qr(
            torch.cat([rotation[:, rotation.any(0)], 1e-9 * torch.eye(d, dtype=torch.float64)], 1)
        ).Q
        basis = basis[:, : int(rotation.any(0).sum())]
        left = {i: moved[i] - basis @ (basis.T @ moved[i]) for i in free}
        if left:
            chosen = max(left, key=lambda i: float(left[i].norm()))
            rotation[:, j] = moved[chosen]
            free.remove(chosen)
        else:
            other = torch.eye(d, dtype=torch.float64) - basis @ basis.T
            rotation[:, j] = other[:, int(other.norm(dim=0).argmax())]
    rotation = rotation / rotation.norm(dim=0).clamp(min=1e-9)
    share = torch.linalg.lstsq(rotation, moved.T).solution.T.abs()
    gate = 3 * share / share.amax(-1, keepdim=True).clamp(min=1e-9)
    psi = (m.covariance[0] - principal @ principal.T).diagonal().clamp(min=max(0.3 * rest, _FLOOR))
    return principal, rotation, gate, psi
