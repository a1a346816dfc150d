"""Curves: what a browser would draw, read back from the SVG."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from arflow_jax.metrics import curves

SVG = "{http://www.w3.org/2000/svg}"


def _read(points, marks=(), **options):
  """Places on the paper, labels, and how many dashed lines there are."""
  root = ET.fromstring(curves.svg("a < b", points, marks, **options))
  line = root.find(f"{SVG}polyline").get("points")
  places = [tuple(map(float, pair.split(","))) for pair in line.split()]
  labels = [text.text for text in root.iter(f"{SVG}text")]
  dashed = [x for x in root.iter(f"{SVG}path") if x.get("stroke-dasharray")]
  return places, labels, dashed


def test_a_line_goes_from_corner_to_corner():
  places, labels, dashed = _read([(0, 1.0), (50, 2.0), (100, 3.0)], [25, 100])
  (left, low), middle, (right, high) = places
  assert middle == pytest.approx(
    ((left + right) / 2, (low + high) / 2), abs=0.1
  )
  assert low > high  # on paper, y grows downwards
  assert labels[0] == "a < b"
  assert {"1", "2", "3", "0", "100"} <= set(labels)
  (mark,) = dashed  # at 25; the one at the very end would hide an axis
  x = float(re.match(r"M([\d.]+) ", mark.get("d"))[1])
  assert x == pytest.approx(left + (right - left) / 4, abs=0.1)


def test_values_over_decades_get_a_logarithmic_axis():
  places, labels, _ = _read([(1, 100.0), (2, 1.0), (3, 0.01)])
  (_, first), (_, second), (_, third) = places
  assert second == pytest.approx((first + third) / 2, abs=0.1)
  assert {"a < b (logarithmic)", "100", "1", "0.01"} <= set(labels)
  _, labels, _ = _read([(1, 0.15), (2, 9.0)])  # with one power of ten alone
  assert {"0.2", "0.5", "1", "2", "5"} <= set(labels)


def test_a_rate_begins_at_zero():
  points = [(0, 0.0), (1, 100.0), (2, 0.01), (3, 50.0)]
  places, labels, _ = _read(points[1:], from_zero=True)
  assert "0" in labels
  wanted, _, _ = _read(points)  # where a zero itself is the lowest
  assert places[-1][1] == pytest.approx(wanted[-1][1], abs=0.1)


def test_a_constant_is_a_level_line():
  for value in (0.0, 3.0, -2.0):
    places, _, _ = _read([(1, value), (2, value)])
    assert places[0][1] == places[1][1]


def test_what_is_not_finite_is_left_out():
  points = [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)]
  assert len(_read(points)[0]) == 2
  assert curves.svg("x", points[:2]) == curves.svg("x", []) == ""


def test_many_points_are_averaged():
  places, _, _ = _read([(i, float(i % 2)) for i in range(10_000)])
  assert 300 < len(places) <= 600
  assert len({y for _, y in places}) <= 3  # means of all, not some of them


def test_large_numbers_are_short():
  _, labels, _ = _read([(0, 0.0), (10_000_000, 48_000.0)])
  assert {"2M", "10M", "20k"} <= set(labels)


def test_many_restarts_do_not_hide_the_curve():
  def heights(count):
    marks = [10 * i for i in range(1, count + 1)]
    _, _, dashed = _read([(0, 1.0), (9999, 2.0)], marks)
    assert len(dashed) == count
    return {re.search(r" (\d+)V(\d+)", x.get("d")).groups() for x in dashed}

  ((top, bottom),) = heights(5)
  ((short, end),) = heights(500)
  assert end == bottom
  assert int(bottom) - int(short) < (int(bottom) - int(top)) / 10
