"""The benchmark: what it counts and where its batches come from."""

import jax
import jax.numpy as jnp
import pytest

from arflow_jax import branches
from arflow_jax.analysis import benchmark, flops
from arflow_jax.errors import ConfigError
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def speeds():
  """Of a config whose data are not there, with small matrix products."""
  config = tiny_config(data__source="latents")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(benchmark, "product_side", lambda: 64)
    return benchmark.measure(config, ["train", "sample"], repeats=3)


def test_images_are_counted_not_sequences(speeds):
  assert speeds["train"].images == 4 * 5
  assert speeds["sample"].images == 8
  for speed in speeds.values():
    assert len(speed.step_times) == len(speed.product_rates) == 3
    assert min(speed.step_times) > 0
    # At least the parameters and what they are multiplied with.
    assert speed.peak_memory > 4 * 15_396


def test_a_train_step_counts_three_forward_passes(speeds):
  config = tiny_config()
  branch = branches.build(config)
  params = jax.eval_shape(branch.init, jax.random.key(0))
  batch = {
    "images": jax.ShapeDtypeStruct((4, *branch.item_shape), jnp.float32),
    "labels": jax.ShapeDtypeStruct((4,), jnp.int32),
  }
  keys = jax.random.split(jax.random.key(0), 4)
  forward = flops.count(branch.loss, params, batch, keys)
  assert speeds["train"].flops == 3 * forward
  grad = jax.grad(lambda *args: branch.loss(*args).mean())
  # Without remat the gradient's own count is near that.
  config.model.remat = "none"
  branch = branches.build(config)
  counted = flops.count(grad, params, batch, keys)
  assert abs(counted / (3 * forward) - 1) < 0.1


def test_donated_arguments_are_planned_once():
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  compiled = step.lower(jnp.ones((256, 256))).compile()
  assert benchmark.planned_memory(compiled) == 256 * 256 * 4


def test_unknown_programs_and_data_are_refused():
  with pytest.raises(ConfigError, match="--what= is empty"):
    benchmark.measure(tiny_config(), [])
  with pytest.raises(ConfigError, match="--what=smaple is unknown"):
    benchmark.measure(tiny_config(), ["smaple"])
  with pytest.raises(ConfigError, match=r"data\.source='digitz' is unknown"):
    benchmark.measure(tiny_config(data__source="digitz"), ["train"], 1)


def test_batches_for_latents_are_noise(speeds):
  assert speeds["train"].input_source == "random, for latents"
  assert speeds["train"].input_wait >= 0
  assert speeds["sample"].input_wait is None


def test_share_is_the_median_of_the_pairs():
  speed = benchmark.Speed(
    1.0, [1.0, 2.0, 4.0], 10, 100, [50.0, 200.0, 100.0], 0
  )
  assert speed.share == 0.25  # of 2.0, 0.25 and 0.25
  assert speed.summary()["images_per_second"] == 5
