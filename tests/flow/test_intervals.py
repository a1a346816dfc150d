"""Time intervals against the published table, its faults listed by name."""

import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.flow import intervals, paths
from tests.conftest import parity_files


def _name(entry):
  return " ".join(f"{key}={value}" for key, value in entry.items())


def _form(entry):
  return entry["diffusion_form"].lower() if entry.get("sde") else None


def _ours(entry):
  path = paths.PATHS[entry["path"].lower()]
  prediction = entry["prediction"]
  if not entry.get("eval"):
    return intervals.training(path, prediction, entry["train_eps_given"])
  return intervals.sampling(
    path,
    prediction,
    entry["sample_eps_given"],
    diffusion=_form(entry),
    last_step_size=entry.get("last_step_size", 0.0),
    reverse=entry.get("reverse", False),
  )


def _wanted(entry):
  """The published interval, or what is right where that shows its faults.

  D2: a cut-off that the user gave is dropped for velocity. D3: the sbdm
  diffusion, infinite at 0, starts at 0.
  """
  low, high = entry["t0"], entry["t1"]
  if entry["path"] == "VP" or entry["prediction"] != "velocity":
    return low, high
  given = entry["sample_eps_given" if entry.get("eval") else "train_eps_given"]
  if given is not None:
    low, high = given, 1 - (entry.get("last_step_size") or given)
    if entry.get("reverse"):
      low, high = 1 - low, 1 - high
  return (max(low, 1e-3) if _form(entry) == "sbdm" else low), high


@pytest.mark.parametrize("path", parity_files("transport_losses*"))
def test_published_table(path, load_parity):
  for entry in load_parity(path).cases("intervals"):
    wanted = pytest.approx(_wanted(entry), abs=1e-12)
    assert _ours(entry) == wanted, _name(entry)


def test_each_cut_off_has_its_own_default():
  """D1: a training cut-off given alone does not decide the sampling one."""
  assert intervals.training(paths.VP) == (0, 1 - 1e-5)
  assert intervals.sampling(paths.VP) == (0, 1 - 1e-3)
  assert intervals.training(paths.VP, eps=0.01) == (0, 0.99)
  assert intervals.sampling(paths.LINEAR, "noise") == (1e-3, 1 - 1e-3)
  assert intervals.sampling(paths.LINEAR) == (0, 1)


def test_sbdm_never_starts_where_it_is_infinite():
  start, _ = intervals.sampling(paths.GVP, eps=1e-5, diffusion="sbdm")
  assert start == 1e-3
  start, _ = intervals.sampling(paths.VP, diffusion="sbdm")
  assert start == 0  # finite there


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    ({"prediction": "velocty"}, "prediction='velocty'"),
    ({"diffusion": "SBDM"}, "diffusion='SBDM'"),
    ({"eps": 0.7}, "eps=0.7"),
    ({"eps": -1.0}, "eps=-1.0"),
    ({"diffusion": "sigma", "last_step_size": 1.0}, "last_step_size=1.0"),
    ({"diffusion": "sigma", "reverse": True}, "no reverse"),
  ],
)
def test_bad_arguments_are_refused_by_name(arguments, named):
  with pytest.raises(ConfigError, match=named):
    intervals.sampling(paths.LINEAR, **arguments)


def test_training_refuses_an_unknown_prediction():
  with pytest.raises(ConfigError, match="prediction='data'"):
    intervals.training(paths.VP, "data")
