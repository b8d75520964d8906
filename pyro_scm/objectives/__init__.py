"""What is minimised: ELBO, importance-weighted bound, penalties, adversaries."""

from pyro_scm.objectives.compositional import BasalAdversary, compositional
from pyro_scm.objectives.counterfactual import CounterfactualAdversary, adversarial_prior
from pyro_scm.objectives.discrepancy import InterventionMMD, discrepancy
from pyro_scm.objectives.elbo import Adversary, Objective, Penalty, Terms, World
from pyro_scm.objectives.importance import ImportanceWeighted
from pyro_scm.objectives.independence import Independence
from pyro_scm.objectives.irm import IRM
from pyro_scm.objectives.sparsity import EffectSparsity, EffectSpikeSlab

__all__ = [
    "IRM",
    "Adversary",
    "BasalAdversary",
    "CounterfactualAdversary",
    "EffectSparsity",
    "EffectSpikeSlab",
    "ImportanceWeighted",
    "Independence",
    "InterventionMMD",
    "Objective",
    "Penalty",
    "Terms",
    "World",
    "adversarial_prior",
    "compositional",
    "discrepancy",
]
