"""What is minimised: ELBO, penalties, adversaries."""

from pyro_scm.objectives.elbo import Adversary, Objective, Penalty, Terms, World

__all__ = ["Adversary", "Objective", "Penalty", "Terms", "World"]
