"""The page of a run: of a whole one, a killed one, an earlier one, none."""

import json
import re
import shutil

import pytest
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
  page.write(str(tmp_path / "run"), out)
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


def test_other_files_are_not_replaced(folder):
  for name in ("mine.html", "mine.txt"):
    (folder / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"--out=.*{name}"):
      page.write(str(folder), str(folder / name))
    assert (folder / name).read_text() == "mine"


def test_what_is_in_the_way_of_the_page_fails_no_run(folder, capsys):
  page.finish(str(folder))
  assert capsys.readouterr().out == f"its curves are in {folder}/report.html\n"
  (folder / "report.html").write_text("mine")
  page.finish(str(folder))
  assert "no page of curves was written: --out=" in capsys.readouterr().out
