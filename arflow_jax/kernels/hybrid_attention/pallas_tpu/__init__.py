"""Pallas kernels of hybrid attention for TPUs, forward and backward."""

from arflow_jax.kernels.hybrid_attention.pallas_tpu.op import hybrid_attention
from arflow_jax.kernels.hybrid_attention.pallas_tpu.plan import Plan

__all__ = ["Plan", "hybrid_attention"]
