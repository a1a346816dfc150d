"""Curves over the steps of a run as SVG text, which any browser shows."""

import html
import math
from collections.abc import Sequence
from typing import Any

_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 30, 28
_MOST = 600  # points of a line; more than that many are averaged
_LARGEST = 1e300
_LINES = 30  # marks; more than that many would hide the curve
_DECADES = 1.5  # values that span more may get a logarithmic axis

Points = Sequence[tuple[Any, Any]]  # numbers, whole or not


def svg(
  title: str,
  points: Points,
  marks: Sequence[Any] = (),
  *,
  from_zero: bool = False,
) -> str:
  """One curve with its axes, or an empty text where there are no two steps.

  Args:
    title: stands above it.
    points: steps, ascending, and values; what is not finite, or so large that
      a sum of it is not, is left out.
    marks: steps at which a dashed line stands, such as restarts; a short one
      where they are many.
    from_zero: the axis of the values begins at 0 and is linear, as suits rates
      and shares.
  """
  points = [(float(x), float(y)) for x, y in points if abs(y) < _LARGEST]
  points = _thinned(points)
  if not points or points[0][0] == points[-1][0]:
    return ""
  steps, values = zip(*points)
  marks = [float(mark) for mark in marks]
  low, high = min(values), max(values)
  if from_zero:
    low = min(low, 0.0)
  log = low > 0 and math.log10(high / low) > _DECADES
  scale = math.log10 if log else float
  if low == high:
    low, high = (0.0, 2 * low) if low > 0 else (low - 1, high + 1)
  right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

  def x(step):
    return _LEFT + (step - steps[0]) / (steps[-1] - steps[0]) * (right - _LEFT)

  def y(value):
    share = (scale(value) - scale(low)) / (scale(high) - scale(low))
    return bottom - share * (bottom - _TOP)

  if log:
    title += " (logarithmic)"
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    ' font-family="sans-serif" font-size="11">',
    f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    f'<text x="{_LEFT}" y="18" font-size="13">{html.escape(title)}</text>',
  ]
  for tick in _decades(low, high) if log else _ticks(low, high):
    parts += [
      f'<path d="M{_LEFT} {y(tick):.1f}H{right}" stroke="#ddd"/>',
      f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">'
      f"{_number(tick)}</text>",
    ]
  for tick in _ticks(steps[0], steps[-1]):
    parts.append(
      f'<text x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">'
      f"{_number(tick)}</text>"
    )
  top = _TOP if len(marks) <= _LINES else bottom - 8
  parts += [
    f'<path d="M{x(mark):.1f} {top}V{bottom}" stroke="#c60"'
    ' stroke-dasharray="3 3"/>'
    for mark in marks
    if steps[0] < mark < steps[-1]
  ]
  line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
  parts += [
    f'<polyline points="{line}" fill="none" stroke="#15c" stroke-width="1.5"/>',
    "</svg>",
  ]
  return "\n".join(parts)


def _thinned(points: Points) -> Points:
  """So many points that each has a place: means of consecutive ones."""
  size = -(-len(points) // _MOST)
  if size <= 1:
    return points
  groups = [points[i : i + size] for i in range(0, len(points), size)]
  mean = lambda numbers: sum(numbers) / len(numbers)
  return [tuple(map(mean, zip(*group))) for group in groups]


def _ticks(low: float, high: float) -> list[float]:
  """Round numbers from one end to the other, three to seven of them."""
  raw = (high - low) / 4
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(power * f for f in (1, 2, 5, 10) if power * f >= raw * 0.8)
  first, last = math.ceil(low / step), math.floor(high / step)
  return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
  """Powers of ten between two numbers, thinned where they are many.

  With 2 and 5 times them where they are few.
  """
  first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
  factors = (1, 2, 5) if last - first < 3 else (1,)
  tens = range(first, last + 1, 1 + (last - first) // 6)
  found = [float(f"{f}e{n}") for n in tens for f in factors]
  return [tick for tick in found if low <= tick <= high]


def _number(tick: float) -> str:
  """In few characters: 2000, 50k, 1.5M."""
  if abs(tick) >= 1e6:
    return f"{tick / 1e6:g}M"
  return f"{tick / 1e3:g}k" if abs(tick) >= 1e4 else f"{tick:g}"
