"""The train state, and one jitted step for any branch.

Random keys are folded from (seed, step, row of the global batch), so that noise
and label dropout belong to the item, however the batch is split over devices or
micro-batches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from arflow_jax.branches import Branch
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.training import gradients

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
  """Everything that training carries from step to step."""

  step: Any  # int32 []: optimiser steps done, also the data position
  params: Any
  ema: Any  # exponential moving average of params, for sampling
  opt_state: Any


def abstract_params(branch: Branch, mesh: Mesh | AbstractMesh) -> Any:
  """Shapes, types and shardings of the weights; allocates nothing."""
  shapes = jax.eval_shape(branch.init, jax.random.key(0))
  return mesh_lib.abstract_params(branch.axes, shapes, mesh)


def abstract_state(
  branch: Branch,
  tx: optax.GradientTransformation,
  mesh: Mesh | AbstractMesh,
) -> TrainState:
  """Shapes, types and shardings of the whole train state; allocates nothing."""
  params = abstract_params(branch, mesh)
  whole = mesh_lib.replicated(mesh)

  def place(array, sharding):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

  opt_state = optax.tree_utils.tree_map_params(
    tx,
    place,
    jax.eval_shape(tx.init, params),
    jax.tree.map(lambda leaf: leaf.sharding, params),
    transform_non_params=lambda array: place(array, whole),
  )
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
  return TrainState(step=step, params=params, ema=params, opt_state=opt_state)


def init_state(
  branch: Branch,
  tx: optax.GradientTransformation,
  abstract: TrainState,
  key: Key[Array, ""],
  params: Any = None,
) -> TrainState:
  """The train state of step 0, made straight into its shards.

  Args:
    branch: draws the parameters.
    tx: the optimiser.
    abstract: what `abstract_state` returned.
    key: of the draw.
    params: weights to begin with, also as the average; None draws them.
  """

  def init(key, params):
    if params is None:
      params = branch.init(key)
    # Buffers of their own, for the train step donates them.
    copy = lambda: jax.tree.map(jnp.copy, params)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=copy(),
      ema=copy(),
      opt_state=tx.init(params),
    )

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return jax.jit(init, out_shardings=shardings)(key, params)


def item_keys(seed: int, step: Int[Array, ""], rows: int) -> Key[Array, "B"]:
  """One key per row of the global batch of one step."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def average(ema: Any, params: Any, decay: float) -> Any:
  """The exponential moving average after one more step: `e + (1-d)(p - e)`.

  Not `d e + (1-d) p`, the published form: in float32 its two coefficients sum
  to 1 - 1.7e-8 at d = 0.9999, and the average shrinks by 1.6e-4 in time.
  """
  return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)


def make_train_step(
  branch: Branch,
  tx: optax.GradientTransformation,
  config: ConfigDict,
  abstract: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Builds `step(state, batch) -> (state, metrics)`, jitted; donates `state`.

  Metrics are scalars: `loss`, `grad_norm` before clipping, and `param_norm`
  after the update. With `optimizer.skip_nonfinite` a step whose loss or
  gradient is not finite leaves parameters, moments and averages as they were;
  it counts as a step, and `skipped` is 1.

  Args:
    branch: gives the loss.
    tx: the optimiser.
    config: the full config.
    abstract: what `abstract_state` returned; the state that comes out has just
      its shardings, whatever the compiler would choose.
  """
  decay, whole = config.ema.decay, abstract.step.sharding
  loss_and_grads = gradients.make(
    branch, whole.mesh, config.optimizer.accumulation
  )

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    keys = item_keys(config.seed, state.step, config.batch_size)
    loss, grads = loss_and_grads(state.params, batch, keys)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = average(state.ema, params, decay)
    before = state.replace(step=state.step + 1)
    state = before.replace(params=params, ema=ema, opt_state=opt_state)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    if config.optimizer.skip_nonfinite:
      # Not optax.apply_if_finite: it looks at every array again, leaves the
      # average to us, and would be one more tree in checkpoints.
      finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
      state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), state, before
      )
      metrics["skipped"] = 1.0 - finite
    # Tells whether this very state is fit to be saved.
    metrics["param_norm"] = optax.tree.norm(state.params)
    return state, metrics

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))
