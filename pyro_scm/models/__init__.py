"""The named models, one file each: functions (schema, options) -> `LatentModel`."""

from pyro_scm.models.adversarial_prior_ae import adversarial_prior_ae
from pyro_scm.models.ae import ae
from pyro_scm.models.chemcpa import chemcpa
from pyro_scm.models.conditional_vae import conditional_vae
from pyro_scm.models.cpa import cpa
from pyro_scm.models.decoder_only import decoder_only
from pyro_scm.models.discrepancy_vae import discrepancy_vae
from pyro_scm.models.environment_vae import environment_vae
from pyro_scm.models.latent_additive import latent_additive
from pyro_scm.models.multicpa import multicpa
from pyro_scm.models.sams_vae import sams_vae
from pyro_scm.models.scgen import scgen
from pyro_scm.models.structured_environment_vae import structured_environment_vae
from pyro_scm.models.structured_translation_vae import structured_translation_vae
from pyro_scm.models.svae_plus import svae_plus
from pyro_scm.models.translation_vae import translation_vae
from pyro_scm.models.vae import vae

__all__ = [
    "adversarial_prior_ae",
    "ae",
    "chemcpa",
    "conditional_vae",
    "cpa",
    "decoder_only",
    "discrepancy_vae",
    "environment_vae",
    "latent_additive",
    "multicpa",
    "sams_vae",
    "scgen",
    "structured_environment_vae",
    "structured_translation_vae",
    "svae_plus",
    "translation_vae",
    "vae",
]
