"""Softmax attention inside an image plus a gated linear read of earlier ones.

The public operator is `hybrid_attention`; one file per implementation.
"""

from arflow_jax.kernels.hybrid_attention.api import (
  IMPLEMENTATIONS,
  form,
  hybrid_attention,
  misfit,
  state_shape,
)

__all__ = [
  "IMPLEMENTATIONS",
  "form",
  "hybrid_attention",
  "misfit",
  "state_shape",
]
