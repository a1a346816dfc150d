"""`sample` from end to end: what it says, and how it goes on."""

import numpy as np
import pytest
from PIL import Image

from arflow_jax.errors import ConfigError
from arflow_jax.sampling import draw, run, shards
from tests.bucket import Bucket
from tests.job import two_processes
from tests.sampling.noise import noise_run, one_device


@pytest.fixture
def runs(monkeypatch):
  """Runs by their workdirs; the tests draw from "a" unless they say more."""
  known = {"a": noise_run(one_device())}
  monkeypatch.setattr(run, "restore", known.__getitem__)
  return known


def _sample(out, workdir="a", **changes):
  options = {"labels": "0-4", "per_label": 4, "overrides": {"block_size": 8}}
  draw.sample_to_file(workdir, str(out), **options | changes)


def _interrupted(out, monkeypatch, after=1, **changes):
  """Stops the command once so many shards are written."""
  added = []
  add = shards.Shards.add

  def stop(self, *args):
    if len(added) == after:
      raise KeyboardInterrupt
    added.append(args)
    add(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(shards.Shards, "add", stop)
    with pytest.raises(KeyboardInterrupt):
      _sample(out, **changes)


def test_settings_are_said_and_nothing_is_left_behind(runs, tmp_path, capsys):
  _sample(tmp_path / "x.png", overrides={"guidance": 2.5}, seed=3)
  said = capsys.readouterr()
  assert "drawing 20 images with the weights of step 7\n" in said.out
  assert "guidance=2.5 " in said.out
  assert "num_steps=3 " in said.out
  assert " seed=3\n" in said.out
  assert "20/20" in said.err
  assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
  assert np.asarray(Image.open(tmp_path / "x.png")).std() > 10


def test_the_same_command_goes_on_after_an_interruption(
  runs, tmp_path, monkeypatch, capsys
):
  whole, out = tmp_path / "whole.npz", tmp_path / "x.npz"
  _sample(whole)
  _interrupted(out, monkeypatch)
  assert not out.exists()
  capsys.readouterr()
  drawn = []
  monkeypatch.setattr(shards.Shards, "add", _counting(drawn))
  _sample(out, overrides={"block_size": 4})  # memory was short, perhaps
  assert "8 of them are there from before" in capsys.readouterr().out
  assert np.concatenate(drawn).tolist() == list(range(8, 20))
  assert not (tmp_path / "x.npz.shards").exists()
  np.testing.assert_array_equal(np.load(out)["arr_0"], np.load(whole)["arr_0"])


def _counting(drawn):
  add = shards.Shards.add

  def counted(self, indices, images):
    drawn.append(indices)
    add(self, indices, images)

  return counted


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"seed": 1}, "seed"),
    ({"labels": "5-9"}, "labels"),
    ({"overrides": {"guidance": 3.0}}, r"settings.guidance"),
    ({"workdir": "later"}, "step"),
    ({"workdir": "other"}, "weights"),
    ({"workdir": "larger"}, "shape"),
  ],
)
def test_another_command_never_goes_on_with_it(
  changes, named, runs, tmp_path, monkeypatch
):
  mesh = one_device()
  runs["later"] = noise_run(mesh, step=8)
  runs["other"] = noise_run(mesh, scale=0.2)
  runs["larger"] = noise_run(mesh, model__image_size=16)
  out = tmp_path / "x.npz"
  _interrupted(out, monkeypatch)
  with pytest.raises(ConfigError, match=rf"another command \({named} differ\)"):
    _sample(out, **changes)
  _sample(out, **changes, overwrite=True)
  _sample(tmp_path / "alone.npz", **changes)
  np.testing.assert_array_equal(
    np.load(out)["arr_0"], np.load(tmp_path / "alone.npz")["arr_0"]
  )


def test_an_output_stays_until_the_new_one_is_whole(
  runs, tmp_path, monkeypatch
):
  out = tmp_path / "x"
  _sample(out)
  with pytest.raises(ConfigError, match="exists; choose another or add"):
    _sample(out, seed=1)
  _interrupted(out, monkeypatch, seed=1, overwrite=True)
  old = {path.name: path.read_bytes() for path in out.iterdir()}
  assert len(old) == 20
  _sample(out, seed=1, overwrite=True)
  new = {path.name: path.read_bytes() for path in out.iterdir()}
  assert new.keys() == old.keys()
  assert new != old


@pytest.mark.parametrize("name", ["x.png", "x.npz", "x"])
@pytest.mark.parametrize("channels", [4, 16])
def test_latents_never_reach_a_picture(runs, tmp_path, name, channels):
  runs["a"] = noise_run(
    one_device(), data__source="random", model__channels=channels
  )
  with pytest.raises(ConfigError, match=f"8 x 8 x {channels} .*decoder"):
    _sample(tmp_path / name)
  assert runs["a"].branch.meshes == []  # nothing was drawn
  assert list(tmp_path.iterdir()) == []


def test_labels_out_of_range_are_refused(runs, tmp_path):
  with pytest.raises(ConfigError, match=r"\[11\] are out of range"):
    _sample(tmp_path / "new" / "x.png", labels="0,11")
  assert list(tmp_path.iterdir()) == []  # nothing is made before it can begin
  _sample(tmp_path / "x", labels="9-10", per_label=1)
  names = sorted(path.name for path in (tmp_path / "x").iterdir())
  assert names == ["000000_class9.png", "000001_class10.png"]


# One device each. Process 0 is slow to write, and alone may look what is there.
JOB = """
import jax, pathlib, time
from arflow_jax.parallel import mesh, processes
from arflow_jax.sampling import draw, run, writers
from arflow_jax.sampling.shards import Shards
from ml_collections import ConfigDict
from tests.sampling.noise import noise_run

processes.start()
devices = mesh.make_mesh(ConfigDict({{"data": -1, "fsdp": 1, "tensor": 1}}))
run.restore = lambda workdir: noise_run(devices)
add, write, added = Shards.add, writers.write, []

def counted(self, indices, images):
  added.extend(indices.tolist())
  add(self, indices, images)

def slow(*args, **options):
  time.sleep(0.5)
  write(*args, **options)

Shards.add, writers.write = counted, slow
if not processes.speaks():
  Shards._files = None
draw.sample_to_file("a", {out!r}, labels="0-4", per_label=4,
  overrides={{"block_size": 5}})
print(added, [path.name for path in pathlib.Path({out!r}).parent.iterdir()])
"""


def test_two_processes_go_on_together(runs, tmp_path, monkeypatch):
  """After one process, one of whose files was damaged."""
  whole = tmp_path / "whole.npz"
  _sample(whole)
  out = tmp_path / "job" / "x.npz"
  _interrupted(out, monkeypatch, after=2)
  damaged = tmp_path / "job" / "x.npz.shards" / "000000008.npz"
  damaged.write_bytes(damaged.read_bytes()[:-30])
  first, second = two_processes(JOB.format(out=str(out)))
  # Blocks of 6 (5, rounded up): 8 to 13 and 14 to 19, three rows each.
  assert first[-1] == "[8, 9, 10, 14, 15, 16] ['x.npz']"
  assert second == ["[11, 12, 13, 17, 18, 19] ['x.npz']"]
  np.testing.assert_array_equal(np.load(out)["arr_0"], np.load(whole)["arr_0"])


@pytest.mark.parametrize("name", ["x.png", "x.npz", "x"])
def test_images_can_go_to_a_bucket(runs, tmp_path, monkeypatch, name):
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  monkeypatch.setattr(Bucket, "ROOT", str(tmp_path / "there"))
  _interrupted(f"bucket://new/{name}", monkeypatch)
  _sample(f"bucket://new/{name}")
  _sample(f"bucket://new/{name}", overwrite=True)
  there = tmp_path / "there" / "new"
  assert [path.name for path in there.iterdir()] == [name]
  assert list((tmp_path / "here").iterdir()) == []
