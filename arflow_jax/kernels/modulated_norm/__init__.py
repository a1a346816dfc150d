"""Layer norm and adaLN modulation as one operator: `modulated_norm`."""

from arflow_jax.kernels.modulated_norm.api import modulated_norm

__all__ = ["modulated_norm"]
