"""Drawing images with FlowAR: scale after scale, each by its own flow.

The transformer runs once per scale and passes its cache of keys and values on;
the flow head integrates the scale from noise. Guidance rises over the scales,
from none at the first to its full value at the last. The published sampler
moves a second, unconditional sample along that never counts; here there is
none.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax import values
from arflow_jax.errors import ConfigError
from arflow_jax.flow import guidance as guidance_lib
from arflow_jax.flow import integrate, paths, solvers
from arflow_jax.flow.integrate import Integrator
from arflow_jax.flowar.head import FlowHead
from arflow_jax.flowar.network import FlowAR
from arflow_jax.flowar.objective import integer_levels

METHODS = ("ode", "sde")
_RULES = guidance_lib.RULES | {
  "method": values.one_of(*METHODS),
  "grid": values.text,
  "num_steps": integrate.RULES["num_steps"],
  "scale_steps": values.each(integrate.RULES["num_steps"]),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the scales are drawn.

  Attributes:
    method: "ode" (Euler) or "sde" (Euler-Maruyama with the sigma diffusion, to
      0.04 before the data, and a last step without noise).
    grid: noise levels of the ODE: "published" (`published_grid`), "uniform", or
      the levels themselves for every scale, such as "1,0.6,0.3,0"; num_steps
      then counts for nothing.
    num_steps: steps of every scale; the "published" grid makes one fewer of an
      odd number.
    scale_steps: steps of each scale; empty stands for num_steps everywhere.
    guidance: classifier-free guidance scale at the last scale; 1 means none.
    guidance_low: lower end of the times (0 noise, 1 data) at which it applies.
    guidance_high: upper end of those times.

  Raises:
    ConfigError: an unknown name, or a number out of range.
  """

  method: str
  grid: str
  num_steps: int
  scale_steps: tuple[int, ...]
  guidance: float
  guidance_low: float
  guidance_high: float

  def __post_init__(self):
    values.check("sample.", vars(self), _RULES)
    self.levels(self.num_steps)  # checks the grid
    self.classifier_free(1.0)  # checks that its times ascend

  @classmethod
  def from_config(cls, sample: ConfigDict) -> "Settings":
    """The settings of a `sample` group.

    Raises:
      ConfigError: an unknown name, or a number out of range.
    """
    keys = [field.name for field in dataclasses.fields(cls)]
    settings = {key: sample[key] for key in keys if key in sample}
    return config_lib.make(cls, settings, "sample", _RULES)

  @property
  def integrator(self) -> Integrator:
    """The published one of either equation."""
    return Integrator(self.method, "sigma", 1.0, "mean", 0.04)

  def classifier_free(self, share: float) -> guidance_lib.Guidance:
    """The guidance of a scale; `share` rises from 0 at the first scale to 1."""
    return guidance_lib.Guidance(
      1 + (self.guidance - 1) * share,
      (self.guidance_low, self.guidance_high),
      None,
    )

  def levels(self, steps: int) -> Float[np.ndarray, "K"]:
    """Noise levels tau from 1 down to 0, float64, of a scale of so many steps.

    Raises:
      ConfigError: an unknown grid, or levels that do not fall from 1 to 0.
    """
    if self.grid == "published":
      levels = published_grid(steps)
    elif self.grid == "uniform":
      levels = np.linspace(1, 0, steps + 1)
    else:
      levels = self._own_levels()
    if self.method == "sde":
      last = self.integrator.last_step_size
      return np.append(np.linspace(1, last, steps), 0.0)
    return levels

  def _own_levels(self) -> Float[np.ndarray, "K"]:
    try:
      levels = np.array([float(text) for text in self.grid.split(",")])
    except ValueError:
      raise ConfigError(
        f"sample.grid={self.grid!r} is unknown; choose 'published', 'uniform'"
        " or levels such as '1,0.5,0'"
      ) from None
    falls = (np.diff(levels) < 0).all()
    if levels[0] != 1 or levels[-1] != 0 or not falls or len(levels) < 3:
      raise ConfigError(
        f"sample.grid={self.grid!r} must fall from 1 to 0 in 2 steps or more"
      )
    if self.method == "sde" or self.scale_steps:
      raise ConfigError(
        f"sample.grid={self.grid!r} leaves no room for sample.scale_steps or"
        " method 'sde', which make grids of their own; choose 'published'"
      )
    return levels

  def steps_of(self, index: int, scales: int) -> int:
    """Steps of scale `index` of so many scales.

    Raises:
      ConfigError: `scale_steps` that are not one for each scale.
    """
    if self.scale_steps and len(self.scale_steps) != scales:
      raise ConfigError(
        f"sample.scale_steps={self.scale_steps} must name {scales} numbers, one"
        " for each of model.scales, or none"
      )
    return self.scale_steps[index] if self.scale_steps else self.num_steps


def published_grid(steps: int) -> Float[np.ndarray, "K"]:
  """The published levels: even for 50 steps, else denser near the data."""
  if steps == 50:
    return np.linspace(1, 0, 51)
  half = steps // 2
  return np.concatenate(
    [np.linspace(1, 0.3, half), np.linspace(0.25, 0, half + 1)]
  )


def draw_scale(
  head: FlowHead,
  side: int,
  z: Float[Array, "R n W"],
  noise: Float[Array, "B n P"],
  kicks: solvers.Noise,
  levels: Float[np.ndarray, "K"],
  guidance: guidance_lib.Guidance,
  integrator: Integrator,
) -> Float[Array, "B n P"]:
  """Integrates one scale from noise to data.

  Args:
    head: the flow.
    side: of the scale, in tokens.
    z: conditions of the scale's tokens: B rows, or 2B with the unconditional
      ones second.
    noise: standard normal tokens to start from.
    kicks: the standard normal draw of step i of an SDE.
    levels: noise levels tau from 1 down to 0, float64.
    guidance: of this scale.
    integrator: of one evaluation a step.
  """
  batch = noise.shape[0]
  # The head counts noise levels in integers: a table, since 1 - t would round.
  integers = integer_levels(jnp.asarray(levels, jnp.float32))
  times = 1 - levels
  if not guidance.inside(times[:-1]).any():
    z = z[:batch]
  context = head.context(z, (side,))
  contexts = {rows: context.rows(rows) for rows in (batch, len(z))}

  def velocity(x, t, step):
    rows = x.shape[0]
    level = jnp.full((rows, 1), integers[step])
    return -head(x, level, contexts[rows], (side,)), step + 1

  velocities = guidance_lib.guide(velocity, guidance, times[:-1])
  return integrator(
    velocities, noise, jnp.int32(0), times, kicks, paths.LINEAR
  )[0]


def sample(
  network: FlowAR,
  keys: Key[Array, "B"],
  labels: Int[Array, "B"],
  settings: Settings,
) -> Float[Array, "B h w C"]:
  """Draws one image (or latent) per key and label.

  Args:
    network: with the weights to sample from.
    keys: one key per image: all its noise comes from it and from nothing else.
    labels: classes; `num_classes` samples without a class.
    settings: grid, steps and guidance.
  """
  config = network.config

  def noise(index, i):
    def draw(key):
      key = jax.random.fold_in(jax.random.fold_in(key, index), i)
      size = (config.pyramid.lengths[index], config.features)
      return jax.random.normal(key, size)

    return jax.vmap(draw)(keys)

  return draw_scales(network, labels, settings, noise)[-1]


def draw_scales(
  network: FlowAR,
  labels: Int[Array, "B"],
  settings: Settings,
  noise: Callable[[int, Int[Array, ""] | int], Float[Array, "B n P"]],
) -> list[Float[Array, "B _ _ C"]]:
  """The scale loop: what was drawn at every scale, the whole image last.

  Args:
    network: with the weights to sample from.
    labels: classes; `num_classes` samples without a class.
    settings: grid, steps and guidance.
    noise: `(scale, i)` to standard normal tokens: those to start from (i = 0)
      and the draw of step i - 1 (for "sde").
  """
  config = network.config
  pyramid, last = config.pyramid, len(config.scales) - 1
  rows = labels
  if settings.guidance != 1:
    rows = guidance_lib.with_null(labels, config.num_classes)
  drawn, cache = [], None
  for index, side in enumerate(config.scales):
    inputs = []
    if index:
      below = pyramid.next_input(drawn[-1], index)
      inputs = [jnp.concatenate([below] * (len(rows) // len(labels)))]
    z, cache = network.conditions(rows, inputs, cache, first=index)
    x = draw_scale(
      network.head,
      side,
      z,
      noise(index, 0),
      lambda i, index=index: noise(index, i + 1),
      settings.levels(settings.steps_of(index, last + 1)),
      settings.classifier_free(index / last if last else 1.0),
      settings.integrator,
    )
    drawn.append(pyramid.image(x))
  return drawn
