"""What preflight prints: one table, at most 100 columns wide."""

import textwrap
from collections.abc import Callable
from typing import Any

from arflow_jax.analysis import estimates
from arflow_jax.analysis.chips import parse

_SHOWN = 8  # kinds of exchanges with a line of their own


def table(found: dict[str, Any]) -> str:
  """The figures of `preflight.examine`, for people."""
  lines = [*_head(found), "", *_bytes(found), *_checkpoint(found)]
  lines += ["", *_work(found)]
  if "exchanges" in found:
    lines += ["", *_exchanges(found, "step")]
  if "estimate" in found:
    lines += ["", *_estimate(found)]
  lines += ["", *_advice(found)]
  return "\n".join(lines).rstrip()


def sampler_table(found: dict[str, Any]) -> str:
  """The figures of `preflight_sample.examine`, for people."""
  images, flops = found["work"]["images"], found["work"]["flops"]
  lines = [*_head(found), ""]
  if "bytes" in found:
    notes = {
      "parameters": "the average, whole on every device",
      "temporaries": "" if found["pixels"] else "no decoder of latents in it",
    }
    lines.append("bytes of one device")
    for name, size in found["bytes"].items():
      lines.append(
        f"  {name:26}{_size(size):>14}  {notes.get(name, '')}".rstrip()
      )
  lines += [
    f"{'images of one block':28}{images:>14,}"
    f"  of sample.block_size={found['config']['sample']['block_size']},"
    f" {images // found['devices']} on each device",
    f"{'model FLOPs of one image':28}{flops / images / 1e12:>12,.3f} T"
    "  all steps, guidance included",
  ]
  if "estimate" not in found:
    return "\n".join([*lines, "", *_fewer(found)])
  if found["exchanges"]:
    lines += ["", *_exchanges(found, "block")]
  lines += ["", *_parts(found)]
  blocks = list(found["estimate"]["blocks"].values())
  return "\n".join(
    lines
    + _columns(
      blocks,
      {
        "a block": lambda b: f"{b['seconds']:,.2f} s",
        "model FLOPs utilisation": lambda b: f"{b['mfu']:.1%}",
        "images/s": lambda b: f"{b['images_per_second']:,.1f}",
        f"hours, {estimates.IMAGES:,} images": lambda b: f"{b['hours']:,.2f}",
        "chip-hours of these": lambda b: f"{b['chip_hours']:,.1f}",
      },
    )
  )


def _fewer(found: dict[str, Any]) -> list[str]:
  """What may help a sampler that does not fit."""
  each = found["work"]["images"] // found["devices"]
  if each > 1:
    return [
      f"lower sample.block_size: with {found['devices']} each device draws one"
      f" image at a time instead of {each}"
    ]
  return ["each device draws one image at a time already: take larger chips"]


def _head(found: dict[str, Any]) -> list[str]:
  mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
  devices = f"{found['chips']} chips"
  if found["slices"] > 1:
    devices += f" in {found['slices']} slices"
  if found["devices"] != found["chips"]:
    devices += f" of {found['devices'] // found['chips']} devices each"
  if found["topology"].startswith("gpu:"):
    devices = "one GPU, by a formula alone"
  verdict = "FITS" if found["fits"] else "DOES NOT FIT"
  needed = found.get("needed") or found["formula"]["total"]
  lines = [
    f"{found['config']['branch']} on {found['topology']} ({devices}), {mesh}",
    f"{verdict}: {_size(needed)} of {_size(found['hbm'])} on each device"
    f" ({needed / found['hbm']:.0%})",
  ]
  if "compile_time" in found:
    did = "compiled" if "bytes" in found else "refused by the compiler"
    seconds = found["compile_time"]
    lines.append(f"{did} in {seconds:.0f} s by {found['compiler']}")
  if found.get("form"):
    lines += textwrap.wrap(found["form"], 98, subsequent_indent="  ")
  return lines


def _bytes(found: dict[str, Any]) -> list[str]:
  notes = {
    "parameters": "",
    "optimiser": "moments of AdamW",
    "average": "of the parameters (EMA)",
    "batch": "",
    "padding": "of the above, to the tiles of a TPU",
    "temporaries": "gradients, what the backward pass keeps",
  }
  formula, compiled = found["formula"], found.get("bytes", {})
  lines = [f"{'bytes of one device':28}{'compiled':>14}{'by formula':>14}"]
  for name, note in notes.items():
    cells = [_size(x[name]) if name in x else "-" for x in (compiled, formula)]
    lines.append(f"  {name:26}{cells[0]:>14}{cells[1]:>14}  {note}".rstrip())
  needed = _size(found["needed"]) if "needed" in found else "-"
  lines.append(f"  {'in all':26}{needed:>14}{_size(formula['total']):>14}")
  return lines


def _checkpoint(found: dict[str, Any]) -> list[str]:
  saved = found["checkpoint"]
  disk = f"{saved['kept']} kept at most, and one that is written"
  hosts = f"{saved['hosts']} hosts" if saved["hosts"] > 1 else "one host"
  waits = f"ESTIMATE: {hosts} at {estimates.TO_HOST / 1e9:.0f} GB/s (assumed)"
  writes = (
    f"ESTIMATE: at {estimates.TO_DISK / 1e9:.0f} GB/s a host (assumed), in the"
    " background"
  )
  return [
    f"{'a checkpoint in all':28}{_size(saved['bytes']):>14}"
    "  before compression",
    f"  {'disk':26}{_size(saved['disk']):>14}  {disk}",
    f"  {'training waits':26}{saved['waits']:>12,.1f} s  {waits}",
    f"  {'it is written in':26}{saved['writes']:>12,.1f} s  {writes}",
  ]


def _work(found: dict[str, Any]) -> list[str]:
  images, flops = found["work"]["images"], found["work"]["flops"]
  return [
    f"{'images of one step':28}{images:>14,}",
    f"{'model FLOPs of one step':28}{flops / 1e12:>12,.3f} T"
    f"  {flops / images / 1e9:,.1f} G an image; 3 x forward, remat not counted",
  ]


def _exchanges(found: dict[str, Any], call: str) -> list[str]:
  rows = found["exchanges"]
  total = sum(row["bytes"] for row in rows)
  lines = [f"{f'sent by one device in a {call}':28}{total / 1e6:>11,.1f} MB"]
  for row in rows[:_SHOWN]:
    name = f"{row['kind']}, {row['dtype']}"
    lines.append(
      f"  {name:26}{row['bytes'] / 1e6:>11,.1f} MB  along {row['axes']},"
      f" {row['count']:,} times"
    )
  if rest := sum(row["bytes"] for row in rows[_SHOWN:]):
    lines.append(f"  {'all others':26}{rest / 1e6:>11,.1f} MB")
  return lines


def _estimate(found: dict[str, Any]) -> list[str]:
  return _parts(found) + _columns(
    list(found["estimate"]["steps"].values()),
    {
      "a step": lambda s: f"{1e3 * s['seconds']:,.1f} ms",
      "model FLOPs utilisation": lambda s: f"{s['mfu']:.1%}",
      "images/s": lambda s: f"{s['images_per_second']:,.0f}",
      f"days, {found['config']['steps']:,} steps": lambda s: (
        f"{s['days']:,.2f}"
      ),
      "chip-hours of these": lambda s: f"{s['chip_hours']:,.0f}",
    },
  )


def _parts(found: dict[str, Any]) -> list[str]:
  """What each part of a program takes on its own."""
  chip = parse(found["topology"]).chip
  parts = found["estimate"]["parts"]
  xla, kernels = found["cycles"]["xla"], found["cycles"]["kernels"]
  notes = {
    "products": f"model FLOPs at {chip.peak / 1e12:,.0f} TFLOP/s a chip",
    "memory": f"all bytes once in, once out, {chip.hbm_rate / 1e9:,.0f} GB/s"
    " a chip",
    "exchange": f"all links busy, each way {chip.links / 2e9:,.0f} GB/s a chip",
    "network": f"between slices, {chip.network / 1e9:,.2f} GB/s a chip",
    "cycles": f"{xla / 1e6:,.1f} M of XLA, {kernels / 1e6:,.1f} M of kernels,"
    f" at {chip.clock / 1e9:.2f} GHz",
  }
  lines = ["ESTIMATES: nothing was run, peaks as published, no waiting"]
  for name in parts:
    note = notes[name]
    lines.append(f"  {name:26}{1e3 * parts[name]:>11,.1f} ms  {note}")
  return lines


def _columns(
  bounds: list[dict[str, float]], rows: dict[str, Callable[[dict], str]]
) -> list[str]:
  """The two bounds of an estimate beside each other."""
  lines = [f"{'where exchanges are':28}{'hidden':>14}{'not hidden':>14}"]
  for name, text in rows.items():
    lines.append(f"  {name:26}{text(bounds[0]):>14}{text(bounds[1]):>14}")
  return lines


def _advice(found: dict[str, Any]) -> list[str]:
  lines = []
  if not found["fits"]:
    lines += _remedy(found)
  if found["topology"].startswith("gpu:"):
    lines += [
      "Limits: nothing was compiled. The formula may be wrong by 15% and more;"
      " it leaves 15% free.",
      "JAX takes 75% of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.",
    ]
  elif smallest := found["smallest"]:
    lines.append(
      f"smallest slice by formula: {smallest['topology']}"
      f" ({_size(smallest['formula'])} of a device, with these settings)"
    )
  else:
    lines.append("smallest slice by formula: none, with these settings")
  if abs(found.get("factor", 1) - 1) > 0.5:
    lines.append(
      f"The compiler's temporaries are {found['factor']:.1f} times those of the"
      " formula; the advice has that factor in it."
    )
  return lines


def _remedy(found: dict[str, Any]) -> list[str]:
  lines = ["what would fit alone, by formula"]
  for row in found["alone"]:
    ((key, value),) = row["change"].items()
    cell = "none" if value is None else f"{value}"
    size = _size(row["formula"]) if "formula" in row else ""
    lines.append(f"  {key:26}{cell:>14}{size:>14}".rstrip())
  if (answer := found["remedy"]) is None:
    return [*lines, "remat, fsdp and accumulation together: nothing that fits"]
  flags = " ".join(f"--config.{k}={v}" for k, v in answer["change"].items())
  if "needed" in answer:
    step = answer["estimate"]["steps"]["in_turn"]
    how = (
      f"compiled: {_size(answer['needed'])}, {step['mfu']:.1%} MFU estimated"
    )
  else:
    how = f"by formula: {_size(answer['formula'])}"
  return [*lines, f"it fits with {flags}", f"  ({how})"]


def _size(size: int | float) -> str:
  if size >= 2**30:
    return f"{size / 2**30:,.2f} GiB"
  return f"{size / 2**20:,.1f} MiB"
