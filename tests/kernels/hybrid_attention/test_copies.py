"""How copies of arrays of one size are found in a compiled program."""

import math
import re


def copies(text: str, elements: int) -> dict[str, tuple[int, ...]]:
  """Shapes of copies and transposes in the text of a program, by name."""
  moved = {}
  pattern = r"\s*(?:ROOT )?%([\w.\-]+) = \w+\[([\d,]+)\].* (copy|transpose)\("
  for line in text.splitlines():
    match = re.match(pattern, line)
    shape = tuple(map(int, match[2].split(","))) if match else ()
    if match and math.prod(shape) == elements:
      moved[match[1]] = shape
  return moved


def test_copies_of_one_size():
  text = """
  %copy.1 = f32[2,4]{0,1} copy(%x), backend_config={"estimated_cycles":"1000"}
  ROOT %transpose.2 = f32[2,5]{0,1} transpose(%y)
  """
  assert copies(text, 8) == {"copy.1": (2, 4)}
  assert copies(text, 10) == {"transpose.2": (2, 5)}
  assert copies(text, 9) == {}
