"""The launches of a run, and its goodput: what of its time was not in vain.

`WORKDIR/launches.jsonl` only ever grows, by whole lines: one when a launch
begins, `{"launch": unix time, "step": steps done before it, ...}`, and one at
each of its reports, `{"time": unix time, "step": steps done, "kept": seconds}`.
A line that a crash cut off is passed over.
"""

import json
import time
from typing import Any

from etils import epath

from arflow_jax.training.growing import Growing

NAME = "launches.jsonl"
_LATEST = 1e11  # seconds; a line with more, or with less than 0, is damaged


class Launches:
  """Counts the seconds of kept steps, across all launches of a run.

  goodput = kept / wall, both in seconds:

  - `wall`: from the first line of the file, which the first launch wrote before
    it compiled, until now. Time between launches counts.
  - `kept`: the time of the steps that led to the present state. Each launch
    adds that of its steps from one report to the next, waiting for data
    included. It does not add its first step, which compiles, nor saving,
    drawing, start-up and restoring. A launch that begins after step k goes on
    from what was kept when step k was reported for the last time: steps that
    were lost and are trained again count once, in the wall time twice.

  Of a run of an earlier version, which has no such file, all counts from the
  first launch that writes one.

  Args:
    folder: that of the run.
    start: steps done before this launch.
    about: what else its line says.
  """

  def __init__(self, folder: epath.Path, start: int, about: dict[str, Any]):
    path = folder / NAME
    content = path.read_bytes() if path.exists() else b""
    before = _parsed(content)
    self._file = Growing(path, content)
    self._cut = bool(content) and not content.endswith(b"\n")
    now = time.time()
    launches = [x["launch"] for x in before if "launch" in x]
    kept = [x["kept"] for x in before if "kept" in x and x["step"] == start]
    self._began = min([*launches, now])
    self._kept = kept[-1] if kept else 0.0
    self.count = len(launches) + 1  # launches, this one included
    self._add({"launch": now, "step": start} | about)

  def report(self, step: int, seconds: float) -> float:
    """Notes the time of the steps since the last report; the goodput by now."""
    self._kept += seconds
    now = time.time()
    self._add({"time": now, "step": step, "kept": round(self._kept, 3)})
    # Clocks of two machines may differ, and be set back.
    return self._kept / max(now - self._began, self._kept, 1e-9)

  def close(self) -> None:
    self._file.close()

  def _add(self, line: dict[str, Any]) -> None:
    end = b"\n" * self._cut  # of a line that a crash cut off
    self._cut = False
    self._file.add(end + json.dumps(line).encode() + b"\n")


def read(folder: epath.Path) -> list[dict[str, Any]]:
  """The lines of a run's file, in order; none where it has no such file."""
  path = folder / NAME
  return _parsed(path.read_bytes()) if path.exists() else []


def _parsed(content: bytes) -> list[dict[str, Any]]:
  """The whole lines, those of launches and those of reports."""
  found = []
  for text in content.splitlines():
    try:
      line = json.loads(text)
      line["step"] = int(line["step"])
      for key in line.keys() & {"launch", "time", "kept"}:
        line[key] = float(line[key])
        if not 0 <= line[key] < _LATEST:
          raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError):
      continue
    found.append(line)
  return found
