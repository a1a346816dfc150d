"""The Python of the package's README runs as it stands."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_python_of_the_readme():
  text = (ROOT / "arflow_jax" / "README.md").read_text()
  blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  assert len(blocks) >= 4
  tiny = str(ROOT / "tests" / "sampling" / "tiny_run")
  names = {}
  for block in blocks:
    exec(block.replace("runs/digits", tiny), names)
  assert names["images"].shape == (2, 8, 8, 1)
