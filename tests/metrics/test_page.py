"""The page of a run: of a whole one, a killed one, an earlier one, none."""

import errno
import json
import math
import re
import shutil

import pytest
from etils import epath
from PIL import Image

from arflow_jax import config as config_lib
from arflow_jax import report
from arflow_jax.cli import execute
from arflow_jax.errors import ConfigError
from arflow_jax.metrics import page
from tests.tiny import tiny_config

TITLES = [
  "loss",
  "gradient norm, before clipping",
  "learning rate",
  "images/s",
  "goodput, % of the time since the first launch",
]


@pytest.fixture
def folder(tmp_path):
  """What a run leaves that was killed twice: no checkpoint is needed."""
  lines = [
    {"step": 10 * i, "loss": 1 / i, "grad_norm": 2.0, "goodput": 0.5}
    | {"images_per_second": 100.0 + i, "input_wait": 0.01}
    for i in range(1, 6)
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (tmp_path / "metrics.jsonl").write_text(text + '{"step": 60, "lo')
  hardware = {"devices": 4, "kind": "TPU <x>", "processes": 2, "jax": "1"}
  launches = [{"launch": 1e9 + s, "step": s} | hardware for s in (0, 20, 40)]
  text = "".join(json.dumps(line) + "\n" for line in launches)
  (tmp_path / "launches.jsonl").write_text(text)
  config = tiny_config(steps=100)
  (tmp_path / "config.json").write_text(config_lib.dumps(config))
  (tmp_path / "pictures").mkdir()
  for step in (*range(1, 40), 50):
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / f"{step}.png")
  return tmp_path


def _titles(text):
  """Those of its curves."""
  return re.findall(r'font-size="13">([^<]*)<', text)


def test_a_killed_run_shows_all_that_is_there(folder, capsys):
  assert execute(report, [f"--workdir={folder}"]) == 0
  out = folder / "report.html"
  assert capsys.readouterr().out == f"{out}\n"
  text = out.read_text()
  assert _titles(text) == [*TITLES, "input wait, % of the step time"]
  assert "<td>50 of 100</td>" in text
  assert "4 x TPU &lt;x&gt; in 2 process(es)" in text  # escaped
  assert "<td>2001-09-09 01:46:40</td>" in text
  assert text.count("stroke-dasharray") == 2 * len(_titles(text))
  assert "<td>model.width</td><td>16</td>" in text
  shown = re.findall(r"<figcaption>step (\d+)<", text)
  assert (len(shown), shown[0], shown[-1]) == (12, "1", "50")
  assert text.count("data:image/png;base64,") == 12
  assert execute(report, [f"--workdir={folder}"]) == 0  # again, while it trains


@pytest.mark.parametrize(
  "run", ["sampling/tiny_run", "training/run_of_format_2"]
)
def test_a_run_of_an_earlier_version_has_a_page(run, tmp_path):
  shutil.copytree(f"tests/{run}", tmp_path / "run")
  lines = [{"step": i, "loss": 1 / i} for i in (1, 2, 3)]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  out = str(tmp_path / "page.html")
  page.write(str(tmp_path / "run"), out)
  assert "no records yet" in (tmp_path / "page.html").read_text()
  (tmp_path / "run" / "metrics.jsonl").write_text(text)
  page.write(str(tmp_path / "run"), out, overwrite=True)
  text = (tmp_path / "page.html").read_text()
  assert _titles(text) == ["loss", "learning rate"]
  assert "<td>branch</td><td>arflow</td>" in text
  assert not (tmp_path / "run" / "report.html").exists()


def test_damaged_files_leave_a_page_of_the_others(folder):
  (folder / "config.json").write_text("{")
  (folder / "launches.jsonl").write_bytes(b'\xff\n[]\n{"step": "x"}\n')
  page.write(str(folder))
  text = (folder / "report.html").read_text()
  assert _titles(text)[:2] == TITLES[:2]
  assert "learning rate" not in _titles(text)
  assert "Launches" not in text


def test_without_a_run_there_is_one_clear_line(tmp_path):
  with pytest.raises(ConfigError, match=r"--workdir=.* holds no run"):
    page.write(str(tmp_path))
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [[1], [2, 2], [3, 3, 3]])
def test_the_first_record_of_a_run_makes_a_page(folder, steps):
  lines = [{"step": step, "loss": 2.0, "grad_norm": 1e308} for step in steps]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  page.write(str(folder))
  text = (folder / "report.html").read_text()
  assert _titles(text) == (["learning rate"] if steps != [1] else [])


def test_a_page_of_odd_numbers(folder):
  lines = [
    {"step": 1, "loss": math.nan, "goodput": math.inf},
    {"step": 2, "loss": -math.inf, "goodput": 1e308},
    {"step": 3, "loss": 1e308, "goodput": 0.5},
    {"step": 4, "loss": -1e308, "goodput": -1e308},
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  lines = [
    {"launch": math.nan, "step": 0},
    {"launch": 1e300, "step": 0},
    {"launch": 1e9, "step": math.inf},
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "launches.jsonl").write_text(text)
  page.write(str(folder))
  text = (folder / "report.html").read_text()
  assert _titles(text) == ["learning rate"]
  assert "Launches" not in text


def test_names_and_settings_are_escaped(folder):
  hostile = folder / "<script>alert('1')<"
  hostile.mkdir()
  shutil.copy(folder / "metrics.jsonl", hostile)
  config = tiny_config(data__dir="<script>alert('2')</script>")
  (hostile / "config.json").write_text(config_lib.dumps(config))
  page.write(str(hostile))
  text = (hostile / "report.html").read_text()
  assert "alert(&#x27;1&#x27;)" in text
  assert "alert(&#x27;2&#x27;)" in text
  assert "<script" not in text


def test_other_files_are_not_replaced(folder, capsys):
  page.write(str(folder), str(folder / "of another run.html"))
  for name in ("mine.html", "report.html"):
    (folder / name).write_text("mine")
  for name in ("mine.html", "of another run.html", "report.html"):
    out = folder / name
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=f"--out=.*{name} exists"):
      page.write(str(folder), str(out))
    assert out.read_bytes() == before
    args = [f"--workdir={folder}", f"--out={out}", "--overwrite"]
    assert execute(report, args) == 0
    assert "<svg" in out.read_text()


def test_a_page_that_cannot_be_written_leaves_nothing(
  folder, monkeypatch, capsys
):
  before = sorted(folder.iterdir())

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(type(epath.Path(folder)), "replace", full)
  assert execute(report, [f"--workdir={folder}"]) == 1
  said = capsys.readouterr().err
  assert said == f"error: {folder}/report.html: No space left on device\n"
  assert sorted(folder.iterdir()) == before


def test_what_is_in_the_way_of_the_page_fails_no_run(folder, capsys):
  page.finish(str(folder))
  assert capsys.readouterr().out == f"its curves are in {folder}/report.html\n"
  (folder / "report.html").write_text("mine")
  page.finish(str(folder))
  said = capsys.readouterr().out
  assert "no page of curves was written: " in said
  assert "report.html is not a page of a run" in said
