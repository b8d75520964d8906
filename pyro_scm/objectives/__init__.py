"""What is minimised: ELBO, importance-weighted bound, penalties, adversaries."""

from pyro_scm.objectives.elbo import Adversary, Objective, Penalty, Terms, World
from pyro_scm.objectives.importance import ImportanceWeighted

__all__ = ["Adversary", "ImportanceWeighted", "Objective", "Penalty", "Terms", "World"]
