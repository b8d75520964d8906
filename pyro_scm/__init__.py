"""Latent structural causal models of gene expression under perturbation, as Pyro programs.

Axes and letters, the same everywhere:

    n, N   cells of a batch, of the data set          x (n, G)   expression
    G, P   genes, proteins                            y (n, P)   protein counts
    d      latent causal variables (nodes)            z (n, d)   exogenous noise
    E, F   environments, features of one              c (n, d)   causal variables, c_j = f_j(PA_j) + z_j
    K, S   members of an ensemble, posterior draws    r (E, F)   representation of environments, e (n, F) of cells

Names are loaded when they are first used, so that `import pyro_scm` and the command line start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_scm import baselines, effects, graphs, metrics, models, ordering
    from pyro_scm.agreement import scatter
    from pyro_scm.combinations import interactions
    from pyro_scm.composition import dosed
    from pyro_scm.conditions import novelty
    from pyro_scm.contracts import check
    from pyro_scm.coordinates import InCausalVariables, in_noise
    from pyro_scm.counterfactual_recovery import counterfactual_error
    from pyro_scm.criticism import checks
    from pyro_scm.data.dataset import EnvironmentDataset
    from pyro_scm.data.leaks import leaks
    from pyro_scm.data.synthetic import simulate
    from pyro_scm.dictionaries import dictionary
    from pyro_scm.doses import dose_response
    from pyro_scm.effect_spectrum import effect_rank
    from pyro_scm.evaluation import compare
    from pyro_scm.hill import fit_hill
    from pyro_scm.infer import fit, grid
    from pyro_scm.model import LatentModel
    from pyro_scm.objectives import IRM, EffectSparsity, EffectSpikeSlab, ImportanceWeighted, Objective
    from pyro_scm.posterior import to_arviz
    from pyro_scm.pretraining import transfer
    from pyro_scm.probing import disentanglement
    from pyro_scm.programmes import gene_programmes
    from pyro_scm.query import (
        Action,
        counterfactual,
        do,
        effect,
        embed,
        expose,
        intervene,
        mediate,
        noise,
        path_effect,
        predict,
        sweep,
    )
    from pyro_scm.recipes import load
    from pyro_scm.run import Run
    from pyro_scm.soundness import axioms
    from pyro_scm.structure_search import GraphPosterior, learn_graph, learn_latent_graph
    from pyro_scm.tuning import tune
    from pyro_scm.unmixing import refine, stability, unmix

_PLACES = {
    "Action": "query",
    "EffectSparsity": "objectives",
    "EffectSpikeSlab": "objectives",
    "EnvironmentDataset": "data.dataset",
    "GraphPosterior": "structure_search",
    "IRM": "objectives",
    "ImportanceWeighted": "objectives",
    "InCausalVariables": "coordinates",
    "LatentModel": "model",
    "Objective": "objectives",
    "Run": "run",
    "axioms": "soundness",
    "baselines": "",
    "check": "contracts",
    "checks": "criticism",
    "compare": "evaluation",
    "counterfactual": "query",
    "counterfactual_error": "counterfactual_recovery",
    "dictionary": "dictionaries",
    "disentanglement": "probing",
    "do": "query",
    "dose_response": "doses",
    "dosed": "composition",
    "effect": "query",
    "effect_rank": "effect_spectrum",
    "effects": "",
    "embed": "query",
    "expose": "query",
    "fit": "infer",
    "fit_hill": "hill",
    "gene_programmes": "programmes",
    "graphs": "",
    "grid": "infer",
    "in_noise": "coordinates",
    "interactions": "combinations",
    "intervene": "query",
    "leaks": "data.leaks",
    "learn_graph": "structure_search",
    "learn_latent_graph": "structure_search",
    "load": "recipes",
    "mediate": "query",
    "metrics": "",
    "models": "",
    "noise": "query",
    "novelty": "conditions",
    "ordering": "",
    "path_effect": "query",
    "predict": "query",
    "refine": "unmixing",
    "scatter": "agreement",
    "simulate": "data.synthetic",
    "stability": "unmixing",
    "sweep": "query",
    "to_arviz": "posterior",
    "transfer": "pretraining",
    "tune": "tuning",
    "unmix": "unmixing",
}

__all__ = [
    "IRM",
    "Action",
    "EffectSparsity",
    "EffectSpikeSlab",
    "EnvironmentDataset",
    "GraphPosterior",
    "ImportanceWeighted",
    "InCausalVariables",
    "LatentModel",
    "Objective",
    "Run",
    "axioms",
    "baselines",
    "check",
    "checks",
    "compare",
    "counterfactual",
    "counterfactual_error",
    "dictionary",
    "disentanglement",
    "do",
    "dose_response",
    "dosed",
    "effect",
    "effect_rank",
    "effects",
    "embed",
    "expose",
    "fit",
    "fit_hill",
    "gene_programmes",
    "graphs",
    "grid",
    "in_noise",
    "interactions",
    "intervene",
    "leaks",
    "learn_graph",
    "learn_latent_graph",
    "load",
    "mediate",
    "metrics",
    "models",
    "noise",
    "novelty",
    "ordering",
    "path_effect",
    "predict",
    "refine",
    "scatter",
    "simulate",
    "stability",
    "sweep",
    "to_arviz",
    "transfer",
    "tune",
    "unmix",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pyro_scm' has no attribute {name!r}")
    place = _PLACES[name]
    value = getattr(import_module(f"pyro_scm.{place}"), name) if place else import_module(f"pyro_scm.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
