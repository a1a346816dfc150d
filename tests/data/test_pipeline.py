"""Sources, class-grouped sequences, and an order that is a function of step."""

import contextlib
import multiprocessing
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from arflow_jax.data import pipeline, sequences, sources
from arflow_jax.errors import ConfigError
from configs.arflow import get_config
from tests.tiny import batches


def _config(**overrides):
  config = get_config("digits")
  config.update_from_flattened_dict(overrides)
  return config


def test_digits_split_is_fixed_and_stratified():
  train, heldout = sources.Digits("train"), sources.Digits("heldout")
  assert len(train.labels) == 1400
  assert len(heldout.labels) == 397
  for source in (train, heldout):
    share = np.bincount(source.labels) / len(source.labels)
    np.testing.assert_allclose(share, 0.1, atol=0.005)
    assert source.images.shape[1:] == (8, 8, 1)
    assert source.images.min() == -1
    assert source.images.max() == 1
  seen = {image.tobytes() for image in train.images}
  assert sum(image.tobytes() in seen for image in heldout.images) == 0
  again = sources.Digits("heldout")
  np.testing.assert_array_equal(again.images, heldout.images)


def test_sequences_hold_distinct_images_of_one_class():
  source = sources.Digits("train")
  items = sequences.ClassSequences(source, 5, seed=0, flip=False)
  labels = []
  for i in range(200):
    item = items[i]
    labels.append(int(item["labels"]))
    members = source.images[source.labels == labels[-1]]
    known = {image.tobytes() for image in members}
    drawn = [image.tobytes() for image in item["images"]]
    assert len(set(drawn)) == 5
    assert set(drawn) <= known
  assert set(labels) == set(range(10))
  again = sequences.ClassSequences(source, 5, seed=0, flip=False)[123]
  np.testing.assert_array_equal(again["images"], items[123]["images"])
  other = sequences.ClassSequences(source, 5, seed=1, flip=False)[123]
  assert not np.array_equal(other["images"], items[123]["images"])


def test_flips_mirror_about_half_of_the_images():
  source = sources.Digits("train")
  plain = sequences.ClassSequences(source, 5, seed=0, flip=False)
  flipped = sequences.ClassSequences(source, 5, seed=0, flip=True)
  count = 0
  for i in range(100):
    for a, b in zip(plain[i]["images"], flipped[i]["images"]):
      if not np.array_equal(a, b):
        np.testing.assert_array_equal(a[:, ::-1], b)
        count += 1
  assert 200 < count < 300


@pytest.mark.parametrize("workers", [0, 1])
def test_the_step_is_the_whole_position(workers):
  config = _config(**{"steps": 12, "batch_size": 4, "data.workers": workers})
  with contextlib.closing(batches(config, 0)) as begun:
    whole = list(begun)
  assert len(whole) == 12
  assert whole[0]["images"].shape == (4, 5, 8, 8, 1)
  with contextlib.closing(batches(config, 8)) as begun:
    late = [next(begun)]
    # No view of shared memory, which nobody would give back at the end.
    assert {type(array) for array in late[0].values()} == {np.ndarray}
    assert len(multiprocessing.active_children()) == workers
    late += begun
  assert multiprocessing.active_children() == []
  for a, b in zip(whole[8:], late, strict=True):
    np.testing.assert_array_equal(a["images"], b["images"])
    np.testing.assert_array_equal(a["labels"], b["labels"])


def test_loader_processes_end_with_a_trainer_that_is_killed():
  program = (
    "import time\n"
    "import numpy as np\n"
    "from arflow_jax.data import pipeline\n"
    "from configs.arflow import get_config\n"
    "config = get_config('digits')\n"
    "config.data.source, config.data.workers = 'random', 1\n"
    "items = pipeline.open_items(config)\n"
    "begun = pipeline.batches(items, config, 0, np.arange(12))\n"
    "next(begun)\n"
    "print('begun', flush=True)\n"
    "time.sleep(60)\n"
  )
  pipe = subprocess.PIPE
  with subprocess.Popen(
    [sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True
  ) as trainer:
    assert trainer.stdout.readline() == "begun\n"
    trainer.kill()
    # Returns when the last process that holds these pipes has ended.
    assert trainer.communicate(timeout=20) == ("", "")


def test_a_reader_that_waits_for_a_killed_process_is_left():
  """And other children of this process are nobody's loaders."""
  context = multiprocessing.get_context("spawn")
  names = ("other", "grain-process-prefetch-0", "grain-process-prefetch-1")
  children = [
    context.Process(target=time.sleep, args=(60,), name=name, daemon=True)
    for name in names
  ]
  for child in children:
    child.start()
  wait = threading.Event()

  def blocked():
    yield {"images": np.zeros(3)}
    wait.wait()

  loaders = pipeline._Loaders(blocked(), 2)
  assert next(loaders)["images"].shape == (3,)
  children[0].kill()
  while len(loaders._processes) < 2:
    time.sleep(0.05)
  assert loaders._killed() == 0
  children[2].kill()
  with pytest.raises(OSError, match=r"code -9, killed, .* lower data.workers"):
    next(loaders)
  loaders.close()
  assert not children[1].is_alive()  # it would wait for ever for a reader
  wait.set()


def test_any_rows_of_the_same_global_batches():
  config = _config(steps=2, batch_size=4)
  whole = list(batches(config, 0))
  for rows in ([0, 1], [1, 2, 3], [0, 3]):
    part = list(batches(config, 0, np.array(rows)))
    for step in range(2):
      for key in ("images", "labels"):
        wanted = whole[step][key][rows]
        np.testing.assert_array_equal(part[step][key], wanted)


def test_tfds_directory(data_dir):
  folder = data_dir / "tfds"
  config = get_config("cifar10")
  config.data.source = "tfds:cifar10_jpeg"
  config.data.dir = str(folder)
  config.steps, config.batch_size = 2, 4
  batch = next(batches(config, 0))
  assert batch["images"].shape == (4, 5, 32, 32, 3)
  assert batch["images"].dtype == np.float32
  assert -1 <= batch["images"].min() < -0.5
  assert 0.5 < batch["images"].max() <= 1
  source = sources.open_source(config, "heldout")
  assert len(source.class_names) == 10
  assert len(source.labels) > 0


def test_a_small_class_is_refused_by_name():
  with pytest.raises(ConfigError, match=r"class '\d' has 1\d\d images.*=500"):
    next(batches(_config(**{"data.sequence_length": 500}), 0))


@pytest.mark.parametrize(
  ("overrides", "named"),
  [
    ({"data.source": "digit"}, "data.source='digit' is unknown"),
    ({"data.source": "latents"}, "data.source='latents'"),
    ({"data.source": "tfds:x"}, "data.dir=None is not a directory"),
    ({"model.image_size": 16}, r"images of \(8, 8, 1\)"),
    ({"model.num_classes": 7}, "model.num_classes=7"),
  ],
)
def test_bad_data_is_refused_by_name(overrides, named):
  with pytest.raises(ConfigError, match=named):
    sources.open_source(_config(**overrides), "train")


def test_an_unreadable_tfds_directory_is_refused(tmp_path):
  config = _config(**{"data.source": "tfds:nothing", "data.dir": str(tmp_path)})
  with pytest.raises(ConfigError, match="tfds:nothing cannot be read"):
    sources.open_source(config, "train")


def test_a_config_has_at_most_70_keys():
  flat = get_config("digits").to_dict()
  from arflow_jax.config import flatten

  assert len(flatten(flat)) <= 70
