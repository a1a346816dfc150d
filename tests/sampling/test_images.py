"""Images by index: what they depend on, and what is refused before drawing."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.sampling import images
from tests.sampling.noise import Noise, one_device
from tests.tiny import tiny_config


def _decode(drawn):
  """Twice as large and of one channel, as a codec might do."""
  return images.to_pixels(jnp.repeat(jnp.repeat(drawn[..., :1], 2, 1), 2, 2))


def _generator(branch=None, **options):
  branch = branch or Noise((2, 2, 4))
  options = {"block_size": 8, "mesh": one_device(), "decode": _decode} | options
  return images.Generator(branch, jnp.float32(0.1), None, **options)


def _draw(generator, *args):
  return np.concatenate([block.whole() for block in generator.blocks(*args)])


def test_an_image_depends_on_its_index_and_label_alone():
  labels = np.zeros(20, int)
  generator = _generator()
  whole = _draw(generator, labels)
  assert whole.shape == (20, *generator.image_shape) == (20, 4, 4, 1)
  assert whole.dtype == np.uint8
  assert len({image.tobytes() for image in whole}) == 20
  np.testing.assert_array_equal(_draw(generator, labels[:3]), whole[:3])
  chosen = np.array([17, 4, 5])
  np.testing.assert_array_equal(
    _draw(generator, labels[chosen], chosen), whole[chosen]
  )
  assert not np.array_equal(_draw(_generator(seed=1), labels), whole)
  assert not np.array_equal(_draw(generator, labels + 1), whole)


def test_blocks_say_what_they_hold():
  labels, indices = np.arange(5), np.arange(30, 35)
  first, last = _generator(block_size=3).blocks(labels, indices)
  assert first.indices.tolist() == [30, 31, 32]
  assert last.indices.tolist() == [33, 34]
  assert last.labels.tolist() == [3, 4]
  assert isinstance(last.images, jax.Array)
  assert last.images.shape == (3, 4, 4, 1)  # one row fills the block
  numbers, classes, rows = last.local()
  assert (numbers.tolist(), classes.tolist()) == ([33, 34], [3, 4])
  np.testing.assert_array_equal(rows, last.images[:2])
  np.testing.assert_array_equal(rows, last.whole())


def test_one_program_under_the_mesh_serves_every_block():
  branch = Noise()
  generator = _generator(branch)
  blocks = generator.blocks(np.arange(20) % 10)
  next(blocks)
  assert not jax.sharding.get_abstract_mesh().axis_names  # ours is not theirs
  list(blocks)
  list(generator.blocks([3], np.array([5])))
  # Another generator of the same settings compiles nothing, whatever its seed.
  list(_generator(branch, seed=2**32 - 1).blocks([3]))
  (mesh,) = branch.meshes
  assert mesh.axis_names == ("data", "fsdp")  # kernels read it


# Prints, by family, the shapes that the devices hold of a block, whether one
# device and four draw the same, and whether that is more than one grey. Last,
# whether devices hold all weights of a restored run, and how many devices do.
ON_FOUR = """
import jax, numpy as np
from ml_collections import ConfigDict
from arflow_jax import branches
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.sampling import images, run
from tests.tiny import tiny_config

rs = np.random.RandomState(0)
small = {
  "arflow": dict(model__depth=1, sample__num_steps=2),
  "flowar": dict(model__patch_size=4, model__scales=(1, 2), sample__num_steps=2)
}
for family, changes in small.items():
  config = tiny_config(family, **changes)
  branch = branches.build(config)
  shapes = jax.eval_shape(branch.init, jax.random.key(0))
  params = jax.tree.map(
    lambda x: 0.3 * rs.standard_normal(x.shape).astype(x.dtype), shapes)
  drawn = []
  for count in (1, 4):
    mesh = mesh_lib.make_mesh(
      ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}), jax.devices()[:count])
    generator = images.Generator(
      branch, jax.device_put(params, mesh_lib.replicated(mesh)),
      branch.settings(config.sample), block_size=6, mesh=mesh,
      decode=images.to_pixels)
    blocks = list(generator.blocks(np.arange(10)))
    drawn.append(np.concatenate([block.whole() for block in blocks]))
    local = np.concatenate([block.local()[2] for block in blocks])
    np.testing.assert_array_equal(local, drawn[-1])
  held = {shard.data.shape for shard in blocks[0].images.addressable_shards}
  one, four = (x.astype(int) for x in drawn)
  print(family, held, abs(one - four).max() <= 1, one.std() > 10)
restored = run.restore("tests/sampling/tiny_run")
print({(leaf.is_fully_replicated, len(leaf.sharding.device_set))
  for leaf in jax.tree.leaves(restored.params)})
"""


@pytest.mark.slow
def test_the_same_images_on_four_devices():
  done = subprocess.run(
    [sys.executable, "-c", ON_FOUR],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  # A block of 6 is rounded up to 8: two images on each device.
  assert done.stdout.splitlines() == [
    "arflow {(2, 8, 8, 1)} True True",
    "flowar {(2, 8, 8, 1)} True True",
    "{(True, 4)}",
  ]


def test_noise_is_bit_equal_whatever_the_batch():
  draw = jax.jit(
    lambda i: jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(
      images.image_keys(3, i)
    )
  )
  together = draw(jnp.arange(16))
  for size in (1, 5):
    np.testing.assert_array_equal(draw(jnp.arange(size)), together[:size])


def test_pixels_are_clamped_and_truncated_as_published():
  x = jnp.array([-2.0, -1.0, 0.0, 0.999, 3.0]).reshape(5, 1, 1, 1)
  assert images.to_pixels(x).ravel().tolist() == [0, 0, 128, 255, 255]


def test_pixels_come_back_from_what_they_stand_for():
  pixels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
  x = images.from_pixels(pixels)
  assert x.dtype == np.float32
  ends = [-128 / 127.5, 0, 127 / 127.5]
  np.testing.assert_allclose(x.ravel()[[0, 128, 255]], ends, rtol=1e-6)
  again = np.asarray(images.to_pixels(jnp.asarray(x))).astype(int)
  assert np.abs(again - pixels).max() <= 1  # truncated, as published


@pytest.mark.parametrize(
  ("source", "channels"),
  [("latents", 4), ("latents", 3), ("random", 4), ("random", 16)],
)
def test_what_is_no_pixels_has_no_decoder(source, channels):
  config = tiny_config(data__source=source)
  with pytest.raises(
    ConfigError, match=rf"8 x 8 x {channels} .*'{source}'.* needs a decoder"
  ):
    images.decoder(config, (8, 8, channels))


@pytest.mark.parametrize(
  ("source", "channels"), [("digits", 1), ("tfds:x", 3), ("random", 3)]
)
def test_pixels_are_decoded_as_they_are(source, channels):
  config = tiny_config(data__source=source)
  assert images.decoder(config, (8, 8, channels)) is images.to_pixels


@pytest.mark.parametrize(
  ("text", "labels"),
  [("0-3", [0, 1, 2, 3]), ("7", [7]), ("1,5-6, 2", [1, 5, 6, 2])],
)
def test_labels_are_numbers_and_ranges(text, labels):
  assert images.parse_labels(text) == labels


@pytest.mark.parametrize(
  "text",
  [
    "",
    "a",
    "3-1",
    "1--2",
    "-1",
    "1-",
    "\N{SUPERSCRIPT TWO}",
    "0-\N{SUPERSCRIPT TWO}",
    "0-9999999999",
    "9" * 5000,
  ],
)
def test_other_labels_are_refused(text):
  with pytest.raises(ConfigError, match="labels"):
    images.parse_labels(text)


@pytest.mark.parametrize(
  ("labels", "named"),
  [
    ([0, 11], r"\[11\] are out of range"),
    ([-1], r"\[-1\] are out of range"),
    ([3.7], r"labels \[3.7\] must be whole numbers"),
    ([3.0], "whole numbers"),
    ([True], "whole numbers"),
    (["3"], "whole numbers"),
    (np.array([[3]]), "whole numbers"),
    ([], "whole numbers"),
    (range(5, 999), r"\[11, 12, .* 18\] and 980 more are out of range"),
  ],
)
def test_labels_that_are_no_classes_are_refused_at_once(labels, named):
  with pytest.raises(ConfigError, match=named):
    _generator().blocks(labels)


@pytest.mark.parametrize(
  "indices", [[-1, 2], [2**32, 3], [1], [0.5, 1.0], [True, False], [[0], [1]]]
)
def test_indices_that_are_no_numbers_of_images_are_refused(indices):
  with pytest.raises(ConfigError, match="indices must be 2 whole numbers"):
    _generator().blocks([0, 1], indices)
  (block,) = _generator().blocks([0, 1], [7, 2**31 - 1])
  assert block.indices.tolist() == [7, 2**31 - 1]


def test_samples_that_are_not_finite_are_no_picture():
  """Also one row of a block, and to whoever asks for the images."""

  class Broken(Noise):
    def sample(self, params, keys, labels, settings):
      drawn = super().sample(params, keys, labels, settings)
      return drawn / (labels != 4)[:, None, None, None]

  first, second = _generator(Broken((2, 2, 4)), block_size=3).blocks(range(6))
  assert first.whole().shape[0] == 3
  for fetch in (second.whole, second.local):
    with pytest.raises(FloatingPointError, match="3 to 5 are not"):
      fetch()


def test_the_label_after_the_last_means_none():
  assert images.check_labels([10], 10).tolist() == [10]


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_a_seed_that_would_draw_what_another_draws_is_refused(seed):
  with pytest.raises(ConfigError, match=rf"seed={seed} must be a whole number"):
    _generator(seed=seed)


def test_a_block_needs_an_image():
  with pytest.raises(ConfigError, match=r"sample\.block_size=0"):
    _generator(block_size=0)
