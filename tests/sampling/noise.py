"""A branch that draws noise about its labels: a model that costs nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from arflow_jax import branches
from arflow_jax.sampling import run
from tests.tiny import tiny_config


class Noise(branches.Branch):
  """Remembers the ambient mesh of every trace."""

  num_classes = 10

  def __init__(self, image_shape=(8, 8, 1)):
    self.image_shape = image_shape
    self.meshes = []

  def settings(self, sample):
    return sample.guidance

  def sample(self, params, keys, labels, settings):
    self.meshes.append(jax.sharding.get_abstract_mesh())
    noise = jax.vmap(lambda key: jax.random.normal(key, self.image_shape))(keys)
    return params * noise + 0.1 * labels[:, None, None, None]


def noise_run(mesh, step=7, scale=0.1, **overrides):
  """A restored run of it."""
  config = tiny_config(**overrides)
  size = config.model.image_size
  branch = Noise((size, size, config.model.channels))
  params = jax.device_put(
    jnp.float32(scale), jax.sharding.NamedSharding(mesh, jax.P())
  )
  return run.Run(config, branch, params, step, mesh)


def one_device():
  """A mesh of the first device."""
  return jax.sharding.Mesh(
    np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp")
  )
