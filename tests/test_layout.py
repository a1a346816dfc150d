"""The layout: arrows point down, without circles, and no room is too large."""

import ast
import pathlib

import arflow_jax

PACKAGE = pathlib.Path(arflow_jax.__file__).parent
# From the ground up; what stands on one line may not know each other, but for
# the services, which may as long as there is no circle.
FLOORS = (
  ("errors",),
  ("values",),
  ("config", "paths", "console", "signals"),
  ("kernels",),
  ("flow", "nn"),
  ("arflow", "flowar"),
  ("branches", "parallel"),
  ("data", "training", "sampling", "metrics", "analysis"),
)
SERVICES = FLOORS[-1]


def _rooms():
  """The lines of each room, and the rooms that each imports."""
  lines, known = {}, {}
  for path in PACKAGE.rglob("*.py"):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    text = path.read_text()
    lines[room] = lines.get(room, 0) + len(text.splitlines())
    known.setdefault(room, set())
    for node in ast.walk(ast.parse(text)):
      names = []
      if isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module]
        if node.module == "arflow_jax":
          names = [f"arflow_jax.{alias.name}" for alias in node.names]
      elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      for name in names:
        if name.startswith("arflow_jax."):
          known[room].add(name.split(".")[1])
    known[room].discard(room)
  return lines, known


LINES, KNOWN = _rooms()
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}


def test_arrows_point_down():
  wrong = [
    f"{room} -> {other}"
    for room, others in KNOWN.items()
    for other in others
    if room in FLOOR  # all else is a main and stands on top
    and FLOOR.get(other, len(FLOORS)) >= FLOOR[room]
    and not (room in SERVICES and other in SERVICES)
  ]
  assert wrong == []


def test_services_make_no_circle():
  known = {room: KNOWN[room] & set(SERVICES) for room in SERVICES}
  while known:
    free = [room for room, others in known.items() if not others & set(known)]
    assert free, known
    for room in free:
      del known[room]


def test_no_room_holds_a_fifth_of_the_lines():
  whole = sum(LINES.values())
  assert {r: n for r, n in LINES.items() if n > whole / 5} == {}


def test_every_room_is_in_the_picture():
  assert set(FLOOR) <= set(KNOWN)
  folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
  assert folders <= set(FLOOR)
  mains = {
    path.name for path in PACKAGE.glob("*.py") if "cli.run(" in path.read_text()
  }
  readme = (PACKAGE.parent / "README.md").read_text()
  picture = readme.split("## What is inside")[1].split("```")[1]
  for name in {f"{folder}/" for folder in folders} | mains:
    assert name in picture, name
