"""The LALIC network, exactly as published, and how its weights are read and written."""

import warnings

with warnings.catch_warnings():
    # A library that CompressAI imports still uses torch.jit.script, which newer torch versions announce loudly.
    warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
    from lalic.model.lalic import LALIC
from lalic.model.weights import fingerprint, load_weights, published_state_dict

__all__ = ["LALIC", "fingerprint", "load_weights", "published_state_dict"]
