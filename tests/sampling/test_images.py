"""Images by index: what they depend on, restored from a committed run."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax import branches
from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.metrics import report
from arflow_jax.sampling import images, run
from tests.tiny import tiny_config

# Made once by this repository, so that old checkpoints stay readable:
#   python -m arflow_jax.train --config=configs/arflow.py:digits
#     --workdir=tests/sampling/tiny_run --config.model.width=16
#     --config.model.depth=2 --config.model.num_heads=2 --config.batch_size=4
#     --config.steps=200 --config.ema.decay=0.5 --config.sample.num_steps=3
#     --config.sample.block_size=8
# and tiny_run.npz by arflow_jax.sample with --per_label=1 from it.
TINY_RUN = pathlib.Path(__file__).parent / "tiny_run"


@pytest.fixture(scope="module")
def tiny():
  return run.restore(str(TINY_RUN))


def test_the_committed_run_is_small():
  size = sum(p.stat().st_size for p in TINY_RUN.rglob("*") if p.is_file())
  assert size < 500_000


def test_an_old_checkpoint_draws_what_it_drew(tiny):
  assert tiny.step == 200
  drawn = np.concatenate(list(tiny.generator().blocks(np.arange(10))))
  stored = np.load(TINY_RUN.with_suffix(".npz"))["arr_0"]
  assert drawn.dtype == np.uint8
  # Another processor may round a pixel the other way.
  assert np.abs(drawn.astype(int) - stored).max() <= 2


def test_bit_identical_whatever_is_drawn_along(tiny):
  generator = tiny.generator({"guidance": 2.0})
  labels = np.arange(10).repeat(2)
  whole = np.concatenate(list(generator.blocks(labels)))
  assert whole.shape == (20, 8, 8, 1)
  few = np.concatenate(list(generator.blocks(labels[:3])))
  np.testing.assert_array_equal(few, whole[:3])
  late = np.concatenate(list(generator.blocks(labels[13:], start=13)))
  np.testing.assert_array_equal(late, whole[13:])
  other = tiny.generator({"guidance": 2.0}, seed=1)
  assert not np.array_equal(next(other.blocks(labels[:3])), few)


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


@pytest.mark.parametrize(
  ("text", "labels"),
  [("0-3", [0, 1, 2, 3]), ("7", [7]), ("1,5-6, 2", [1, 5, 6, 2])],
)
def test_labels_are_numbers_and_ranges(text, labels):
  assert images.parse_labels(text) == labels


@pytest.mark.parametrize("text", ["", "a", "3-1", "1--2", "-1"])
def test_other_labels_are_refused(text):
  with pytest.raises(ConfigError, match="labels"):
    images.parse_labels(text)


def test_labels_out_of_range_are_refused(tiny):
  with pytest.raises(ConfigError, match=r"\[11\] are out of range"):
    next(tiny.generator().blocks(np.array([0, 11])))
  next(tiny.generator().blocks(np.array([10])))  # 10 is "no class"


@pytest.mark.parametrize(
  ("overrides", "named"),
  [
    ({"num_step": 5}, "sample.num_step is unknown; did you mean num_steps"),
    ({"num_steps": "many"}, "sample.num_steps='many'"),
    ({"block_size": 0}, "sample.block_size=0"),
  ],
)
def test_bad_overrides_are_refused_by_name(tiny, overrides, named):
  with pytest.raises(ConfigError, match=named):
    tiny.generator(overrides)


def test_overrides_are_typed():
  parsed = run.parse_overrides(["num_steps=50", "method=ode"], guidance=2.0)
  assert parsed == {"num_steps": 50, "method": "ode", "guidance": 2.0}
  with pytest.raises(ConfigError, match="--set=x"):
    run.parse_overrides(["x"])


def test_sampling_works_beside_an_unreadable_newest(tmp_path, caplog):
  shutil.copytree(TINY_RUN, tmp_path / "run")
  (tmp_path / "run" / "checkpoints" / "300").mkdir()
  restored = run.restore(str(tmp_path / "run"))
  assert restored.step == 200
  assert "cannot be read" in caplog.text
  assert (tmp_path / "run" / "checkpoints" / "300").is_dir()  # left alone


def test_no_run_is_an_error(tmp_path):
  with pytest.raises(ConfigError, match="holds no checkpoint"):
    run.restore(str(tmp_path))


def test_evaluate_reports_every_guidance(capsys):
  scores = report.evaluate_run(
    str(TINY_RUN), [1.0, 2.0], {"num_steps": 2}, num_samples=20
  )
  out = capsys.readouterr().out
  assert scores.keys() == {1.0, 2.0}
  assert "20 samples per guidance" in out
  for line in ("held-out images", "real images", "guidance 1 ", "guidance 2 "):
    assert line in out
  assert scores[1.0].distance > 0


def test_one_program_serves_every_block(tiny, monkeypatch):
  traced = []
  real = type(tiny.branch).sample

  def counted(self, *args):
    traced.append(1)
    return real(self, *args)

  monkeypatch.setattr(type(tiny.branch), "sample", counted)
  generator = tiny.generator({"guidance": 2.0, "guidance_high": 0.5})
  # Whole blocks, a short one, other classes, another start.
  list(generator.blocks(np.arange(20) % 10))
  list(generator.blocks(np.array([3]), start=5))
  assert len(traced) == 1


def test_text_settings_take_numbers_with_commas():
  config = tiny_config("flowar")
  restored = run.Run(
    config_lib.loads(config_lib.dumps(config)), branches.build(config), {}, 0
  )
  overrides = run.parse_overrides(["grid=1,0.6,0.3,0"])
  generator = restored.generator(overrides)
  assert generator.settings.grid == "1,0.6,0.3,0"
  overrides = run.parse_overrides(["scale_steps=(4,4,6,6)"])
  assert restored.generator(overrides).settings.scale_steps == (4, 4, 6, 6)
