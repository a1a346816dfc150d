"""The table of `evaluate`: which settings it uses, and a row for each scale."""

import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.metrics import report
from arflow_jax.sampling import run
from tests.sampling.noise import noise_run, one_device


@pytest.fixture(autouse=True)
def noise(monkeypatch):
  restored = noise_run(one_device(), eval__num_samples=30)
  monkeypatch.setattr(run, "restore", lambda workdir: restored)


def test_every_guidance_has_a_row(capsys):
  scores = report.evaluate_run(
    "x", [1.0, 2.0], {"num_steps": 2}, num_samples=20, seed=4
  )
  out = capsys.readouterr().out
  assert scores.keys() == {1.0, 2.0}
  assert scores[1.0] == scores[2.0]  # this branch does not guide
  assert scores[1.0].distance > 1
  assert "weights of step 7; 20 samples per guidance" in out
  assert "num_steps=2 " in out
  assert " seed=4\n" in out
  for line in ("held-out images", "real images", "guidance 1 ", "guidance 2 "):
    assert line in out


def test_the_run_says_how_many_unless_told(capsys):
  report.evaluate_run("x", [1.0], {})
  assert "; 30 samples per guidance" in capsys.readouterr().out
  with pytest.raises(ConfigError, match=r"\(--num_samples\) = 25 must be"):
    report.evaluate_run("x", [1.0], {}, num_samples=25)


def test_a_guidance_that_would_be_ignored_is_refused():
  with pytest.raises(ConfigError, match="add it to --guidance"):
    report.evaluate_run("x", [1.0], {"guidance": 3.0})
