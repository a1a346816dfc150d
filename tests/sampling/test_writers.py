"""Grids, archives and folders, and what they refuse to replace."""

import numpy as np
import pytest
from PIL import Image

from arflow_jax.errors import ConfigError
from arflow_jax.sampling import writers

IMAGES = np.random.RandomState(0).randint(0, 256, (6, 8, 8, 1)).astype(np.uint8)
LABELS = [3, 3, 3, 7, 7, 7]


def _write(out, images=IMAGES):
  writers.check_output(str(out), overwrite=True)
  blocks = iter([images[:4], images[4:]])
  writers.write(str(out), blocks, LABELS, ["3", "7"], 3)


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
  np.testing.assert_array_equal(stored["arr_0"], IMAGES)


def test_folder_of_pngs(tmp_path):
  colour = np.repeat(IMAGES, 3, axis=-1)
  _write(tmp_path / "folder", colour)
  names = sorted(path.name for path in (tmp_path / "folder").iterdir())
  assert names[0] == "000000_class3.png"
  assert names[5] == "000005_class7.png"
  back = np.asarray(Image.open(tmp_path / "folder" / names[5]))
  np.testing.assert_array_equal(back, colour[5])


@pytest.mark.parametrize("name", ["x.png", "x.npz", "folder"])
def test_an_existing_output_is_refused_until_told(tmp_path, name):
  out = tmp_path / name
  writers.check_output(str(out), overwrite=False)
  _write(out)
  with pytest.raises(ConfigError, match=f"{name} exists; .*--overwrite"):
    writers.check_output(str(out), overwrite=False)
  writers.check_output(str(out), overwrite=True)
  _write(out)


def test_a_failure_half_way_leaves_the_old_output(tmp_path):
  out = tmp_path / "folder"
  _write(out)

  def failing():
    yield IMAGES[:2]
    raise RuntimeError("interrupted")

  with pytest.raises(RuntimeError):
    writers.write(str(out), failing(), LABELS, ["3", "7"], 3)
  assert len(list(out.iterdir())) == 6


def test_a_folder_of_anything_else_is_never_replaced(tmp_path):
  kept = tmp_path / "run" / "checkpoints"
  kept.mkdir(parents=True)
  with pytest.raises(ConfigError, match="holds checkpoints, which is no image"):
    writers.check_output(str(tmp_path / "run"), overwrite=True)
  assert kept.is_dir()


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
