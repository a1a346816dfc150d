"""Autoregressive flow image models in JAX: ARFlow, FlowAR, one flow core.

Importing this package imports nothing else; take what you need from the
sub-packages: `arflow_jax.arflow`, `arflow_jax.flow`, `arflow_jax.kernels`, ...
"""

__version__ = "0.1.0"
