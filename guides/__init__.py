"""Amortised variational guides, built from a model's own sites.

Example:
    >>> from guides import amortise
    >>> from pyro_scm import models
    >>> from pyro_scm.batch import Schema
    >>> schema = Schema(genes=("g0", "g1"), environments=("NT", "A"), features=("A",), counts=False)
    >>> guide = amortise(models.environment_vae(schema, latent=3), schema, inputs=("x", "e"))
    >>> sorted(guide.local)
    ['z']
"""

from guides.amortise import AmortisedGuide, amortise
from guides.encoders import GaussianEncoder, PointEncoder
from guides.mean_field import MeanField

__all__ = ["AmortisedGuide", "GaussianEncoder", "MeanField", "PointEncoder", "amortise"]
