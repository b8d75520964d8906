"""The named models, one file each: functions (schema, options) -> `LatentModel`."""

from pyro_scm.models.adversarial_prior_ae import adversarial_prior_ae
from pyro_scm.models.ae import ae
from pyro_scm.models.conditional_vae import conditional_vae
from pyro_scm.models.environment_vae import environment_vae
from pyro_scm.models.structured_environment_vae import structured_environment_vae
from pyro_scm.models.structured_translation_vae import structured_translation_vae
from pyro_scm.models.translation_vae import translation_vae
from pyro_scm.models.vae import vae

__all__ = [
    "adversarial_prior_ae",
    "ae",
    "conditional_vae",
    "environment_vae",
    "structured_environment_vae",
    "structured_translation_vae",
    "translation_vae",
    "vae",
]
