"""The rotation between two linear decoders of two latents: is the environment's effect on one latent alone?"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from pyro_scm.errors import DataError
from pyro_scm.metrics.arguments import FloatArray, finite, matched


class Angle(NamedTuple):
    """The rotation between two decoders of two latents.

    Attributes:
        angle: Rotation in radians, in [0, pi).
        distance: Mean cosine distance of the rows at that rotation, in [0, 1]; near 0 when all rows agree on the angle.
        reflected: Whether the first column of the true matrix was multiplied by -1 first.
    """

    angle: float
    distance: float
    reflected: bool


def _two_columns(truth: ArrayLike, inferred: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Two decoder matrices of two latents over the same genes."""
    true, found = matched(truth, inferred, ("truth", "inferred"), 2)
    if true.shape[1] != 2:
        raise DataError(f"truth has shape {true.shape}: expected (G, 2), the angle is defined for two latents")
    return true, found


def _unit_columns(matrices: FloatArray) -> FloatArray:
    """Matrices [..., G, 2] with columns at unit length; a column that is zero beside the other one stays zero."""
    length = np.linalg.norm(matrices, axis=-2, keepdims=True)
    kept = length > 1e-12 * length.max(axis=-1, keepdims=True)
    unit: FloatArray = np.divide(matrices, length, out=np.zeros_like(matrices), where=kept)
    return unit


def row_cosine_distances(
    truth: ArrayLike, inferred: ArrayLike, angles: ArrayLike, *, reflected: bool = False, scaled: bool = False
) -> FloatArray:
    """D[t, i] = 1 - cos(row i of M R_theta_t, row i of M_hat): agreement of two linear decoders at each rotation.

    R_theta = [[cos, -sin], [sin, cos]]; range [0, 2], lower is better. Where all rows have their minimum 0 at the same
    angle, the inferred latents are a rotation of the true ones.

    Args:
        truth: True decoder M, genes by latents, shape [G, 2]; columns multiplied by the standard deviations of the true
            latents if those differ, because a rotation mixes latents in units of their spread.
        inferred: Learnt decoder M_hat, shape [G, 2].
        angles: Angles theta in radians, shape [T].
        reflected: Multiply the first column of M by -1 before the rotation.
        scaled: Divide the columns of M R_theta and of M_hat by their lengths: allows M_hat = M R_theta diag(lambda > 0)
            and is exact when lambda is the only difference.

    Returns:
        The distances, shape [T, G]; NaN for genes whose row of either matrix is zero.

    Source: "Towards Learning Cell Causal-Embeddings", section 6.1 and figure 6 (there without `scaled`).
    """
    true, found = _two_columns(truth, inferred)
    theta = finite(angles, "angles", 1)
    if reflected:
        true = true * np.array([-1.0, 1.0])
    cosines, sines = np.cos(theta), np.sin(theta)
    rotations = np.stack([np.stack([cosines, -sines], axis=-1), np.stack([sines, cosines], axis=-1)], axis=-2)
    rotated = true @ rotations
    if scaled:
        rotated, found = _unit_columns(rotated), _unit_columns(found)
    lengths = np.linalg.norm(rotated, axis=-1) * np.linalg.norm(found, axis=-1)
    products = np.sum(rotated * found, axis=-1)
    similarity = np.divide(products, lengths, out=np.full_like(products, np.nan), where=lengths > 0.0)
    distances: FloatArray = 1.0 - np.clip(similarity, -1.0, 1.0)
    return distances


def _refined_angle(true: FloatArray, found: FloatArray, reflected: bool, steps: int) -> Angle:
    """The best of `steps` angles in [0, pi), refined between its neighbours."""

    def distance(angles: FloatArray) -> FloatArray:
        rows = row_cosine_distances(true, found, angles, reflected=reflected, scaled=True)
        mean = np.nan_to_num(rows, nan=1.0).mean(axis=1)  # a row that lies in a vanished column has no direction
        folded: FloatArray = np.minimum(mean, 2.0 - mean)  # 2 - mean is the distance at theta + pi
        return folded

    grid = np.linspace(0.0, np.pi, steps, endpoint=False)
    start, width = float(grid[np.argmin(distance(grid))]), np.pi / steps
    refined = minimize_scalar(
        lambda angle: float(distance(np.array([angle]))[0]),
        bounds=(start - width, start + width),
        method="bounded",
        options={"xatol": 1e-9},
    )
    candidates = np.array([start, float(refined.x)])  # the grid may hold the exact angle
    values = distance(candidates)
    best = int(np.argmin(values))
    return Angle(float(candidates[best] % np.pi), float(values[best]), reflected)


def optimal_angle(truth: ArrayLike, inferred: ArrayLike, *, steps: int = 1800) -> Angle:
    """Best theta in [0, pi) and reflection S for the mean over rows of 1 - cos(row of M S R_theta, row of M_hat).

    The model is M_hat = M S R_theta diag(lambda), S the identity or diag(-1, 1), lambda any two numbers. Columns are
    scaled as in `row_cosine_distances`; theta + pi is theta with both signs of lambda flipped, so both are tried and
    theta is reported in [0, pi); one flipped sign is the reflection. The best angle of a grid is refined by bounded
    scalar minimisation. The inferred latents are disentangled from the environment effect if and only if the angle is a
    multiple of pi/2 (`angle_to_axis` is 0) at a distance near 0; at a large distance the angle means nothing.

    Args:
        truth: True decoder M, genes by latents, shape [G, 2], columns in units of the true latents' spread.
        inferred: Learnt decoder M_hat, shape [G, 2].
        steps: Number of angles on the grid of each reflection, 8 or more.

    Returns:
        The angle, the mean distance over genes whose rows are not zero, and whether the reflection was needed; NaN when
        no gene has two non-zero rows. Equal distances prefer no reflection, then the smaller angle.

    Source: "Towards Learning Cell Causal-Embeddings", section 6.1.
    """
    true, found = _two_columns(truth, inferred)
    if steps < 8:
        raise DataError(f"steps is {steps}: expected 8 or more angles")
    rows = true.any(axis=1) & found.any(axis=1)
    if not rows.any():
        return Angle(float("nan"), float("nan"), False)
    plain, mirrored = (_refined_angle(true[rows], found[rows], reflected, steps) for reflected in (False, True))
    return mirrored if mirrored.distance < plain.distance - 1e-12 else plain


def angle_to_axis(angle: float) -> float:
    """Distance of an angle to the nearest multiple of pi/2, |((angle + pi/4) mod pi/2) - pi/4|.

    Range [0, pi/4] radians, lower is better: 0 when the latents are the true ones up to order, sign and scale; the mean
    for an angle drawn at random is pi/8.

    Args: an angle in radians, such as `Angle.angle`. Returns: the distance in radians; NaN for NaN.
    """
    return float(abs((angle + np.pi / 4) % (np.pi / 2) - np.pi / 4))
