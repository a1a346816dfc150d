"""Where time may run: cut-offs at the ends that a path or a form cannot reach.

The rule of SiT (arXiv 2401.08740), with three published faults set right: each
cut-off has its own default, a given cut-off is used for velocity prediction
too, and the `sbdm` diffusion, infinite at t = 0, starts at 1e-3 at the least.
"""

from arflow_jax.errors import ConfigError
from arflow_jax.flow.objective import PREDICTIONS
from arflow_jax.flow.paths import Path
from arflow_jax.flow.solvers import DIFFUSIONS

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

  Raises:
    ConfigError: an unknown prediction, or a cut-off outside [0, 0.5).
  """
  default = _default(path, prediction, 1e-5)
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
      mirrors the cut-offs of VP rather than keeping them: it starts at t = 1,
      where a VP noise prediction has no velocity.

  Raises:
    ConfigError: unknown names, sizes out of range, or the reverse of an SDE.
  """
  if diffusion not in (None, *DIFFUSIONS):
    raise ConfigError(
      f"diffusion={diffusion!r} is unknown; choose from {sorted(DIFFUSIONS)}"
    )
  if not 0 <= last_step_size < 1:
    raise ConfigError(f"last_step_size={last_step_size} must lie in [0, 1)")
  if reverse and diffusion:
    raise ConfigError("an SDE has no reverse; leave out reverse or diffusion")
  default = _default(path, prediction, _SINGULAR)
  low, high = _interval(path, default if eps is None else eps)
  if diffusion == "sbdm" and path.name != "vp":
    low = max(low, _SINGULAR)
  high = 1 - last_step_size if last_step_size else high
  return (1 - low, 1 - high) if reverse else (low, high)


def _default(path: Path, prediction: str, on_vp: float) -> float:
  if prediction not in PREDICTIONS:
    raise ConfigError(
      f"prediction={prediction!r} is unknown; choose from {PREDICTIONS}"
    )
  if path.name == "vp":
    return on_vp
  return 0.0 if prediction == "velocity" else _SINGULAR


def _interval(path: Path, eps: float) -> tuple[float, float]:
  if not 0 <= eps < 0.5:
    raise ConfigError(f"eps={eps} must lie in [0, 0.5)")
  # VP is no pure noise at t = 0, so that nothing is singular there.
  return (0.0 if path.name == "vp" else eps), 1 - eps
