"""Shards: complete or missing, of one command alone, and never all at once."""

import json
import tracemalloc

import numpy as np
import pytest
from etils import epath

from arflow_jax.errors import ConfigError
from arflow_jax.sampling.shards import Shards

IMAGES = np.random.RandomState(0).randint(0, 256, (10, 4, 4, 1))
IMAGES = IMAGES.astype(np.uint8)
MANIFEST = {"seed": 0, "labels": (1, 2), "settings": {"guidance": 1.5}}


def _shards(tmp_path, manifest=MANIFEST, *, replace=False):
  return Shards(
    epath.Path(tmp_path) / "x.shards", manifest, 10, replace=replace
  )


def _add(shards, *numbers):
  numbers = np.array(numbers, int)
  shards.add(numbers, IMAGES[numbers])


def test_images_come_back_in_order_whoever_wrote_them(tmp_path):
  """Rows of several processes, out of order, then blocks of another size."""
  first = _shards(tmp_path)
  assert first.missing().tolist() == list(range(10))
  _add(first, 4, 6)
  _add(first, 0, 2, 3)
  _add(first)  # a process that holds nothing but rows that fill the block
  again = _shards(tmp_path)
  assert again.missing().tolist() == [1, 5, 7, 8, 9]
  _add(again, 1, 5, 8)
  _add(again, 7, 9)
  np.testing.assert_array_equal(np.stack(list(again.images())), IMAGES)
  again.remove()
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"seed": 1}, r"\(seed differ"),
    ({"settings": {"guidance": 2.0}}, r"\(settings.guidance differ"),
    ({"step": 9}, r"\(step differ"),
    ({"labels": (1, 2, 3)}, r"\(labels differ"),
  ],
)
def test_shards_of_another_command_are_not_mixed_in(tmp_path, change, named):
  _add(_shards(tmp_path), 0, 1)
  with pytest.raises(ConfigError, match=named):
    _shards(tmp_path, MANIFEST | change)
  assert len(_shards(tmp_path).missing()) == 8  # still there
  other = _shards(tmp_path, MANIFEST | change, replace=True)
  assert len(other.missing()) == 10
  # To replace an output is no reason to lose what was drawn for it.
  _add(other, 3)
  assert len(_shards(tmp_path, MANIFEST | change, replace=True).missing()) == 9


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_of_anything_else_is_left_alone(tmp_path, replace):
  (tmp_path / "x.shards").mkdir()
  (tmp_path / "x.shards" / "thesis.txt").touch()
  with pytest.raises(ConfigError, match=r"contains thesis\.txt but no man"):
    _shards(tmp_path, replace=replace)
  assert (tmp_path / "x.shards" / "thesis.txt").exists()


def test_an_interruption_before_the_manifest_is_no_obstacle(tmp_path):
  (tmp_path / "x.shards").mkdir()
  (tmp_path / "x.shards" / "manifest.json.part").touch()
  assert len(_shards(tmp_path).missing()) == 10
  manifest = json.loads((tmp_path / "x.shards" / "manifest.json").read_text())
  assert manifest["labels"] == [1, 2]


@pytest.mark.parametrize("content", ["{", "[1]", "7", '{"seed": [0]}'])
def test_a_damaged_manifest_is_another_command(tmp_path, content):
  _add(_shards(tmp_path), 0, 1)
  (tmp_path / "x.shards" / "manifest.json").write_text(content)
  with pytest.raises(ConfigError, match=r"of another command .*seed"):
    _shards(tmp_path)
  assert len(_shards(tmp_path, replace=True).missing()) == 10


@pytest.mark.parametrize(
  "removal",
  [
    Shards.remove,
    lambda shards: _shards(
      shards.folder.parent, MANIFEST | {"seed": 1}, replace=True
    ),
  ],
)
def test_what_is_half_removed_is_still_ours(tmp_path, monkeypatch, removal):
  shards = _shards(tmp_path)
  _add(shards, 0, 1)
  _add(shards, 2, 3)

  def stop(path, **_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(type(shards.folder), "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
      removal(shards)
  left = [path.name for path in (tmp_path / "x.shards").iterdir()]
  assert left == ["manifest.json"]
  assert len(_shards(tmp_path).missing()) == 10


def _cut(path):
  path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
  "spoil",
  [
    _cut,
    lambda path: path.write_bytes(b""),
    lambda p: p.rename(p.with_suffix(".npz.part")),
  ],
)
def test_what_was_not_written_to_its_end_is_drawn_again(tmp_path, spoil):
  shards = _shards(tmp_path)
  _add(shards, 0, 1)
  _add(shards, 2, 3)
  spoil(tmp_path / "x.shards" / "000000002.npz")
  assert _shards(tmp_path).missing().tolist() == list(range(2, 10))
  _add(shards, *range(2, 10))
  np.testing.assert_array_equal(np.stack(list(shards.images())), IMAGES)


def test_a_folder_that_goes_away_is_one_clear_line(tmp_path):
  """As it does when the same command runs twice and the other finishes."""
  shards = _shards(tmp_path)
  _shards(tmp_path).remove()
  with pytest.raises(ConfigError, match="is the same command running twice"):
    _add(shards, 0)


def test_damage_found_at_the_end_is_one_clear_line(tmp_path):
  shards = _shards(tmp_path)
  _add(shards, *range(10))
  path = tmp_path / "x.shards" / "000000000.npz"
  content = bytearray(path.read_bytes())
  content[content.index(IMAGES[5].tobytes())] ^= 1
  path.write_bytes(content)
  with pytest.raises(ConfigError, match=r"is damaged .* repeat the command"):
    list(shards.images())
  assert len(shards.missing()) == 10


def test_images_of_a_command_that_took_over_are_never_mixed_in(tmp_path):
  first = _shards(tmp_path)
  _add(first, 0, 1, 2, 3)
  second = _shards(tmp_path, MANIFEST | {"seed": 1}, replace=True)
  _add(second, 0, 1, 2, 3)
  _add(first, *range(4, 10))
  for shards in (first, second):
    with pytest.raises(ConfigError, match="another command wrote it"):
      list(shards.images())


def test_an_image_that_nobody_wrote_is_one_clear_line(tmp_path):
  shards = _shards(tmp_path)
  _add(shards, 0, 1)
  with pytest.raises(ConfigError, match="lacks image 2"):
    list(shards.images())


def test_memory_holds_a_block_and_not_all_images(tmp_path):
  block, blocks = 2**18, 32
  folder = epath.Path(tmp_path) / "x.shards"
  shards = Shards(folder, MANIFEST, 4 * blocks, replace=False)
  tracemalloc.start()
  for i in range(blocks):
    rows = np.full((4, block // 4, 1, 1), i, np.uint8)
    shards.add(np.arange(4 * i, 4 * i + 4), rows)
  assert sum(int(image[0, 0, 0]) for image in shards.images()) == 4 * sum(
    range(blocks)
  )
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 6 * block < block * blocks / 5
