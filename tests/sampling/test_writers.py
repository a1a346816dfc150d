"""Grids, archives and folders, and what they refuse to replace."""

import tracemalloc

import numpy as np
import pytest
from etils import epath
from PIL import Image

from arflow_jax.errors import ConfigError
from arflow_jax.sampling import writers

IMAGES = np.random.RandomState(0).randint(0, 256, (6, 8, 8, 1)).astype(np.uint8)
LABELS = np.array([3, 3, 3, 7, 7, 7])


def _write(out, images=IMAGES, labels=LABELS, *, overwrite=True):
  layout = writers.Layout(images[0].shape, labels, ["3", "7"], 3)
  writers.check_output(str(out), overwrite)
  writers.check_layout(str(out), layout)
  scratch = epath.Path(f"{out}.shards")
  scratch.mkdir(parents=True, exist_ok=True)
  writers.write(
    str(out), iter(images), layout, scratch=scratch, overwrite=overwrite
  )
  assert list(scratch.iterdir()) == []


def test_grid_has_enlarged_tiles_gaps_and_names(tmp_path):
  _write(tmp_path / "new" / "grid.png")
  sheet = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
  tile, gap = 64, 4
  assert sheet.shape[0] == 2 * (tile + gap) + gap
  left = sheet.shape[1] - 3 * (tile + gap)
  for index, image in enumerate(IMAGES):
    row, column = divmod(index, 3)
    y, x = gap + row * (tile + gap), left + column * (tile + gap)
    shown = sheet[y : y + tile, x : x + tile, 0]
    np.testing.assert_array_equal(shown[4::8, 4::8], image[..., 0])
  names = sheet[:, : left - gap]
  assert (names[: tile + gap] < 128).any()  # something is written beside
  assert (names[tile + gap :] < 128).any()
  assert (sheet[tile + gap : tile + 2 * gap] == 255).all()  # the gap is white


def test_npz_has_the_form_of_the_evaluation_suite(tmp_path):
  _write(tmp_path / "x.npz")
  stored = np.load(tmp_path / "x.npz")
  assert stored.files == ["arr_0"]
  assert stored["arr_0"].dtype == np.uint8
  np.testing.assert_array_equal(stored["arr_0"], IMAGES)


def test_folder_of_pngs(tmp_path):
  colour = np.repeat(IMAGES, 3, axis=-1)
  _write(tmp_path / "folder", colour)
  names = sorted(path.name for path in (tmp_path / "folder").iterdir())
  assert names[0] == "000000_class3.png"
  assert names[5] == "000005_class7.png"
  back = np.asarray(Image.open(tmp_path / "folder" / names[5]))
  np.testing.assert_array_equal(back, colour[5])


@pytest.mark.parametrize("name", ["x.npz", "folder"])
def test_any_number_of_images_passes_through_memory(tmp_path, name):
  count, size = 64, 2**16

  class Stream:  # as `Shards.images`, of no length and read once
    def __getitem__(self, _):
      return np.zeros((256, 256, 1), np.uint8)

    def __iter__(self):
      return (np.full((256, 256, 1), i, np.uint8) for i in range(count))

  tracemalloc.start()
  _write(tmp_path / name, Stream(), np.arange(count))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < count * size / 4
  if name == "x.npz":
    stored = np.load(tmp_path / name)["arr_0"]
    assert stored.shape == (count, 256, 256, 1)
    assert stored[:, 0, 0, 0].tolist() == list(range(count))


@pytest.mark.parametrize("name", ["x.png", "x.npz", "folder"])
def test_an_existing_output_is_refused_until_told(tmp_path, name):
  out = tmp_path / name
  writers.check_output(str(out), overwrite=False)
  _write(out)
  with pytest.raises(ConfigError, match=f"{name} exists; .*--overwrite"):
    writers.check_output(str(out), overwrite=False)
  writers.check_output(str(out), overwrite=True)
  _write(out)


@pytest.mark.parametrize("name", ["x.png", "x.npz", "folder"])
def test_a_failure_half_way_leaves_the_old_output(tmp_path, name):
  def content():
    paths = [out] if out.is_file() else sorted(out.iterdir())
    return [path.read_bytes() for path in paths]

  class Failing:
    def __getitem__(self, _):
      return IMAGES[0]

    def __iter__(self):
      yield IMAGES[1]
      raise RuntimeError("interrupted")

  out = tmp_path / name
  _write(out)
  before = content()
  with pytest.raises(RuntimeError):
    _write(out, Failing())
  assert content() == before
  _write(out, IMAGES[::-1])  # whatever the failure has left
  assert content() != before


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
  out = tmp_path / "x.npz"

  class Slow:
    def __getitem__(self, _):
      return IMAGES[0]

    def __iter__(self):
      out.write_text("somebody else's")
      return iter(IMAGES)

  with pytest.raises(ConfigError, match=r"exists; .*--overwrite"):
    _write(out, Slow(), overwrite=False)
  assert out.read_text() == "somebody else's"


@pytest.mark.parametrize("channels", [2, 4, 16])
@pytest.mark.parametrize("name", ["x.png", "x.npz", "folder"])
def test_other_channels_are_no_pictures(tmp_path, name, channels):
  with pytest.raises(ConfigError, match=f"8 x 8 x {channels} arrays are no"):
    _write(tmp_path / name, np.zeros((6, 8, 8, channels), np.uint8))
  assert list(tmp_path.iterdir()) == []


def test_a_grid_of_thousands_is_refused():
  layout = writers.Layout((256, 256, 3), np.zeros(5000, int), ["0"] * 100, 50)
  named = r"5000 images has 130\d\d x 26004 pixels"
  with pytest.raises(ConfigError, match=named):
    writers.check_layout("x.png", layout)
  with pytest.raises(ConfigError, match=named):
    writers.check_layout("x.png/", layout)
  writers.check_layout("x.npz", layout)
  writers.check_layout("x.png", layout._replace(labels=layout.labels[:1000]))


def test_a_folder_of_anything_else_is_never_replaced(tmp_path):
  kept = tmp_path / "run" / "checkpoints"
  kept.mkdir(parents=True)
  with pytest.raises(ConfigError, match="holds checkpoints, which is no image"):
    writers.check_output(str(tmp_path / "run"), overwrite=True)
  assert kept.is_dir()


def test_checking_makes_nothing(tmp_path):
  writers.check_output(str(tmp_path / "new" / "x.png"), overwrite=False)
  assert list(tmp_path.iterdir()) == []


def test_other_forms_are_refused(tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "x.png").mkdir()
  for name, message in {
    "x.jpg": "must end in",
    ".": "must end in",
    str(tmp_path / "file"): "is a file already",
    str(tmp_path / "x.png"): "is a folder already",
    str(tmp_path / "file" / "new.png"): "cannot be written",
  }.items():
    with pytest.raises(ConfigError, match=message):
      writers.check_output(name, overwrite=True)
