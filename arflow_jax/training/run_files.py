"""The small files of a run beside its checkpoints.

`config.json` is the config of the latest launch, `data.json` tells the run's
data from other data.
"""

import itertools
import json
import logging
from typing import Any

from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import agreement
from arflow_jax.training import listing


def keep_config(workdir: str, config: ConfigDict) -> None:
  """Writes the config of a launch to `WORKDIR/config.json`, by one process."""
  text = config_lib.dumps(config)
  agreement.by_one(lambda: _keep(workdir, "config.json", text))


def check_data(workdir: str, found: dict[str, Any]) -> None:
  """Refuses other data than a run began with, in `WORKDIR/data.json`.

  One process decides for all.

  Keeps `found` there where the run has none: a run of an earlier version, or
  one that has no checkpoint yet and may begin with any data.

  Args:
    workdir: the run's directory.
    found: what `data.sources.fingerprint` returned.

  Raises:
    ConfigError: the run began with other data.
  """
  agreement.by_one(lambda: _check_data(workdir, found))


def _check_data(workdir: str, found: dict[str, Any]) -> None:
  path = listing.folder(workdir).parent / "data.json"
  now = list(zip(found["classes"], found["images"]))
  was = None
  if path.exists() and listing.steps(workdir):
    try:
      kept = json.loads(path.read_text())
      was = list(zip(kept["classes"], kept["images"]))
    except (ValueError, KeyError, TypeError):
      logging.warning("%s is damaged: it is written anew", path)
  if was is None:
    _keep(workdir, "data.json", json.dumps(found))
  elif was != now:
    pairs = itertools.zip_longest(was, now)
    old, new = next((a, b) for a, b in pairs if a != b)
    raise ConfigError(
      f"data.dir holds other data than {workdir} began with: of its classes"
      f" (name, images) the first that differs is {new}, was {old}; give the"
      " data.dir of that data, or choose another --workdir"
    )


def with_latest(config: ConfigDict, workdir: str) -> ConfigDict:
  """The stored config of a run with the free keys of its latest launch."""
  path = listing.folder(workdir).parent / "config.json"
  if not path.exists():  # a run of an earlier version
    return config
  try:
    return config_lib.with_free(config, config_lib.loads(path.read_text()))
  except (ValueError, TypeError, AttributeError) as error:
    logging.warning("%s is not used, it is damaged (%s)", path, error)
    return config


def _keep(workdir: str, name: str, text: str) -> None:
  """Writes a file of a run, as a whole."""
  folder = listing.folder(workdir).parent
  folder.mkdir(parents=True, exist_ok=True)
  part = folder / f"{name}.part"
  part.write_text(text + "\n")
  part.replace(folder / name)
