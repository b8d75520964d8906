"""How many latents effects have, by halves of the cells."""

import numpy as np
import pytest

import pyro_scm as ps
from experiments import known_answers_crispr as crispr
from pyro_scm.effect_spectrum import halves_errors
from pyro_scm.errors import DataError


def test_halves_of_cells_tell_how_many_latents_effects_have() -> None:
    cells = crispr.dataset(crispr.simulated())
    errors = halves_errors(np.asarray(cells.x, float), cells.env, crispr.by_name(cells), draws=4, largest=6)
    assert errors[0] == pytest.approx(1.0)
    assert errors[3] < min(errors[2], errors[6])
    assert ps.effect_rank(cells, draws=4, largest=6) == 3  # pathway, SMAD4, BRD4; the control's own offset is not one


def test_no_effects_beyond_noise_leave_one_latent() -> None:
    rng = np.random.default_rng(0)
    env = np.repeat(np.arange(12), 30)
    errors = halves_errors(rng.normal(size=(360, 20)), env, list(range(12)), draws=4, largest=15)
    assert errors[1:].min() > 1
    assert np.isinf(errors[13:]).all()  # no more components than environments


def test_one_perturbed_environment_has_nothing_to_be_compared() -> None:
    cells = crispr.dataset(crispr.simulated())
    one = cells.subset(cells.reference[cells.env] | (cells.env == crispr.by_name(cells)[0]))
    with pytest.raises(DataError, match="1 perturbed environments have two cells or more"):
        ps.effect_rank(one)
