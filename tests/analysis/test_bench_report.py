"""The benchmark's table, file and ratios."""

import dataclasses
import json

import pytest

from arflow_jax.analysis import bench_report
from arflow_jax.analysis.benchmark import Speed
from arflow_jax.errors import ConfigError
from tests.tiny import tiny_config


@pytest.fixture
def speeds():
  train = Speed(1.0, [1.0, 2.0, 4.0], 10, 100, [50.0, 200.0, 100.0], 2**20)
  train = dataclasses.replace(train, input_wait=0.001, input_source="digits")
  return {"train": train, "sample": Speed(2.0, [0.5], 8, 40, [80.0], 2**21)}


def test_the_file_holds_what_the_table_shows(speeds, tmp_path):
  config = tiny_config()
  path = str(tmp_path / "new" / "a.json")
  bench_report.check_output(path, overwrite=False)
  measured = bench_report.record(speeds, config)
  bench_report.write(path, measured)
  assert bench_report.read(path) == json.loads(json.dumps(measured))
  assert measured["config"]["model"]["width"] == 16
  printed = bench_report.table(speeds, "float32")
  for speed in speeds.values():
    assert f"{speed.step_time:.4f} s" in printed
    assert f"{speed.share:.1%}" in printed
  with pytest.raises(ConfigError, match="give --overwrite"):
    bench_report.check_output(path, overwrite=False)
  bench_report.check_output(path, overwrite=True)


def test_ratios_are_this_run_over_the_other(speeds):
  train = speeds["train"]
  slower = dataclasses.replace(
    train, step_times=[2 * t for t in train.step_times]
  )
  ours = bench_report.record({"train": slower}, tiny_config())
  theirs = bench_report.record(speeds, tiny_config())
  lines = {
    line.split()[0]: line.split()[-1]
    for line in bench_report.compare(ours, theirs).splitlines()
  }
  assert lines["step_time"] == "2.000"
  assert lines["images_per_second"] == "0.500"
  assert lines["flops"] == "1.000"
  other = bench_report.record({"sample": speeds["sample"]}, tiny_config())
  assert "nothing to compare" in bench_report.compare(ours, other)
  theirs["device"] = "8 x TPU"
  assert "against 8 x TPU" in bench_report.compare(ours, theirs)
  wider = bench_report.record(speeds, tiny_config(model__width=32))
  assert "note: model.width 16 against 32" in bench_report.compare(ours, wider)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "[]",
    "{}",
    '{"programs": 3}',
    '{"config": {}, "programs": {"train": {"step_time": "fast"}}}',
  ],
)
def test_other_files_are_refused(tmp_path, text):
  path = tmp_path / "a.json"
  path.write_text(text)
  with pytest.raises(ConfigError, match="no result of this benchmark"):
    bench_report.read(str(path))
