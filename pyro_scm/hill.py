"""`fit_hill`: dose-response curves of many perturbations with partial pooling, as a Pyro program.

    mean_i ~ Normal(base_m + Emax_m a_i^h_m / (a_i^h_m + EC50_m^h_m), sqrt(error_i^2 + tau^2)),  m = m(i)
    log10 EC50_m ~ Normal(mu, s^2),  Emax_m ~ Normal(0, w^2),  log h_m ~ Normal(nu, t^2)

mean_i and error_i are the mean and standard error of the cells of one perturbation at one dose a_i: with tens of cells
or more they hold all that the cells say of a curve. tau is what doses (wells) differ by beyond their cells' spread.

Source: partial pooling as in Gelman and Hill, "Data analysis using regression and multilevel models", 2006; the curve
is Hill's (J. Physiol. 40, 1910).
"""

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike, NDArray
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from torch import Tensor

from pyro_scm.chance import forked
from pyro_scm.errors import DataError, ModelError, listing
from pyro_scm.handlers import unstored

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["HillPosterior", "curve", "fit_hill", "hill_program"]

FloatArray = NDArray[np.float64]

COLUMNS = ("perturbation", "dose", "mean", "error")
METHODS = ("svi", "nuts")
_OWN = ("base", "emax", "log_ec50", "log_slope")
_SLOPES = np.exp(np.linspace(math.log(0.5), math.log(3.0), 9))
_EC50S = 41
_LAWS = ("ec50_centre", "ec50_spread", "slope_centre", "slope_spread", "emax_size", "wells")
_LAW_DRAWS = 200
_BASE = 2.0  # prior sd of a curve's base, in the unit of the largest change
_AROUND, _STEP = 2.0, 0.02  # EC50s are looked for within 2 decades of the doses, in steps of 0.02
_WIDE = 2.0  # and slopes between exp(-2) and exp(2)
_STEPS = 600
_PARTICLES = 16
_LOG10 = math.log(10)


def curve(dose: Tensor, log_ec50: Tensor, slope: Tensor) -> Tensor:
    """a^h / (a^h + EC50^h), 0 at dose 0.

    Args:
        dose: a, in any unit.
        log_ec50: log10 of EC50, in the same unit.
        slope: h > 0.
    """
    power: Tensor = slope * _LOG10 * (dose.clamp(min=1e-30).log10() - log_ec50)
    return torch.where(dose > 0, torch.sigmoid(power), torch.zeros_like(power))


def hill_program(
    dose: Tensor, perturbation: Tensor, error: Tensor, mean: Tensor | None, *, number: int, span: tuple[float, float]
) -> Tensor:
    """The generative program; sites base, emax, log_ec50 and log_slope ``(number,)``, and their laws' parameters.

    Args:
        dose: ``(n,)`` of each point.
        perturbation: ``(n,)`` int64, its perturbation.
        error: ``(n,)`` standard error of each mean, in the unit of the largest change.
        mean: ``(n,)`` observed, in the same unit, or None to draw them.
        number: M of perturbations.
        span: log10 of the smallest and largest dose that is not 0.

    Returns:
        ``(n,)`` expected means.
    """
    middle, width = (span[0] + span[1]) / 2, max(span[1] - span[0], 0.5)
    centre = pyro.sample("ec50_centre", dist.Normal(middle, width / 2))
    spread = pyro.sample("ec50_spread", dist.HalfNormal(width / 2))
    slope = pyro.sample("slope_centre", dist.Normal(0.0, 0.5))
    slopes = pyro.sample("slope_spread", dist.HalfNormal(0.4))
    size = pyro.sample("emax_size", dist.HalfNormal(1.0))
    wells = pyro.sample("wells", dist.HalfNormal(error.median()))
    with pyro.plate("perturbations", number):
        base = pyro.sample("base", dist.Normal(0.0, _BASE))
        emax = pyro.sample("emax", dist.Normal(torch.zeros_like(size), size))
        log_ec50 = pyro.sample("log_ec50", dist.Normal(centre, spread))
        log_slope = pyro.sample("log_slope", dist.Normal(slope, slopes))
    rising = curve(dose, log_ec50[..., perturbation], log_slope.exp()[..., perturbation])
    expected: Tensor = base[..., perturbation] + emax[..., perturbation] * rising
    with pyro.plate("points", len(dose)):
        pyro.sample("mean", dist.Normal(expected, (error.square() + wells.square()).sqrt()), obs=mean)
    return expected


@dataclass(frozen=True, eq=False)
class HillPosterior:
    """Draws of the curves' parameters.

    Args:
        perturbations: M names.
        samples: ``base``, ``emax`` (in the readout's unit), ``log_ec50`` (log10 of the dose's unit) and ``slope``, each
            ``[chains, draws, M]``; and ``wells`` ``[chains, draws]``.
        span: smallest and largest dose that was measured.
        points: what was fitted.
    """

    perturbations: tuple[str, ...]
    samples: dict[str, FloatArray]
    span: tuple[float, float]
    points: pd.DataFrame

    def summary(self, level: float = 0.9) -> pd.DataFrame:
        """Median and interval of each perturbation's log10 EC50, EC50, Emax and slope.

        Args:
            level: of the interval between quantiles.

        Returns:
            One row a perturbation; columns such as log_ec50, log_ec50_low, log_ec50_high, and ``outside``: the
            posterior probability that EC50 is outside the doses that were measured, where it is an extrapolation.
        """
        tails = [(1 - level) / 2, 0.5, (1 + level) / 2]
        table = pd.DataFrame(index=pd.Index(self.perturbations, name="perturbation"))
        drawn = {**self.samples, "ec50": 10 ** self.samples["log_ec50"]}
        for name in ("log_ec50", "ec50", "emax", "slope"):
            low, middle, high = np.quantile(_flat(drawn[name]), tails, axis=0)
            table[name], table[f"{name}_low"], table[f"{name}_high"] = middle, low, high
        log_ec50 = _flat(self.samples["log_ec50"])
        low, high = np.log10(self.span)
        table["outside"] = ((log_ec50 < low) | (log_ec50 > high)).mean(0)
        return table

    def curves(self, doses: ArrayLike, level: float = 0.9) -> pd.DataFrame:
        """Posterior mean of each curve with its interval.

        Args:
            doses: where.
            level: of the interval.

        Returns:
            Columns perturbation, dose, value, low and high.
        """
        at = np.asarray(doses, np.float64)
        log_dose = np.log10(np.maximum(at, 1e-30))
        parts = []
        for m, name in enumerate(self.perturbations):
            base, emax, ec50, slope = (
                _flat(self.samples[key])[:, m, None] for key in ("base", "emax", "log_ec50", "slope")
            )
            power = np.clip(slope * _LOG10 * (log_dose - ec50), -700, 700)
            values = base + emax * np.where(at > 0, 1 / (1 + np.exp(-power)), 0.0)
            low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
            own = {"perturbation": name, "dose": at, "value": values.mean(0), "low": low, "high": high}
            parts.append(pd.DataFrame(own))
        return pd.concat(parts, ignore_index=True)

    def to_arviz(self) -> "InferenceData":
        """Group ``posterior`` with dimension perturbation, and ``observed_data``."""
        with warnings.catch_warnings():  # ArviZ 0.23 announces its successor
            warnings.simplefilter("ignore")
            import arviz as az

            return az.from_dict(
                posterior=self.samples,
                observed_data={"mean": self.points["mean"].to_numpy(np.float64)},
                coords={"perturbation": list(self.perturbations)},
                dims={name: ["perturbation"] for name in ("base", "emax", "log_ec50", "slope")},
            )


def fit_hill(
    points: pd.DataFrame, *, method: str = "svi", draws: int = 1000, chains: int = 1, seed: int = 0
) -> HillPosterior:
    """Fit every perturbation's curve at once.

    Args:
        points: columns perturbation, dose, mean and error (standard error of the mean, above 0). Points of dose 0 are
            controls; each perturbation needs its own, and three other doses.
        method: ``"svi"`` (seconds), a multivariate normal guide, of which the laws' parameters are kept, and each
            curve drawn from its exact posterior given these; or ``"nuts"`` (minutes), Hamiltonian Monte Carlo.
        draws: of the posterior, in each chain.
        chains: of NUTS.
        seed: of the fit.

    Raises:
        DataError: a column is missing, a value cannot be used, or a perturbation lacks controls or doses.
        ModelError: an unknown method.
    """
    if method not in METHODS:
        raise ModelError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if draws < 1 or chains < 1:
        raise DataError(f"draws = {draws}, chains = {chains}: give 1 or more of each")
    names = _checked(points)
    code = pd.Categorical(points["perturbation"].astype(str), categories=names).codes.astype(np.int64)
    dose, mean, error = (points[c].to_numpy(np.float64) for c in ("dose", "mean", "error"))
    control = np.array([np.average(mean[own], weights=error[own] ** -2.0) for own in _controls(code, dose, len(names))])
    unit = float(np.abs(mean - control[code]).max()) or 1.0
    span = float(np.log10(dose[dose > 0].min())), float(np.log10(dose.max()))
    start = _start(dose, (mean - control[code]) / unit, error / unit, code, len(names), span)
    program = functools.partial(hill_program, number=len(names), span=span)
    given = tuple(torch.as_tensor(v) for v in (dose, code, error / unit, (mean - control[code]) / unit))
    with unstored(), forked(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        fit = _by_svi if method == "svi" else _by_nuts
        found = fit(program, given, start, draws, chains)
    samples = {name: found[name] for name in ("base", "emax", "log_ec50")}
    samples["base"] = samples["base"] * unit + control
    samples["emax"] = samples["emax"] * unit
    samples |= {"slope": np.exp(found["log_slope"]), "wells": found["wells"].reshape(chains, draws) * unit}
    return HillPosterior(tuple(names), samples, (10 ** span[0], 10 ** span[1]), points.reset_index(drop=True))


def _checked(points: pd.DataFrame) -> list[str]:
    """Names of the perturbations."""
    lacking = [c for c in COLUMNS if c not in points]
    if lacking:
        raise DataError(f"the points have no column {listing(lacking)}: give {', '.join(COLUMNS)}")
    numbers = points[["dose", "mean", "error"]].to_numpy(np.float64)
    bad = ~np.isfinite(numbers).all(1) | (numbers[:, 0] < 0) | (numbers[:, 2] <= 0)
    if bad.any():
        raise DataError(
            f"row {points.index[bad][0]!r} of the points holds {numbers[bad][0].tolist()}: dose, mean and error are "
            "numbers, dose 0 or more and error above 0"
        )
    names = sorted(points["perturbation"].astype(str).unique())
    kind = points["dose"].gt(0).groupby(points["perturbation"].astype(str))
    doses = points[points["dose"] > 0].groupby(points["perturbation"].astype(str))["dose"].nunique()
    few = [n for n in names if doses.get(n, 0) < 3]
    bare = [str(n) for n, all_dosed in kind.all().items() if all_dosed]
    if few or bare:
        what = f"fewer than 3 doses of {listing(few)}" if few else f"no point of dose 0 for {listing(bare)}"
        raise DataError(f"{what}: a curve needs controls and 3 other doses; leave these perturbations out")
    return names


def _controls(code: NDArray[np.int64], dose: FloatArray, number: int) -> list[NDArray[np.bool_]]:
    return [(code == m) & (dose == 0) for m in range(number)]


def _start(
    dose: FloatArray, change: FloatArray, error: FloatArray, code: NDArray[np.int64], number: int, span: Sequence[float]
) -> dict[str, Tensor]:
    """Each perturbation's best of a grid of EC50 and slope, Emax by least squares: where the fit starts."""
    grid = np.linspace(span[0], span[1], _EC50S)
    ec50, slope, emax = np.zeros(number), np.ones(number), np.zeros(number)
    for m in range(number):
        own = (code == m) & (dose > 0)
        weight = error[own] ** -2.0
        power = _SLOPES[:, None, None] * _LOG10 * (np.log10(dose[own]) - grid[:, None])
        rising = 1 / (1 + np.exp(-power))
        best = (rising * weight * change[own]).sum(-1) / (rising**2 * weight).sum(-1)
        misfit = ((change[own] - best[..., None] * rising) ** 2 * weight).sum(-1)
        i, j = np.unravel_index(int(misfit.argmin()), misfit.shape)
        ec50[m], slope[m], emax[m] = grid[j], _SLOPES[i], best[i, j]
    emax = np.clip(emax, -2, 2)
    first = {
        "base": np.zeros(number), "emax": emax, "log_ec50": ec50, "log_slope": np.log(slope),
        "ec50_centre": np.median(ec50), "ec50_spread": max(float(ec50.std()), 0.2), "slope_centre": 0.0,
        "slope_spread": 0.2, "emax_size": max(float(np.sqrt((emax**2).mean())), 0.1), "wells": 0.3 * np.median(error),
    }  # fmt: skip
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in first.items()}


def _by_svi(
    program: Any, given: tuple[Tensor, ...], start: dict[str, Tensor], draws: int, chains: int
) -> dict[str, FloatArray]:
    guide = AutoMultivariateNormal(program, init_loc_fn=init_to_value(values=start), init_scale=0.02)
    decay = 0.02 ** (1 / _STEPS)
    optimiser = pyro.optim.ClippedAdam({"lr": 0.06, "lrd": decay, "betas": (0.9, 0.99)})
    elbo = Trace_ELBO(num_particles=_PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(program, guide, optimiser, elbo)
    for _ in range(_STEPS):
        svi.step(*given)
    with torch.no_grad(), pyro.plate("draws", min(draws * chains, _LAW_DRAWS), dim=-2):
        found = guide(*given)
    laws = {name: found[name].double().numpy().reshape(-1) for name in _LAWS}
    dose, code, error, change = (v.numpy() for v in given)
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    curves = _exactly(dose, change, error, code, program.keywords["span"], laws, draws * chains, rng)
    curves["wells"] = np.resize(laws["wells"], draws * chains)
    return {name: v.reshape(chains, draws, -1) for name, v in curves.items()}


def _by_nuts(
    program: Any, given: tuple[Tensor, ...], start: dict[str, Tensor], draws: int, chains: int
) -> dict[str, FloatArray]:
    parts = []
    for _ in range(chains):
        kernel = NUTS(
            program, jit_compile=True, ignore_jit_warnings=True, init_strategy=init_to_value(values=start),
            target_accept_prob=0.9, max_tree_depth=8,
        )  # fmt: skip
        sampler = MCMC(kernel, num_samples=draws, warmup_steps=max(draws // 2, 300), disable_progbar=True)
        with warnings.catch_warnings():  # torch's remark on its tracer, without which this takes several times as long
            warnings.simplefilter("ignore", DeprecationWarning)
            sampler.run(*given)
        parts.append({n: v.numpy() for n, v in sampler.get_samples().items()})
    return {name: np.stack([p[name] for p in parts]) for name in (*_OWN, "wells")}


def _exactly(
    dose: FloatArray,
    change: FloatArray,
    error: FloatArray,
    code: NDArray[np.int64],
    span: Sequence[float],
    laws: dict[str, FloatArray],
    draws: int,
    rng: np.random.Generator,
) -> dict[str, FloatArray]:
    """Draws of each perturbation's curve from its exact posterior given the laws' parameters, ``[S, M]`` each.

    Given these, perturbations are independent, and of one curve base and Emax are linear: they are integrated out, and
    EC50 and slope drawn from a grid.

    Args:
        dose: ``(n,)``.
        change: ``(n,)`` observed, in units.
        error: ``(n,)``, in units.
        code: ``(n,)`` perturbation.
        span: log10 of the smallest and largest dose.
        laws: L draws of each parameter.
        draws: S of curves, S / L of them for each.
        rng: of the draws.
    """
    ec50 = np.linspace(span[0] - _AROUND, span[1] + _AROUND, round((span[1] - span[0] + 2 * _AROUND) / _STEP) + 1)
    slope = np.linspace(-_WIDE, _WIDE, 31)
    grid = np.stack(np.meshgrid(ec50, slope, indexing="ij"), -1).reshape(-1, 2)
    width = np.array([ec50[1] - ec50[0], slope[1] - slope[0]])
    number, each = int(code.max()) + 1, -(-draws // len(laws["wells"]))
    found = {name: np.empty((draws, number)) for name in _OWN}
    log_prior = sum(
        -0.5 * ((grid[:, i] - laws[f"{name}_centre"][:, None]) / laws[f"{name}_spread"][:, None]) ** 2
        for i, name in enumerate(("ec50", "slope"))
    )  # [L, grid]
    for m in range(number):
        own = code == m
        power = np.exp(grid[:, 1:]) * _LOG10 * (np.log10(np.maximum(dose[own], 1e-30)) - grid[:, :1])
        rise = np.where(dose[own] > 0, 1 / (1 + np.exp(-np.clip(power, -700, 700))), 0.0)  # [grid, n]
        weight = 1 / (error[own] ** 2 + laws["wells"][:, None] ** 2)  # [S, n]
        one, y = weight.sum(1)[:, None] + 1 / _BASE**2, (weight @ change[own])[:, None]
        cross, square = weight @ rise.T, weight @ (rise**2).T + 1 / laws["emax_size"][:, None] ** 2
        along = (weight * change[own]) @ rise.T
        determinant = one * square - cross**2
        base, emax = (square * y - cross * along) / determinant, (one * along - cross * y) / determinant
        log = log_prior - 0.5 * np.log(determinant) + 0.5 * (base * y + emax * along)
        total = np.exp(log - log.max(1, keepdims=True)).cumsum(1)
        chosen = np.stack([np.searchsorted(row, rng.random(each) * row[-1]) for row in total])  # [L, each]
        at = grid[chosen] + (rng.random((*chosen.shape, 2)) - 0.5) * width
        rows = np.arange(len(chosen))[:, None]
        drawn = emax[rows, chosen] + np.sqrt(one / determinant[rows, chosen]) * rng.normal(size=chosen.shape)
        own_base = (y - cross[rows, chosen] * drawn) / one + rng.normal(size=chosen.shape) / np.sqrt(one)
        values = (own_base, drawn, at[..., 0], at[..., 1])
        for name, value in zip(_OWN, values, strict=True):
            found[name][:, m] = value.T.reshape(-1)[:draws]
    return found


def _flat(values: FloatArray) -> FloatArray:
    return values.reshape(-1, *values.shape[2:])
