"""`unmix`: from a fitted model with dense effects to the same model in the coordinates in which its effects are sparse.

A dense fit finds the right latent space but an arbitrary basis of it: z and Q z, Q a rotation, have the same prior and,
with Q taken back in the decoder, the same likelihood. Models that are trained with sparse effects from scratch stop in
rotated optima, because the basis can only turn while decoder, encoder and effects turn together. Afterwards it is a
small problem of its own: of all bases, which one makes the matrix of effects ``[E, d]`` sparse? It is solved from many
starts in a second, without cells and without the truth, and its solution is folded back into decoder, environment
network and encoder. Then `fit(start=...)` with a prior that keeps effects sparse refines everything together.

Members of an ensemble are unmixed each by itself. A latent that all of them find is one that the cells determine:
`stability`.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pyro_scm.chance import forked
from pyro_scm.composition import CompositionShift, CovariateShift, DosedShift, MoleculeShift, ShiftedPrior
from pyro_scm.directions import CONTRASTS, Directions, sparse_directions
from pyro_scm.effects import groups, shifts
from pyro_scm.errors import DataError, ModelError
from pyro_scm.infer import fit
from pyro_scm.model import LatentModel
from pyro_scm.nn import Shortcut
from pyro_scm.objectives import EffectSparsity, EffectSpikeSlab, Objective
from pyro_scm.priors import Dense, EnvironmentPrior
from pyro_scm.run import Run, members
from pyro_scm.scm import IndependentSCM, LinearSCM
from pyro_scm.shifts import EnvironmentShift, LinearShift, mover
from pyro_scm.sites import Z

if TYPE_CHECKING:
    from pyro_scm.data.dataset import EnvironmentDataset

__all__ = [
    "CONTRASTS",
    "STABLE",
    "Directions",
    "directions",
    "fold",
    "refine",
    "sparse_directions",
    "spreads",
    "stability",
    "unmix",
]

FloatArray = NDArray[np.float64]

STABLE = 0.7
"""Agreement between members above which a latent is read: half of the square of its effects is found again."""

_SPREAD_CELLS = 2048  # training cells by which the guide's spread is fitted again
_CHUNK = 2048
_NOISE_DRAWS = 40  # of environments' means, to know how large effects come out where there are none


# ---------------------------------------------------------------------- fitted models
def unmix(
    run: Run,
    cells: "EnvironmentDataset",
    *,
    rank: int | str | None = None,
    offset: bool = False,
    scales: bool = False,
    contrast: str = "log-cosh",
    oblique: float | None = None,
    starts: int = 24,
    seed: int = 0,
) -> Run:
    """The run in the coordinates z' = M z in which its environments' effects are sparse, each member by its own M.

    M is folded into the decoder's first layer, the environment network's last, and the encoder's last, so that the
    result is a run like any other. With a rotation the model is the same to rounding; in an oblique basis M z, of
    covariance M M', is taken for N(0, I), which `refine` then corrects. The guide's means are exact; its standard
    deviations, for a posterior that is no longer diagonal, are those of the best diagonal Normal, fitted to the guide's
    last layer by least squares over training cells.

    A linear causal layer under noise interventions is folded away, A = 0: the decoder absorbs any graph at the same
    likelihood, so that none is the simplest that says the same.

    Args:
        run: of a dense fit (``sparsity="dense"``, ``scale=False``) of an Environment or Translation VAE, structured or
            not, or of a compositional model with a Normal guide, whose vectors of perturbations and covariates turn
            (CPA, chemCPA, scGen).
        cells: training cells, of which environments the basis is found and on which the guide's spread is fitted.
        rank: of the effects, see `sparse_directions`; ``"auto"``: the number of directions, at most that of the
            environments, in which effects are larger than the noise of the environments' means. The latents after the
            first `rank` are then those that environments hardly move.
        offset: whether perturbed environments share an offset, see `sparse_directions`.
        scales: whether environments also change the scales of latents: their covariances, of the embedded cells, are
            made as diagonal as can be, see `sparse_directions`.
        contrast: see `sparse_directions`.
        oblique: see `sparse_directions`.
        starts: see `sparse_directions`.
        seed: see `sparse_directions`.

    Raises:
        ModelError: a model whose effects are not dense or that has mechanisms that no decoder absorbs, or a guide of
            another kind.
        DataError: too few environments, see `sparse_directions`.

    Example:
        >>> ps.effects.shifts(unmix(run, cells)).shape  # members and environments, latents
        (18, 2)
    """
    found = directions(
        run, cells, rank=rank, scales=scales, offset=offset, contrast=contrast, oblique=oblique, starts=starts,
        seed=seed,
    )  # fmt: skip
    return fold(run, cells, found)


def refine(
    run: Run,
    cells: "EnvironmentDataset",
    *,
    prior: str = "spike-slab",
    weight: float | None = None,
    size: float = 0.1,
    offset: bool = False,
    epochs: int | None = None,
    lr: float | None = None,
    **settings: Any,
) -> Run:
    """Train on from an unmixed run with a prior that keeps effects sparse, all parts together.

    Args:
        run: from `unmix`.
        cells: training cells.
        prior: ``"spike-slab"`` (`EffectSpikeSlab`, which starts from the groups of `effects.inclusion`), or
            ``"student-t"`` (`EffectSparsity`), for fewer than 4 perturbed environments.
        weight: of the prior. By default 2 for ``"student-t"``, and for ``"spike-slab"`` the mean number of an
            environment's cells: the prior counts once for each cell. Counted once for each environment it does not move
            a decoder that holds the effects where they are: on two screens of the SAMS-VAE simulator MCC rose from .79
            to .80 with weight 30, to .89 with 300 and 1,500, and from .89 to .92 with 300.
        size: below which an effect counts as small, in standard deviations of the reference's noise: size of a
            Student-t prior, least width of the spike.
        offset: whether effects are counted from an offset that all environments share, which is learnt.
        epochs: of this training, as many as the run's by default.
        lr: of this training, two thirds of the run's by default, falling to 0.
        **settings: of `fit`; the run's own by default.

    Raises:
        ModelError: a model whose environments move nothing, or an unknown prior.
        DataError: a spike and slab for fewer than 4 perturbed environments.

    Example:
        >>> sparse = refine(unmix(run, cells), cells, epochs=1, progress=False)
        >>> "effects" in sparse.history  # the penalty that keeps effects sparse
        True
    """
    own = run.settings
    given = {"batch_size": own.batch_size, "clip": own.clip, "weight_decay": own.weight_decay, "schedule": "cosine"}
    given |= {"precision": own.precision, "shuffle": own.shuffle, "kl_weight": own.kl_weight, **settings}
    rate = lr if lr is not None else np.max(own.lr) * 2 / 3
    model, guide = copy.deepcopy(run.model), copy.deepcopy(run.guide)
    number = len(cells.environments)
    penalty: EffectSparsity | EffectSpikeSlab
    if prior == "student-t":
        penalty = EffectSparsity(model, number, 2.0 if weight is None else weight, size, offset)
    elif prior == "spike-slab":
        each = len(cells) / number if weight is None else weight
        penalty = EffectSpikeSlab(model, number, each, size, offset=offset, **groups(run))
    else:
        raise ModelError(f"unknown prior {prior!r}: use student-t or spike-slab")
    return fit(
        model,
        guide,
        cells,
        seeds=run.seeds,
        start=run,
        epochs=epochs if epochs is not None else own.epochs,
        lr=float(rate),
        kl_warmup=0.0,
        objective=Objective(penalties={"effects": penalty}),
        **given,  # type: ignore[arg-type]
    )


def directions(
    run: Run, cells: "EnvironmentDataset", *, rank: int | str | None = None, scales: bool = False, **options: Any
) -> list[Directions]:
    """The basis of each member, see `unmix`.

    Args:
        run: see `unmix`.
        cells: whose environments count.
        rank: see `unmix`.
        scales: see `unmix`.
        **options: of `sparse_directions`.

    Raises:
        ModelError: a rank that is neither a number nor ``"auto"``.
        DataError: see `sparse_directions`.
    """
    if isinstance(rank, str) and rank != "auto":
        raise ModelError(f"unknown rank {rank!r}: give a number of latents, 'auto', or None for all")
    asked = cells.present[~cells.reference[cells.present]]
    names = [str(n) for n in cells.environments.index[asked]]
    rows = [run.environments.index(name) for name in names]
    own = spreads(run, cells)[:, asked] if scales or rank == "auto" else None
    counts = np.bincount(cells.env, minlength=len(cells.environments))
    found = []
    for k, e in enumerate(_effects(run)[:, rows]):
        given = dict(options)
        if scales:
            assert own is not None
            given["covariances"] = own[k]
        if rank == "auto":
            assert own is not None
            given["rank"] = _rank(e, own[k], counts[asked], int(counts[cells.reference].sum()))
        elif rank is not None:
            given["rank"] = rank
        found.append(sparse_directions(e, **given))
    return found


def _rank(e: FloatArray, covariances: FloatArray, counts: NDArray[np.int64], references: int) -> int:
    """Number of leading singular values of effects ``[E, d]`` above those of their noise (parallel analysis).

    Horn, "A rationale and test for the number of factors in factor analysis", Psychometrika 1965.
    """
    rng = np.random.default_rng(0)
    roots = np.linalg.cholesky(covariances / counts[:, None, None] + 1e-12 * np.eye(e.shape[1]))
    common = np.linalg.cholesky(covariances.mean(0) / max(references, 1) + 1e-12 * np.eye(e.shape[1]))
    noise = np.einsum("eij,sej->sei", roots, rng.normal(size=(_NOISE_DRAWS, *e.shape)))
    noise = noise - rng.normal(size=(_NOISE_DRAWS, 1, e.shape[1])) @ common.T
    above = np.linalg.svd(e, compute_uv=False) > np.quantile(np.linalg.svd(noise, compute_uv=False), 0.95, axis=0)
    return max(int(np.cumprod(above).sum()), 1)


def spreads(run: Run, cells: "EnvironmentDataset") -> FloatArray:
    """Covariance ``[K, E, d, d]`` of the noise z in each environment: of the guide's means and its variances together.

    Args:
        run: of a model whose guide has a Normal encoder of z.
        cells: of the run's environments; NaN where an environment has none.

    Raises:
        ModelError: a guide of another kind.
    """
    number = len(cells.environments)
    counts = np.bincount(cells.env, minlength=number).astype(np.float64)
    result = []
    for model, guide in members(run):
        d = model.latent
        first, second = np.zeros((number, d)), np.zeros((number, d, d))
        device = next(model.parameters()).device
        with torch.no_grad(), forked():
            for batch in cells.batches(_CHUNK):
                law = _encoder(guide)(batch.to(device)).base_dist
                loc, env = law.loc.double().cpu().numpy(), batch.env.numpy()
                np.add.at(first, env, loc)
                np.add.at(second, env, np.einsum("ni,nj->nij", loc, loc))
                variances = np.zeros((number, d))
                np.add.at(variances, env, law.scale.double().square().cpu().numpy())
                second[:, range(d), range(d)] += variances
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = first / counts[:, None]
            result.append(second / counts[:, None, None] - np.einsum("ei,ej->eij", mean, mean))
    return np.stack(result)


def stability(run: Run, *, offset: bool = False) -> pd.DataFrame:
    """How well the effects on each latent of a member are found again by the other members.

    Latents of two members are matched one to one, up to sign, by the cosine of their effects over the environments that
    were trained on. Fits of one model to the same cells share nothing but what the cells say: after `unmix`, a latent
    that they agree on is one that the cells determine. On screens with known truth the agreement of a latent told how
    well it was recovered, and the number of latents above `STABLE` in a fit with too many of them how many there are.
    Which member is better it did not tell reliably; the lowest contrast (`Directions.score`) did
    (`experiments.unmixing_choices`).

    Args:
        run: two members or more, from `unmix` or `refine`.
        offset: whether each latent's median effect is taken off first.

    Returns:
        One row a member and latent: ``agreement``, the mean over the other members of the cosine's absolute value, 0 to
        1; ``size``, root mean square of the effects. A latent below `STABLE` should not be read.

    Raises:
        DataError: a single member.
        ModelError: a model whose environments move nothing.

    Example:
        >>> stability(unmix(run, cells)).columns.tolist()
        ['agreement', 'size']
    """
    if len(run) < 2:
        raise DataError("stability compares members: fit two or more, fit(..., seeds=range(5))")
    table = run.environments.table
    e = _effects(run)[:, (table["trained"] & ~table["is_reference"]).to_numpy(dtype=bool)]
    if offset:
        e = e - np.median(e, 1, keepdims=True)
    size = np.sqrt(np.square(e).mean(1))
    unit = e / np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-300)
    agreement = np.zeros_like(size)
    for k in range(len(run)):
        for other in range(len(run)):
            if other != k:
                cosine = np.abs(unit[k].T @ unit[other])
                rows, columns = linear_sum_assignment(cosine, maximize=True)
                agreement[k, rows] += cosine[rows, columns] / (len(run) - 1)
    nodes = [str(n) for n in run.model.scm.nodes]  # type: ignore[union-attr]
    index = pd.MultiIndex.from_product([range(len(run)), nodes], names=["member", "latent"])
    return pd.DataFrame({"agreement": agreement.ravel(), "size": size.ravel()}, index=index)


def _effects(run: Run) -> FloatArray:
    """``[K, E, d]``."""
    table = shifts(run)
    return table.to_numpy(np.float64).reshape(len(run), -1, table.shape[1])


def fold(run: Run, cells: "EnvironmentDataset", found: Sequence[Directions]) -> Run:
    """The run in the basis that was found for each member; `unmix` is this after `directions`.

    Args:
        run: see `unmix`.
        cells: training cells, on which the guide's spread is fitted.
        found: one a member.

    Raises:
        ModelError: see `unmix`.
    """
    model, guide = run.model, run.guide
    _check(model, guide)
    assert isinstance(model, LatentModel)
    parameters = {name: value.clone() for name, value in run.parameters.items()}
    like = next(iter(parameters.values()))
    m = torch.as_tensor(np.stack([f.matrix for f in found])).to(like.device, torch.float64)

    def put(name: str, value: Tensor) -> None:
        parameters[name] = value.to(parameters[name].dtype)

    def left(name: str) -> None:
        """M times the first d rows of a parameter, which make the latents; the others are left as they are."""
        value = parameters[name].double()
        value[:, : model.latent] = torch.einsum("kij,kj...->ki...", m, value[:, : model.latent])
        put(name, value)

    where = "shift" if model.shift is not None else "prior"
    for name, last in _effect_parameters(getattr(model, where), f"model.{where}"):
        if last:
            put(name, torch.einsum("kij,k...j->k...i", m, parameters[name].double()))
        else:
            left(name)
    back = _causal(run) @ torch.linalg.inv(m)  # z' -> c
    for i, likelihood in enumerate(model.likelihoods):
        for name in _entries(likelihood.net, f"model.likelihoods.{i}.net"):  # type: ignore[arg-type]
            weight = parameters[f"{name}.weight"].double()
            weight[..., : model.latent] = weight[..., : model.latent] @ back
            put(f"{name}.weight", weight)
    if isinstance(model.scm, LinearSCM):
        parameters["model.scm.weight"].zero_()
    encoder = guide.get_submodule(f"local.{Z}")
    name = _exit(encoder, f"guide.local.{Z}")
    spread = _spread(run, cells, m, name)
    left(f"{name}.weight")
    left(f"{name}.bias")
    for suffix, value in spread.items():
        own = parameters[f"{name}.{suffix}"]
        own[:, model.latent :] = value.to(own.dtype)
    result = replace(run, model=copy.deepcopy(model), guide=copy.deepcopy(guide), parameters=parameters)
    result.model, result.guide = result.member(run.best)
    return result


def _causal(run: Run) -> Tensor:
    """(I - A)^-1 ``(K, d, d)``."""
    rows = []
    for model, _ in members(run):
        with torch.no_grad():
            rows.append(model.scm.solve(torch.eye(model.latent).to(next(model.parameters()))).mT.double())
    return torch.stack(rows)


def _check(model: nn.Module, guide: nn.Module) -> None:
    plain = isinstance(model, LatentModel) and isinstance(model.scm, IndependentSCM | LinearSCM)
    if not plain or model.regime is not None:
        raise ModelError(
            "unmix needs a model without edges, or with linear ones under noise interventions: only those can be taken "
            "into the decoder"
        )
    moves = mover(model)
    if isinstance(moves, EnvironmentPrior) and moves.scale:
        raise ModelError("unmix needs environments that move means alone: fit the model with scale=False first")
    _effect_parameters(moves, "model")
    _encoder(guide)


def _effect_parameters(part: nn.Module, prefix: str) -> list[tuple[str, bool]]:
    """Parameters in which what a part adds to the latents is linear; whether latents are the last axis, or the first.

    Raises:
        ModelError: effects that are not dense, or of a part that is not known.
    """

    def layer(name: str) -> list[tuple[str, bool]]:
        return [(f"{name}.weight", False), (f"{name}.bias", False)]

    if isinstance(part, EnvironmentPrior | EnvironmentShift) and isinstance(part.sparsifier, Dense):
        return layer(_exit(part.net, f"{prefix}.net"))
    if isinstance(part, LinearShift):
        return [(f"{prefix}.effects", True)]
    if isinstance(part, DosedShift):
        return [(f"{prefix}.directions", True)]
    if isinstance(part, MoleculeShift):
        return layer(f"{prefix}.direction")
    if isinstance(part, CovariateShift):
        own = [f"{prefix}.context"] if part.context is not None else []
        return [(name, True) for name in own + [f"{prefix}.tables.{i}" for i in range(len(part.tables))]]
    if isinstance(part, CompositionShift):
        parts = (("effects", part.effects), ("covariates", part.covariates))
        return [found for name, each in parts for found in _effect_parameters(each, f"{prefix}.{name}")]
    if isinstance(part, ShiftedPrior):
        return [(f"{prefix}.centre", True), *_effect_parameters(part.shift, f"{prefix}.shift")]
    raise ModelError("unmix needs dense effects: fit the model with sparsity='dense' first")


def _encoder(guide: nn.Module) -> Any:
    """The guide's Normal encoder of z.

    Raises:
        ModelError: it has none.
    """
    local: Any = getattr(guide, "local", None)
    if local is None or Z not in local or not hasattr(local[Z], "floor"):
        raise ModelError(f"unmix needs a guide with a Normal encoder of site {Z!r}: build it with guides.amortise")
    return local[Z]


def _entries(net: nn.Module, prefix: str) -> list[str]:
    """Names of the linear layers that read a network's input, and nothing else reads it.

    Raises:
        ModelError: a network of another kind.
    """
    if isinstance(net, nn.Linear):
        return [prefix]
    if isinstance(net, nn.Sequential) and len(net):
        return _entries(net[0], f"{prefix}.0")
    if isinstance(net, Shortcut):
        return [*_entries(net.net, f"{prefix}.net"), f"{prefix}.line"]
    raise ModelError(f"{prefix} is a {type(net).__name__}: unmix needs a decoder that begins with a linear layer")


def _exit(net: nn.Module, prefix: str) -> str:
    """Name of the linear layer that alone makes a network's output.

    Raises:
        ModelError: there is none.
    """
    layers = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    if not layers or ".parts." in f".{layers[-1]}":
        raise ModelError(f"{prefix}: unmix needs a hidden layer there, whose outputs the last layer combines")
    return f"{prefix}.{layers[-1]}" if layers[-1] else prefix


def _spread(run: Run, cells: "EnvironmentDataset", m: Tensor, name: str) -> dict[str, Tensor]:
    """Last layer ``weight (K, d, h)`` and ``bias (K, d)`` of the guide's raw standard deviations in z' = M z.

    Of all diagonal Normals the one nearest to the turned posterior, KL(q || turned), has the inverse of the diagonal of
    its precision M^-T S^-1 M^-1 as variances.
    """
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(cells), min(len(cells), _SPREAD_CELLS), replace=False)
    weights, biases = [], []
    for k, (_, guide) in enumerate(members(run)):
        encoder = _encoder(guide)
        layer = guide.get_submodule(name.removeprefix("guide."))
        seen: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        with torch.no_grad(), forked():
            law = encoder(cells.batch(torch.as_tensor(np.sort(chosen))).to(m.device))
        hook.remove()
        precision = law.base_dist.scale.double().square().reciprocal()  # (n, d)
        inverse = torch.linalg.inv(m[k])
        turned = (precision @ inverse.square()).rsqrt()  # diag(M^-T S^-1 M^-1)_i = sum_j (M^-1)_ji^2 / s_j^2
        raw = _inverse_softplus((turned - encoder.floor).clamp(min=1e-6))
        h = seen[0].double()
        h = torch.cat([h, torch.ones_like(h[:, :1])], 1)
        ridge = 1e-6 * len(h) * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
        solved = torch.linalg.solve(h.mT @ h + ridge, h.mT @ raw)
        weights.append(solved[:-1].mT)
        biases.append(solved[-1])
    return {"weight": torch.stack(weights), "bias": torch.stack(biases)}


def _inverse_softplus(v: Tensor) -> Tensor:
    return v + torch.log(-torch.expm1(-v))
