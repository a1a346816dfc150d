"""Damaged files, failed reads and bad images: one line that says which."""

import contextlib
import pathlib

import numpy as np
import pytest
from array_record.python import array_record_data_source

from arflow_jax.data import pipeline, records, sequences, sources
from arflow_jax.errors import ConfigError
from tests.data import tiny_tfds
from tests.tiny import tiny_config

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
  monkeypatch.setattr(records, "PAUSES", (0.0, 0.0))


def _source(folder):
  return sources.Tfds("tiny", str(folder), "train")


def _all(source):
  rng = np.random.default_rng(0)
  return [source.get(i, False, rng) for i in range(len(source.labels))]


def _overwritten(path, start, content):
  with path.open("r+b") as file:
    file.seek(start)
    file.write(content)


DAMAGES = {
  "halved": lambda path: path.write_bytes(
    path.read_bytes()[: path.stat().st_size // 2]
  ),
  "overwritten": lambda path: _overwritten(path, 64, b"x" * 4000),
  "flipped": lambda path: _overwritten(
    path, 3000, bytes([path.read_bytes()[3000] ^ 255])
  ),
  "empty": lambda path: path.write_bytes(b""),
  "removed": pathlib.Path.unlink,
  "shorter": lambda path: path.write_bytes(
    path.with_name("shorter").read_bytes()
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_at_the_start(tmp_path, damage):
  _, second = tiny_tfds.write(tmp_path, np.tile(IMAGES, (20, 1, 1, 1)))
  others = tiny_tfds.write(tmp_path / "others", IMAGES[:10], shards=1)
  others[0].rename(second.with_name("shorter"))
  DAMAGES[damage](second)
  with pytest.raises(
    ConfigError, match=rf"record \d+ of {second} is damaged or missing \("
  ) as error:
    _source(tmp_path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["tfrecord", "parquet"])
def test_files_of_another_form_are_not_called_damaged(tmp_path, form):
  tiny_tfds.write(tmp_path, IMAGES, form=form)
  with pytest.raises(ConfigError, match=f"cannot be read .* the form {form}"):
    _source(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_damaged_while_training_is_named(tmp_path, workers):
  first, _ = tiny_tfds.write(tmp_path, IMAGES)
  config = tiny_config(data__workers=workers, model__num_classes=2)
  items = sequences.ClassSequences(_source(tmp_path), 5, 0, False)
  _overwritten(first, 64, b"x" * 60000)
  with (
    contextlib.closing(
      pipeline.batches(items, config, 0, np.arange(4))
    ) as made,
    pytest.raises(ConfigError, match=rf"record \d+ of {first} is damaged"),
  ):
    list(made)


def _failing(monkeypatch, name, times):
  """Makes a method of the reader fail that often, as with a bad disk."""
  reader = array_record_data_source.ArrayRecordDataSource
  read, left = getattr(reader, name), [times]

  def fail(self, key):
    if left[0]:
      left[0] -= 1
      raise RuntimeError("pread() failed: Input/output error; reading FILE")
    return read(self, key)

  monkeypatch.setattr(reader, name, fail)


def test_a_read_that_fails_twice_is_tried_again(tmp_path, monkeypatch, caplog):
  tiny_tfds.write(tmp_path, IMAGES)
  whole = _all(_source(tmp_path))
  _failing(monkeypatch, "__getitems__", 1)
  source = _source(tmp_path)
  assert source.labels.tolist() == [i % 2 for i in range(60)]
  _failing(monkeypatch, "__getitem__", 2)
  np.testing.assert_array_equal(_all(source), whole)
  assert caplog.text.count("again in 0 s") == 2


def test_a_read_that_keeps_failing_is_no_damage(tmp_path, monkeypatch):
  tiny_tfds.write(tmp_path, IMAGES)
  source = _source(tmp_path)
  _failing(monkeypatch, "__getitem__", 3)
  with pytest.raises(
    OSError, match=r"record 1 of .*00001-of.* in 3 tries \(pread\(\) failed"
  ):
    source.get(31, False, np.random.default_rng(0))


@pytest.mark.parametrize("broken", ["example", "image"])
def test_a_record_that_cannot_be_decoded_is_named(
  tmp_path, monkeypatch, broken
):
  encode = tiny_tfds.encode

  def cut(image, label):
    whole = encode(image, label)
    if (image != IMAGES[33]).any():
      return whole
    return whole[:-40] if broken == "example" else whole.replace(b"PNG", b"GNP")

  monkeypatch.setattr(tiny_tfds, "encode", cut)
  tiny_tfds.write(tmp_path, IMAGES)
  with pytest.raises(
    ConfigError, match=r"record 3 of .*00001-of-00002 cannot be decoded"
  ):
    _all(_source(tmp_path))


def test_an_image_that_is_not_finite_is_named(tmp_path):
  images = IMAGES.astype(np.float32)
  images[34, 2, 3] = np.nan
  tiny_tfds.write(tmp_path, images)
  items = sequences.ClassSequences(_source(tmp_path), 30, 0, False)
  with pytest.raises(ConfigError, match=r"image 34 of the data .* 'even'\)"):
    [items[i] for i in range(10)]


def test_images_are_decoded_by_pil_whatever_is_installed(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(
    "tensorflow_datasets.core.features.image_feature.cv2", "unusable"
  )
  tiny_tfds.write(tmp_path, IMAGES)
  found = _all(_source(tmp_path))
  np.testing.assert_array_equal(found, IMAGES.astype(np.float32) / 127.5 - 1)
  assert caplog.text == ""
