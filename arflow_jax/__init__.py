"""Autoregressive flow image models in JAX: ARFlow, FlowAR, one flow core.

Importing this package imports nothing heavy; take what you need from the
sub-packages: `arflow_jax.arflow`, `arflow_jax.flow`, `arflow_jax.kernels`, ...
"""

import sys

__version__ = "0.1.0"

# While `python -m arflow_jax.train` looks for the main, the program is "-m". A
# main answers signals before it imports anything.
if sys.argv[:1] == ["-m"] and any(
  argument.startswith(f"{__name__}.") for argument in sys.orig_argv
):
  from arflow_jax import console, signals

  console.hold()
  signals.watch()
