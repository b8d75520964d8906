"""What is minimised: ELBO, importance-weighted bound, penalties, adversaries."""

from pyro_scm.objectives.counterfactual import CounterfactualAdversary, adversarial_prior
from pyro_scm.objectives.elbo import Adversary, Objective, Penalty, Terms, World
from pyro_scm.objectives.importance import ImportanceWeighted
from pyro_scm.objectives.irm import IRM
from pyro_scm.objectives.sparsity import EffectSparsity

__all__ = [
    "IRM",
    "Adversary",
    "CounterfactualAdversary",
    "EffectSparsity",
    "ImportanceWeighted",
    "Objective",
    "Penalty",
    "Terms",
    "World",
    "adversarial_prior",
]
