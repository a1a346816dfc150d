"""Where time may run: cut-offs at the ends that a path or a form cannot reach.

The rule of SiT (arXiv 2401.08740), with three published faults set right: each
cut-off has its own default, a given cut-off is used for velocity prediction
too, and the `sbdm` diffusion, infinite at t = 0, starts at 1e-3 at the least.
"""

from arflow_jax.flow.paths import Path

# Score and noise predictions turn into velocities by dividing by t and 1 - t.
_SINGULAR = 1e-3


def training(
  path: Path, prediction: str = "velocity", eps: float | None = None
) -> tuple[float, float]:
  """The interval (t0, t1) that training times are drawn from.

  Args:
    path: the interpolation path.
    prediction: a name in `objective.PREDICTIONS`.
    eps: the cut-off; None stands for 1e-5 on VP, and elsewhere 0 for velocity
      and 1e-3 for noise and score.
  """
  default = 1e-5 if path.name == "vp" else _default(prediction)
  return _interval(path, default if eps is None else eps)


def sampling(
  path: Path,
  prediction: str = "velocity",
  eps: float | None = None,
  *,
  diffusion: str | None = None,
  last_step_size: float = 0.0,
  reverse: bool = False,
) -> tuple[float, float]:
  """The interval (t0, t1) to integrate over, from noise to data.

  Args:
    path: the interpolation path.
    prediction: a name in `objective.PREDICTIONS`.
    eps: the cut-off; None stands for 1e-3 on VP, and elsewhere 0 for velocity
      and 1e-3 for noise and score.
    diffusion: form of an SDE; None for the ODE.
    last_step_size: of an SDE that ends with one; it then ends at 1.
    reverse: of an ODE, from data to noise: (1 - t0, 1 - t1) as published, which
      mirrors the cut-offs of VP rather than keeping them.
  """
  default = _SINGULAR if path.name == "vp" else _default(prediction)
  low, high = _interval(path, default if eps is None else eps)
  if diffusion == "sbdm" and path.name != "vp":
    low = max(low, _SINGULAR)
  high = 1 - last_step_size if last_step_size else high
  return (1 - low, 1 - high) if reverse else (low, high)


def _default(prediction: str) -> float:
  return 0.0 if prediction == "velocity" else _SINGULAR


def _interval(path: Path, eps: float) -> tuple[float, float]:
  # VP is no pure noise at t = 0, so that nothing is singular there.
  return (0.0 if path.name == "vp" else eps), 1 - eps
