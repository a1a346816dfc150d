"""Time intervals against the published table, its faults listed by name."""

import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.flow import intervals, paths
from tests.conftest import parity_files

# Entries of the published table that show its faults, and what is right. D2: a
# cut-off that the user gave is dropped for velocity. D3: the sbdm diffusion,
# infinite at 0, starts at 0.
GIVEN = "train_eps=0.002 sample_eps=0.005"
FAULTS = {
  f"{path} velocity {setting}": wanted
  for path in ("linear", "gvp")
  for setting, wanted in {
    f"train {GIVEN}": (0.002, 0.998),
    f"ode {GIVEN}": (0.005, 0.995),
    f"ode reverse {GIVEN}": (0.995, 0.005),
    f"sde sigma 0.04 {GIVEN}": (0.005, 0.96),
    f"sde linear 0.0 {GIVEN}": (0.005, 0.995),
    f"sde sbdm 0.04 {GIVEN}": (0.005, 0.96),
    f"sde sbdm 0.0 {GIVEN}": (0.005, 0.995),
    "sde sbdm 0.04": (0.001, 0.96),
    "sde sbdm 0.0": (0.001, 1.0),
  }.items()
}


def _name(entry):
  words = [entry["path"].lower(), entry["prediction"]]
  if entry.get("sde"):
    form = entry["diffusion_form"].lower()
    words += ["sde", form, str(entry["last_step_size"])]
  else:
    words.append("ode" if entry.get("eval") else "train")
  if entry.get("reverse"):
    words.append("reverse")
  if entry["train_eps_given"] is not None:
    for kind in ("train_eps", "sample_eps"):
      words.append(f"{kind}={entry[kind + '_given']}")
  return " ".join(words)


def _ours(entry):
  path = paths.PATHS[entry["path"].lower()]
  prediction = entry["prediction"]
  if not entry.get("eval"):
    return intervals.training(path, prediction, entry["train_eps_given"])
  form = entry.get("diffusion_form")
  return intervals.sampling(
    path,
    prediction,
    entry["sample_eps_given"],
    diffusion=form and form.lower(),
    last_step_size=entry.get("last_step_size", 0.0),
    reverse=entry.get("reverse", False),
  )


@pytest.mark.parametrize("path", parity_files("transport_losses*"))
def test_published_table(path, load_parity):
  entries = load_parity(path).meta["intervals"]
  assert len(entries) == 126
  for entry in entries:
    name, published = _name(entry), (entry["t0"], entry["t1"])
    wanted = FAULTS.get(name, published)
    assert _ours(entry) == pytest.approx(wanted, abs=1e-12), name
    if name in FAULTS:
      assert wanted != published, f"{name} is no fault"
  assert FAULTS.keys() <= {_name(entry) for entry in entries}


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
