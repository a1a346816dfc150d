"""What the benchmark prints and keeps: a table, a JSON file, ratios of two."""

import json
import pathlib
import statistics
from typing import Any

import jax
from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax import paths
from arflow_jax.analysis import benchmark
from arflow_jax.analysis.benchmark import Speed
from arflow_jax.errors import ConfigError

_COMPARED = (
  "compile_time",
  "step_time",
  "images_per_second",
  "flops",
  "product_rate",
  "share",
  "peak_memory",
  "input_wait",
)


def table(speeds: dict[str, Speed], dtype: str) -> str:
  """The measurements, one column a program."""
  side = benchmark.product_side()
  cells = {
    "compile time": lambda s: f"{s.compile_time:.1f} s",
    "step time (median)": lambda s: f"{s.step_time:.4f} s",
    "  spread": lambda s: f"{min(s.step_times):.4f} to {max(s.step_times):.4f}",
    "  calls": lambda s: f"{len(s.step_times)}",
    "images per step": lambda s: f"{s.images}",
    "images/s": lambda s: f"{s.images / s.step_time:,.2f}",
    "model FLOPs per step": lambda s: f"{s.flops / 1e9:,.1f} G",
    "FLOP/s": lambda s: f"{s.flops / s.step_time / 1e9:,.1f} G",
    f"{side}-cube {dtype} product": lambda s: (
      f"{statistics.median(s.product_rates) / 1e9:,.1f} G"
    ),
    "share of its rate": lambda s: f"{s.share:.1%}",
    "peak memory (planned)": lambda s: f"{s.peak_memory / 2**20:,.0f} MiB",
    "input wait per step": lambda s: (
      "-" if s.input_wait is None else f"{1e3 * s.input_wait:.1f} ms"
    ),
    "  data": lambda s: s.input_source or "-",
  }
  rows = {"": list(speeds)} | {
    name: [cell(speed) for speed in speeds.values()]
    for name, cell in cells.items()
  }
  lines = [f"{_device()}, jax {jax.__version__}"]
  for name, cells in rows.items():
    lines.append(f"{name:28}" + "".join(f"{cell:>22}" for cell in cells))
  return "\n".join(lines)


def _device() -> str:
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def record(speeds: dict[str, Speed], config: ConfigDict) -> dict[str, Any]:
  """Everything measured, as it goes into the JSON file."""
  return {
    "device": _device(),
    "jax": jax.__version__,
    "config": json.loads(config_lib.dumps(config)),
    "programs": {
      name: {
        **speed.summary(),
        "step_times": speed.step_times,
        "product_rates": speed.product_rates,
        "input_source": speed.input_source,
      }
      for name, speed in speeds.items()
    },
  }


def write(path: str, measured: dict[str, Any]) -> None:
  """Writes the JSON file, making its folder."""
  file = pathlib.Path(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(measured, indent=1) + "\n")


def check_output(path: str, overwrite: bool) -> None:
  """Raises ConfigError unless `path` ends in .json and may be written."""
  if not path.endswith(".json"):
    raise ConfigError(f"--out={path} must end in .json")
  if pathlib.Path(path).is_dir():
    raise ConfigError(f"--out={path} is a folder; give the name of a file")
  if pathlib.Path(path).exists() and not overwrite:
    raise ConfigError(f"--out={path} exists; give --overwrite to replace it")
  paths.check_writable("--out", path)


def read(path: str) -> dict[str, Any]:
  """A file that `write` made.

  Raises:
    ConfigError: no such file, or another kind of file.
  """
  try:
    measured = json.loads(pathlib.Path(path).read_text())
    dict(measured["config"])
    for program in measured["programs"].values():
      for key in _COMPARED:
        float(program[key] or 0)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConfigError(
      f"--compare={path} is no result of this benchmark"
      f" ({type(error).__name__}); make one with --out={path}"
    ) from None
  return measured


def compare(measured: dict[str, Any], other: dict[str, Any]) -> str:
  """Ratios of this run over another one, for the programs that both hold."""
  lines = []
  for key in ("device", "jax"):
    if measured[key] != other.get(key):
      lines.append(f"note: {key} {measured[key]} against {other.get(key)}")
  ours = config_lib.flatten(measured["config"])
  theirs = config_lib.flatten(other["config"])
  for key in sorted(ours.keys() | theirs.keys()):
    if (a := ours.get(key)) != (b := theirs.get(key)):
      lines.append(f"note: {key} {a} against {b}")
  shared = [n for n in measured["programs"] if n in other["programs"]]
  if not shared:
    return "nothing to compare: the other run measured other programs"
  head = f"{'this run / the other':28}"
  lines.append(head + "".join(f"{name:>22}" for name in shared))
  for key in _COMPARED:
    pairs = [
      (measured["programs"][name].get(key), other["programs"][name].get(key))
      for name in shared
    ]
    ratios = [f"{a / b:.3f}" if a and b else "-" for a, b in pairs]
    lines.append(f"{key:28}" + "".join(f"{ratio:>22}" for ratio in ratios))
  return "\n".join(lines)
