"""Questions to a fitted model: interventions, counterfactuals, effects, predictions (Pearl's three rungs).

A counterfactual is abduction (the guide's posterior of the noise z of the cells that were seen), action (`do`, a noise
intervention, another environment) and prediction (the program run again with that noise). This module gathers the
questions; `pyro_scm.abduction` is what they are made of.
"""

from pyro_scm.abduction import abduct, isolated, member_count, transport
from pyro_scm.actions import Action, do, noise
from pyro_scm.contrasts import Contrast, effect, sweep
from pyro_scm.counterfactuals import Worlds, counterfactual, embed, expose
from pyro_scm.mediation import Mediation, mediate, path_effect
from pyro_scm.simulations import intervene, predict
from pyro_scm.support import Support

__all__ = [
    "Action",
    "Contrast",
    "Mediation",
    "Support",
    "Worlds",
    "abduct",
    "counterfactual",
    "do",
    "effect",
    "embed",
    "expose",
    "intervene",
    "isolated",
    "mediate",
    "member_count",
    "noise",
    "path_effect",
    "predict",
    "sweep",
    "transport",
]
