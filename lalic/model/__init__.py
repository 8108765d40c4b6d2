"""The LALIC network, exactly as published, and how its weights are read and written."""

from lalic.model.lalic import LALIC
from lalic.model.weights import fingerprint, load_weights, published_state_dict

__all__ = ["LALIC", "fingerprint", "load_weights", "published_state_dict"]
