"""Everything that a train step is made of, from a config and devices.

Built from shapes alone: nothing is allocated before `init` or a restore, so
that the devices may be the description of a pod that is not there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from arflow_jax import branches
from arflow_jax import config as config_lib
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.parallel import processes
from arflow_jax.training import memory, optimizer, state


@dataclasses.dataclass(frozen=True)
class Program:
  """A train step and what goes into it.

  Attributes:
    config: the full config.
    branch: the model family.
    mesh: the devices.
    tx: the optimiser.
    step: `(state, batch) -> (state, metrics)`, jitted; donates the state.
    abstract_state: shapes, types and shardings of the train state.
    abstract_batch: those of a global batch: `images` [B, S, h, w, C] float32,
      `labels` [B] int32.
  """

  config: ConfigDict
  branch: branches.Branch
  mesh: Mesh
  tx: optax.GradientTransformation
  step: Callable[..., tuple[state.TrainState, state.Metrics]]
  abstract_state: state.TrainState
  abstract_batch: dict[str, jax.ShapeDtypeStruct]

  @property
  def rows(self) -> Int[np.ndarray, "n"]:
    """Rows of every global batch that this process makes."""
    sharding = mesh_lib.batch_sharding(self.mesh)
    return processes.rows(sharding, self.config.batch_size)

  @property
  def form(self) -> str | None:
    """See `branches.Branch.form`; raises ConfigError."""
    with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
      return self.branch.form(self.config.batch_size)

  def place(self, batch: dict[str, np.ndarray]) -> state.Batch:
    """A global batch on the devices, from this process's rows of it."""
    sharding = mesh_lib.batch_sharding(self.mesh)
    return processes.place(sharding, batch, self.config.batch_size)

  def init(self, params: Any = None) -> state.TrainState:
    """The train state of step 0; see `state.init_state`."""
    key = jax.random.key(self.config.seed)
    return state.init_state(
      self.branch, self.tx, self.abstract_state, key, params
    )


def build(
  config: ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Program:
  """The program of a config on some devices, or on all there are.

  Raises:
    ConfigError: settings that cannot work, alone or on these devices.
  """
  config_lib.check(config)
  branch = branches.build(config)
  branch.settings(config.sample)  # else found when it draws, after training
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  mesh_lib.check_batch(mesh, config.batch_size, config.optimizer.accumulation)
  tx = optimizer.make_optimizer(config.optimizer, branch.axes)
  sharding = mesh_lib.batch_sharding(mesh)
  shape = (config.batch_size, *branch.item_shape)
  abstract_state = state.abstract_state(branch, tx, mesh)
  abstract_batch = {
    "images": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),
    "labels": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=sharding),
  }
  memory.check(config, branch, mesh, abstract_state, abstract_batch)
  return Program(
    config=config,
    branch=branch,
    mesh=mesh,
    tx=tx,
    step=state.make_train_step(branch, tx, config, abstract_state),
    abstract_state=abstract_state,
    abstract_batch=abstract_batch,
  )
