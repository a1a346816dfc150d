"""A restored run: old checkpoints, overrides, what cannot be drawn."""

import pathlib
import shutil

import numpy as np
import pytest

from arflow_jax import branches
from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.sampling import run
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
  generator = tiny.generator()
  labels = np.arange(10)
  drawn = np.concatenate([block.whole() for block in generator.blocks(labels)])
  stored = np.load(TINY_RUN.with_suffix(".npz"))["arr_0"]
  assert drawn.dtype == np.uint8
  # Another processor may round a pixel the other way.
  assert np.abs(drawn.astype(int) - stored).max() <= 2
  # Bit for bit the same, whatever is drawn along.
  chosen = np.array([8, 3])
  (few,) = generator.blocks(labels[chosen], chosen)
  np.testing.assert_array_equal(few.whole(), drawn[chosen])


@pytest.mark.parametrize(
  ("overrides", "named"),
  [
    ({"num_step": 5}, "sample.num_step is unknown; did you mean num_steps"),
    ({"num_steps": "many"}, "sample.num_steps='many'"),
    ({"num_steps": None}, "sample.num_steps=None: it takes a value"),
    ({"guidance": float("nan")}, "sample.guidance=nan"),
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


def test_text_settings_take_numbers_with_commas(tiny):
  config = tiny_config("flowar")
  config = config_lib.loads(config_lib.dumps(config))
  restored = run.Run(config, branches.build(config), {}, 0, tiny.mesh)
  overrides = run.parse_overrides(["grid=1,0.6,0.3,0"])
  generator = restored.generator(overrides)
  assert generator.settings.grid == "1,0.6,0.3,0"
  overrides = run.parse_overrides(["scale_steps=(4,4,6,6)"])
  assert restored.generator(overrides).settings.scale_steps == (4, 4, 6, 6)


@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_a_run_of_latents_is_refused_before_drawing(family, tiny):
  config = tiny_config(family, data__source="latents", model__channels=4)
  restored = run.Run(config, branches.build(config), {}, 0, tiny.mesh)
  with pytest.raises(ConfigError, match=r"8 x 8 x 4 .* needs a decoder"):
    restored.generator()


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
