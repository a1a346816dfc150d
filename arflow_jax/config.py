"""The configuration tree: its defaults, and what a relaunch may change.

Config files in `configs/` start from `default_config` and fill in a branch's
`model` and `sample` groups. Nothing here imports JAX.
"""

import dataclasses
import difflib
import functools
import importlib.util
import json
import pathlib
from typing import Any

from ml_collections import ConfigDict, config_dict

from arflow_jax import values
from arflow_jax.errors import ConfigError

KEY_TYPES = (int, float, bool, str, tuple)

# What a relaunch may change: what shapes no result, or by rounding alone, so
# that a run can move to other hardware. Every other key is frozen.
FREE = (
  "steps",
  "model.remat",
  "model.attention",
  "optimizer.accumulation",
  "data.dir",
  "data.workers",
  "mesh",
  "checkpoint",
  "eval",
  "sample",
  "log",
  "debug",
)


def default_config() -> ConfigDict:
  """The groups every branch shares; `model` and `sample` are the branch's."""
  config = ConfigDict()
  config.branch = config_dict.placeholder(str)  # a name in `branches.py`
  config.seed = 0
  config.steps = 400_000  # optimiser steps in all
  config.batch_size = 256  # training items per step, over all devices
  config.model = ConfigDict()

  config.data = data = ConfigDict()
  data.source = "latents"  # a name in `data/sources.py`, `name:argument`
  data.dir = config_dict.placeholder(str)
  data.sequence_length = 1  # images of one class per training item
  data.flip = False  # mirror each image with probability 1/2
  data.workers = 0  # loader processes; 0 uses threads

  config.optimizer = optimizer = ConfigDict()  # AdamW
  optimizer.peak_lr = 1e-4
  optimizer.schedule = "constant"  # or "cosine", until decay_steps
  optimizer.warmup_steps = 0
  optimizer.decay_steps = config_dict.placeholder(int)
  optimizer.final_fraction = 0.01  # of peak_lr, where the cosine ends
  optimizer.b1 = 0.9
  optimizer.b2 = 0.95
  optimizer.eps = 1e-8
  optimizer.weight_decay = 0.0
  optimizer.clip = "none"  # or "value", "global_norm"
  optimizer.clip_threshold = 1.0
  optimizer.skip_nonfinite = False  # skips updates that are not finite
  optimizer.accumulation = 1  # micro-batches per step

  config.ema = ConfigDict({"decay": 0.9999})
  # Sizes of the mesh axes; -1, in one of them, takes the devices that are left.
  config.mesh = mesh = ConfigDict()
  mesh.data = -1  # splits batches
  mesh.fsdp = 1  # splits batches, parameters, optimiser state and averages
  mesh.tensor = 1  # splits heads and hidden features inside a layer
  config.checkpoint = checkpoint = ConfigDict()
  checkpoint.every = 10_000  # steps between checkpoints
  checkpoint.minutes = 0.0  # also after so many; 0: by steps alone
  checkpoint.keep = 3  # the newest this many stay
  checkpoint.keep_every = config_dict.placeholder(int)  # and every k-th step
  checkpoint.failures = 5  # saves that fail in a row before training stops
  # For data that `evaluate` can judge in pixel space.
  config.eval = ConfigDict({"num_samples": 400})
  config.sample = ConfigDict()
  config.log = log = ConfigDict()
  log.every = 100  # steps between progress lines
  log.pictures = 0  # steps between pictures drawn on the way; 0 draws none
  log.trace_start = 10  # the first step that the profiler traces
  log.trace_steps = 0  # how many it traces; 0 is none
  config.debug = debug = ConfigDict()
  debug.rows = False  # write a hash of what each row of a step is trained on
  debug.replicas = 0  # steps between comparisons of replicas; 0: never
  return config


def from_file(name: str) -> ConfigDict:
  """The config of `FILE.py:VARIANT`, as `--config` names it.

  A relative path that is not there is looked for beside the package, where a
  checkout has its `configs/`.

  Raises:
    ConfigError: no such file, or it fails.
  """
  file, colon, variant = name.partition(":")
  path, beside = pathlib.Path(file), pathlib.Path(__file__).parents[1] / file
  if not path.exists() and beside.exists():
    path = beside
  spec = importlib.util.spec_from_file_location("config_file", path)
  if not path.is_file() or spec is None:
    wrong = "is no Python file" if path.exists() else "does not exist"
    raise ConfigError(f"--config cannot be loaded: {file} {wrong}")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(*[variant] * bool(colon))
  except ConfigError:
    raise
  except (Exception, SystemExit) as error:  # whatever a user's file may raise
    raise ConfigError(
      f"--config cannot be loaded: {file}: {type(error).__name__}: {error}"
    ) from error
  _check_form(config, file)
  return config


def _check_form(config: Any, file: str) -> None:
  """Raises ConfigError unless a file returned every key, of a usable type."""
  begin = "begin with arflow_jax.config.default_config()"
  if not isinstance(config, ConfigDict):
    raise ConfigError(
      f"--config: get_config of {file} returned"
      f" {type(config).__name__}, not a ConfigDict; {begin}"
    )
  # What every config has: a branch checks the rest of its own two groups.
  wanted = {*flatten(default_config().to_dict()), "model", "sample.block_size"}
  if missing := sorted(wanted - flatten(config.to_dict()).keys() - {*config}):
    raise ConfigError(
      f"--config: {file} lacks the keys {', '.join(missing)}; {begin}"
    )
  for key in flatten(config.to_dict()):
    if (kind := key_type(config, key)) not in KEY_TYPES:
      raise ConfigError(
        f"--config: {key} of {file} is of type {kind.__name__}; use a number, a"
        " text, a tuple, or config_dict.placeholder(TYPE) for None"
      )


def key_type(config: ConfigDict, key: str) -> type:
  """The type of a dotted key, also of one that is None now."""
  *groups, name = key.split(".")
  return functools.reduce(getattr, groups, config).get_type(name)


def takes_none(config: ConfigDict, key: str) -> bool:
  """Whether a dotted key was made as a placeholder, which may hold None."""
  *groups, name = key.split(".")
  group = functools.reduce(getattr, groups, config)
  fields = dict(group.items(preserve_field_references=True))
  return isinstance(fields[name], config_dict.FieldReference)


def make(
  kind: type,
  fields: dict[str, Any],
  group: str,
  rules: dict[str, values.Rule],
) -> Any:
  """A dataclass from the values of a config group.

  Raises:
    ConfigError: keys that it lacks or does not know, values against a rule.
  """
  names = [field.name for field in dataclasses.fields(kind)]
  for key in fields:
    if key not in names:
      hint = nearest(key, names)
      raise ConfigError(f"{group}.{key} is not known to this branch{hint}")
  if missing := [name for name in names if name not in fields]:
    raise ConfigError(f"the config lacks {group}.{f', {group}.'.join(missing)}")
  values.check(f"{group}.", fields, rules)
  tuples = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
  return kind(**fields | tuples)  # JSON makes lists of tuples


def dumps(config: ConfigDict) -> str:
  """The config as JSON text, the form stored with every checkpoint."""
  return json.dumps(config.to_dict(), indent=2)


def loads(text: str) -> ConfigDict:
  """Inverse of `dumps`; the result is locked.

  Raises:
    ValueError: the text is no JSON object.
  """
  if not isinstance(found := json.loads(text), dict):
    raise ValueError("it holds no JSON object")
  return ConfigDict(found).lock()


def complete(stored: dict[str, Any], added: dict[str, Any]) -> ConfigDict:
  """A stored config with the keys that were added after it was stored.

  Args:
    stored: what was stored, perhaps by an earlier version.
    added: dotted keys of its branch and the values that earlier runs had; the
      shared keys have their defaults.
  """
  shared = flatten(json.loads(dumps(default_config())))
  config = ConfigDict(stored)
  for key, value in (shared | added).items():
    *groups, name = key.split(".")
    node = config
    for group in groups:
      if group not in node:
        node[group] = ConfigDict()
      node = node[group]
    if name not in node:
      node[name] = value
  return config.lock()


def check_relaunch(
  stored: ConfigDict, config: ConfigDict, workdir: str
) -> None:
  """Raises ConfigError where `config` changes a frozen key of a stored run."""
  # As JSON, for stored tuples come back as lists.
  old, new = (flatten(json.loads(dumps(c))) for c in (stored, config))
  changed = [
    f"{key} (stored {old.get(key)!r}, now {new.get(key)!r})"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and not _is_free(key)
  ]
  if changed:
    raise ConfigError(
      f"{workdir} holds a run of another config; frozen keys differ: "
      + ", ".join(changed)
      + ". Restore these values or choose another --workdir"
    )


def with_free(stored: ConfigDict, latest: ConfigDict) -> ConfigDict:
  """The stored config of a run with the free keys of its latest launch."""
  config = stored.copy_and_resolve_references().unlock()
  free = {k: v for k, v in flatten(latest.to_dict()).items() if _is_free(k)}
  known = flatten(config.to_dict())
  for key, value in free.items():
    if key in known:
      *groups, name = key.split(".")
      functools.reduce(getattr, groups, config)[name] = value
  return config.lock()


def _is_free(key: str) -> bool:
  return any(key == free or key.startswith(free + ".") for free in FREE)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dictionaries to one, with dotted keys."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def nearest(key: str, known: list[str], mark: str = "") -> str:
  """A hint naming the known key most like an unknown one, if any is near.

  Args:
    key: the unknown one.
    known: names to choose from.
    mark: what stands before a name in the hint.
  """
  tail = key.rpartition(".")[2]  # `lr` is nearer to `peak_lr` than to `clip`
  likely = [name for name in known if tail in name.rpartition(".")[2]]
  matches = difflib.get_close_matches(
    key, likely or known, n=1, cutoff=0.0 if likely else 0.6
  )
  return f"; did you mean {mark}{matches[0]}?" if matches else ""


def update(group: ConfigDict, overrides: dict[str, Any], name: str) -> None:
  """Sets keys of a group.

  Raises:
    ConfigError: an unknown key, or a value of another type.
  """
  for key, value in overrides.items():
    if key not in group:
      raise ConfigError(f"{name}.{key} is unknown{nearest(key, list(group))}")
    if value is None and group[key] is not None:
      raise ConfigError(f"{name}.{key}=None: it takes a value")
    kind = type(group[key])
    if isinstance(value, bool) and kind in (int, float):  # True would be 1
      raise ConfigError(f"{name}.{key}={value!r}: it takes a number")
    try:
      group[key] = value
    except TypeError as error:
      reason = str(error).splitlines()[0]
      raise ConfigError(f"{name}.{key}={value!r}: {reason}") from None


def check(config: ConfigDict) -> None:
  """Raises ConfigError unless the values of the shared keys can work.

  The branch checks those of its own two groups, `model` and `sample`.
  """
  values.check("", flatten(config.to_dict()), values.SHARED)
