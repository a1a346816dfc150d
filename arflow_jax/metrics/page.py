"""The page of a run: curves, pictures, launches and settings, in one file.

It is made of the run's small files alone, so that it can be made while the run
trains, after it was killed, and of runs of earlier versions, which lack some.
"""

import base64
import contextlib
import datetime
import html
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax import paths
from arflow_jax.errors import ConfigError
from arflow_jax.metrics import curves
from arflow_jax.parallel import processes
from arflow_jax.training import launches, listing, optimizer

_MARK = (
  "<!-- the page of a run by arflow_jax -->"  # tells our pages from others
)
_PICTURES = 12  # on the page: the newest, and those evenly spaced before it
_STYLE = """
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 1440px;
  padding: 0 1em; color: #222 }
table { border-collapse: collapse } h2 { margin-top: 1.6em }
td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top }
.curves { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)) }
figure { display: inline-block; margin: 0 14px 14px 0; vertical-align: top }
"""
# Title of each curve, its name in a record, and a factor.
_CURVES = (
  ("loss", "loss", 1),
  ("gradient norm, before clipping", "grad_norm", 1),
  ("images/s", "images_per_second", 1),
  ("goodput, % of the time since the first launch", "goodput", 100),
  ("MFU, %", "mfu", 100),
  ("input wait, % of the step time", "input_wait", 100),
  ("peak memory of a device, GB", "peak_memory", 1e-9),
  ("skew of the slowest process, ms a step", "skew", 1e3),
)


def write(
  workdir: str, out: str | None = None, *, overwrite: bool = False
) -> str:
  """Writes the page of a run, and returns where it is.

  Args:
    workdir: of the run.
    out: a file that ends in .html; `WORKDIR/report.html`, where a page that is
      there is replaced, if None.
    overwrite: whether any other file that is there may be replaced.

  Raises:
    ConfigError: no run there, or something in the way of the page.
  """
  paths.check_bucket("--workdir", workdir)
  folder = epath.Path(workdir)
  records = _records(folder)
  if not records and not listing.steps(workdir):
    raise ConfigError(
      f"--workdir={workdir} holds no run: it has neither records"
      " (metrics.jsonl) nor checkpoints"
    )
  path = epath.Path(out) if out else folder / "report.html"
  own = out is None and path.is_file()
  own = own and path.read_bytes().startswith(_MARK.encode())
  if out is None and path.exists() and not own and not overwrite:
    raise ConfigError(
      f"{path} is not a page of a run, and is not replaced; move it away, or"
      " name another file by report --out"
    )
  _check_output(path, overwrite or own)
  text = _page(folder, records, _config(workdir), launches.read(folder))
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + ".part")
  try:
    part.write_bytes(text.encode())
    part.replace(path)
  except OSError as error:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)
    error.filename = error.filename or str(path)  # a full disk names none
    raise
  return str(path)


def _check_output(path: epath.Path, overwrite: bool) -> None:
  """Raises ConfigError unless a page may be written. Makes nothing."""
  if path.suffix != ".html" or path.is_dir():
    raise ConfigError(f"--out={path} must be a file that ends in .html")
  paths.check_writable("--out", str(path))
  if path.exists() and not overwrite:
    raise ConfigError(f"--out={path} exists; choose another or add --overwrite")


def finish(workdir: str) -> None:
  """Writes the page at the end of training, from one process.

  What is in its way, such as a full disk, does not make a failure of a run.
  """
  if not processes.speaks():
    return
  try:
    processes.say(f"its curves are in {write(workdir)}")
  except (ConfigError, OSError) as error:
    processes.say(f"no page of curves was written: {error}")


def _records(folder: epath.Path) -> list[dict[str, Any]]:
  """The whole lines of `metrics.jsonl`, those that are records."""
  path = folder / "metrics.jsonl"
  found = []
  for line in path.read_bytes().splitlines() if path.is_file() else ():
    try:
      read = json.loads(line).items()
      record = {k: float(x) for k, x in read if isinstance(x, int | float)}
      found.append(record | {"step": int(record["step"])})
    except (ValueError, KeyError, AttributeError, OverflowError):
      continue
  return sorted(found, key=lambda record: record["step"])


def _config(workdir: str) -> ConfigDict | None:
  """That of the latest launch, else a stored one; None: neither can be read."""
  with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
    text = (epath.Path(workdir) / "config.json").read_text()
    return config_lib.complete(config_lib.loads(text).to_dict(), {})
  # Not by `newest`, for which all processes are needed.
  for step in reversed(listing.steps(workdir)):
    with contextlib.suppress(Exception):  # Orbax raises many kinds
      return listing.load_config(listing.folder(workdir) / str(step))
  return None


def _page(
  folder: epath.Path,
  records: Sequence[dict[str, Any]],
  config: ConfigDict | None,
  lines: Sequence[dict[str, Any]],
) -> str:
  begun = [line for line in lines if "launch" in line]
  name = html.escape(listing.folder(str(folder)).parent.name)
  parts = [
    _MARK,
    f'<!doctype html><meta charset="utf-8"><title>{name}</title>',
    f"<style>{_STYLE}</style><h1>{name}</h1>",
    _table(_summary(records, config, lines, begun)),
    '<h2>Curves</h2><div class="curves">',
    *_curves(records, config, [line["step"] for line in begun[1:]]),
    "</div><p>Over the optimiser steps; a dashed line is a restart.</p>",
    *_pictures(folder / "pictures"),
  ]
  if begun:
    rows = [("launch", "at (UTC)", "after step", "on")]
    rows += [
      (i, _when(line["launch"]), line["step"], _hardware(line))
      for i, line in enumerate(begun, 1)
    ]
    parts += ["<h2>Launches</h2>", _table(rows)]
  if config:
    keys = config_lib.flatten(config.to_dict()).items()
    parts += ["<h2>Config</h2>", _table(keys)]
  return "\n".join(parts) + "\n"


def _summary(
  records: Sequence[dict[str, Any]],
  config: ConfigDict | None,
  lines: Sequence[dict[str, Any]],
  begun: Sequence[dict[str, Any]],
) -> Iterable[tuple[str, str]]:
  if not records:
    yield "steps", "no records yet"
    return
  last = records[-1]
  yield (
    "steps",
    f"{last['step']:,}" + (f" of {config.steps:,}" if config else ""),
  )
  yield "loss", f"{last.get('loss', math.nan):.4f}"

  def median(key):
    found = [record[key] for record in records if key in record]
    return statistics.median(found) if found else None

  for text, key, form in (
    ("images/s, median", "images_per_second", "{:,.1f}"),
    ("step time, median", "step_time", "{:.4g} s"),
    ("MFU, median", "mfu", "{:.1%}"),
    ("input wait, median", "input_wait", "{:.1%}"),
  ):
    if (value := median(key)) is not None:
      yield text, form.format(value)
  if "goodput" in last:
    yield "goodput", f"{last['goodput']:.1%}"
  if begun:
    yield "launches", str(len(begun))
    yield "began", _when(begun[0]["launch"]) + " UTC"
    yield "last heard of", _when(lines[-1].get("time", begun[-1]["launch"]))


def _curves(
  records: Sequence[dict[str, Any]],
  config: ConfigDict | None,
  restarts: Sequence[int],
) -> Iterable[str]:
  for i, (title, key, factor) in enumerate(_CURVES):
    points = [(r["step"], factor * r[key]) for r in records if key in r]
    yield curves.svg(title, points, restarts, from_zero=i > 1)
    if i == 1 and config and records:
      schedule = optimizer.learning_rate(config.optimizer)
      steps = np.linspace(1, records[-1]["step"], 200).round()
      rates = np.asarray(schedule(steps - 1)) + 0 * steps
      points = list(zip(steps.tolist(), rates.tolist()))
      yield curves.svg("learning rate", points, restarts, from_zero=True)


def _pictures(folder: epath.Path) -> list[str]:
  """The pictures drawn on the way, oldest first."""
  found = folder.glob("*.png") if folder.exists() else ()
  steps = sorted(int(path.stem) for path in found if path.stem.isdecimal())
  if not steps:
    return []
  places = np.linspace(0, len(steps) - 1, min(len(steps), _PICTURES)).round()
  parts = ["<h2>Pictures drawn on the way</h2>"]
  for step in (steps[int(place)] for place in places):
    content = base64.b64encode((folder / f"{step}.png").read_bytes()).decode()
    parts.append(
      f"<figure><figcaption>step {step:,}</figcaption>"
      f'<img alt="step {step}" src="data:image/png;base64,{content}"></figure>'
    )
  return parts


def _table(rows: Iterable[Sequence[Any]]) -> str:
  cells = [
    "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
    for row in rows
  ]
  return "<table>" + "\n".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _hardware(line: dict[str, Any]) -> str:
  known = line.get
  return (
    f"{known('devices')} x {known('kind')} in {known('processes')} process(es),"
    f" JAX {known('jax')}"
  )


def _when(seconds: float) -> str:
  moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  return moment.strftime("%Y-%m-%d %H:%M:%S")
