"""AdamW (arXiv 1711.05101) with the grouping of the published ARFlow recipe.

Weight decay on all but biases and the gains of norms; gradients clipped by
value (published) or by global norm; warm-up, then constant (published) or
cosine learning rate.
"""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from arflow_jax.errors import ConfigError


def learning_rate(optimizer: ConfigDict) -> optax.Schedule:
  """Linear warm-up, then constant, or cosine until `decay_steps`.

  The schedule never looks at the number of steps to run, so that a run can be
  continued for longer without changing what it did.

  Raises:
    ConfigError: an unknown schedule, or a cosine without its end.
  """
  peak, warmup = optimizer.peak_lr, optimizer.warmup_steps
  if optimizer.schedule == "constant":
    after = optax.constant_schedule(peak)
  elif optimizer.schedule == "cosine":
    if not optimizer.decay_steps or optimizer.decay_steps <= warmup:
      raise ConfigError(
        f"optimizer.decay_steps={optimizer.decay_steps} must exceed"
        f" optimizer.warmup_steps={warmup} for schedule 'cosine'"
      )
    span = optimizer.decay_steps - warmup
    after = optax.cosine_decay_schedule(peak, span, optimizer.final_fraction)
  else:
    raise ConfigError(
      f"optimizer.schedule={optimizer.schedule!r} is unknown; choose"
      " 'constant' or 'cosine'"
    )
  # The first step already moves: its rate is peak / warmup.
  ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, after], [warmup])


def decay_mask(axes: Any) -> Any:
  """True where weight decay applies: on all but biases and gains of norms.

  The published grouping, whose parameters of two or more axes decay, by the
  names of ours: a bias of attention has an axis for its heads here.

  Args:
    axes: tree of the axes of every parameter.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key not in ("bias", "scale"),
    axes,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def make_optimizer(
  optimizer: ConfigDict, axes: Any
) -> optax.GradientTransformation:
  """Clipping, then AdamW with decoupled decay (`p -= lr (m / v + wd p)`).

  Args:
    optimizer: the config group.
    axes: logical axes of every parameter.

  Raises:
    ConfigError: an unknown schedule or clip, or a value out of range.
  """
  clips = {
    "none": lambda threshold: optax.identity(),
    "value": optax.clip,
    "global_norm": optax.clip_by_global_norm,
  }
  if optimizer.clip not in clips:
    raise ConfigError(
      f"optimizer.clip={optimizer.clip!r} is unknown; choose from"
      f" {sorted(clips)}"
    )
  return optax.chain(
    clips[optimizer.clip](optimizer.clip_threshold),
    optax.adamw(
      learning_rate(optimizer),
      b1=optimizer.b1,
      b2=optimizer.b2,
      eps=optimizer.eps,
      weight_decay=optimizer.weight_decay,
      mask=decay_mask(axes),
    ),
  )
