"""The benchmark: what it counts, where its batches come from, its report."""

import dataclasses
import json

import pytest

from arflow_jax.analysis import bench_report, benchmark
from arflow_jax.errors import ConfigError
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def speeds():
  return benchmark.measure(tiny_config(), ["train", "sample"], repeats=3)


def test_images_are_counted_not_sequences(speeds):
  assert speeds["train"].images == 4 * 5
  assert speeds["sample"].images == 8
  for speed in speeds.values():
    assert len(speed.step_times) == len(speed.product_rates) == 3
    assert min(speed.step_times) > 0
    # At least the parameters and what they are multiplied with.
    assert speed.peak_memory > 4 * 15_396


def test_batches_come_from_the_config_or_else_from_noise(speeds):
  assert speeds["train"].input_source == "digits"
  assert speeds["train"].input_wait >= 0
  assert speeds["sample"].input_wait is None
  config = tiny_config(data__source="latents")
  speed = benchmark.measure(config, ["train"], repeats=1)["train"]
  assert speed.input_source == "random, for latents"


def test_share_is_the_median_of_the_pairs():
  speed = benchmark.Speed(
    1.0, [1.0, 2.0, 4.0], 10, 100, [50.0, 200.0, 100.0], 0
  )
  assert speed.share == 0.25  # of 2.0, 0.25 and 0.25
  assert speed.summary()["images_per_second"] == 5


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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"programs": 3}'])
def test_other_files_are_refused(tmp_path, text):
  path = tmp_path / "a.json"
  path.write_text(text)
  with pytest.raises(ConfigError, match="no result of this benchmark"):
    bench_report.read(str(path))
