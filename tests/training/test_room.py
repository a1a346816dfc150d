"""The room that checkpoints need is said before it is needed."""

import types

import pytest

from arflow_jax.training import room
from tests.tiny import tiny_config


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
  def announce(free, **settings):
    usage = lambda folder: types.SimpleNamespace(free=free)
    monkeypatch.setattr("shutil.disk_usage", usage)
    config = tiny_config(checkpoint__keep=2, steps=9, **settings)
    room.announce(1_000_000, str(tmp_path), config)
    return capsys.readouterr().out.replace(str(tmp_path), "DIR").splitlines()

  return announce


def test_need_and_room_are_one_line(said):
  assert said(5_000_000) == [
    "checkpoints of up to 1.00MB, 3 at a time, need 3.00MB;"
    " 5.00MB are free in DIR"
  ]


def test_too_little_room_is_a_warning(said, tmp_path):
  line, warning = said(500_000, checkpoint__keep_every=2)
  assert line.startswith(
    "checkpoints of up to 1.00MB, 3 at a time and one for good every 2 steps,"
    " need 7.00MB; 500kB are"
  )
  assert warning == (
    "warning: DIR lacks 6.50MB for them; make room there, or lower"
    " checkpoint.keep"
  )
  for step in (1, 2):  # those that are there need no more
    (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
  assert len(said(1_000_000)) == 1
  assert len(said(999_999)) == 2


def test_a_bucket_has_no_end(monkeypatch, capsys):
  monkeypatch.setattr(room.listing, "steps", None)
  room.announce(1_000_000, "gs://bucket/run", tiny_config(checkpoint__keep=2))
  assert capsys.readouterr().out == (
    "checkpoints of up to 1.00MB, 3 at a time, need 3.00MB\n"
  )
