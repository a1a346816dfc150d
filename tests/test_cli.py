"""What all mains share: flags, config files, one-line errors, exit codes."""

import pytest

from arflow_jax import bench, cli, sample, train
from arflow_jax.training import loop

CONFIG = "--config=configs/arflow.py:digits"


def test_a_hint_only_where_something_is_near(capsys):
  assert cli.execute(train, [CONFIG, "--bogus=1", "--workdir=x"]) == 2
  assert capsys.readouterr().err == "error: unknown flag --bogus\n"
  assert cli.execute(bench, [CONFIG, "--bogus=1"]) == 2
  assert capsys.readouterr().err == "error: unknown flag --bogus\n"


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("HOME", str(tmp_path))
  seen = []
  monkeypatch.setattr(
    loop, "train", lambda *args, **_: seen.append(args[1]) or 10**9
  )
  assert cli.execute(train, [CONFIG, "--workdir=~/runs/x"]) == 0
  assert seen == [str(tmp_path / "runs" / "x")]
  args = ["--workdir=~/none", "--out=~/x.txt"]
  assert cli.execute(sample, args) == 1
  assert f"--out={tmp_path}/x.txt must end in" in capsys.readouterr().err
  assert cli.execute(train, ["--config=~/c.py", "--workdir=x"]) == 2
  assert f"{tmp_path}/c.py does not exist" in capsys.readouterr().err
  assert cli.execute(train, [CONFIG, "--workdir=~nobody-here/x"]) == 2
  assert "~nobody-here is no user of this machine" in capsys.readouterr().err


def test_a_config_file_that_fails_is_one_clear_line(tmp_path, capsys):
  path = tmp_path / "mine.py"
  path.write_text("def get_config():\n  return nothing\n")
  assert cli.execute(train, [f"--config={path}", "--workdir=x"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "mine.py: NameError: name 'nothing' is not defined" in line


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      "config = config.to_dict()",
      "returned dict, not a ConfigDict; begin",
    ),
    ("config = None", "returned NoneType, not a ConfigDict; begin with"),
    ("del config.ema, config.log.every", "lacks the keys ema.decay, log.every"),
    ("del config.model, config.sample", "the keys model, sample.block_size"),
    ("config.model.kernel = [3]", "model.kernel of {file} is of type list"),
    (
      "config.model.kernel = None",
      "model.kernel of {file} is of type NoneType",
    ),
    ("raise SystemExit(3)", "{file}: SystemExit: 3"),
  ],
)
def test_a_config_file_is_checked_for_its_form(
  tmp_path, capsys, change, message
):
  file = tmp_path / "own.py"
  lines = [f"config = from_file('{CONFIG.partition('=')[2]}').unlock()", change]
  file.write_text(
    "from arflow_jax.config import from_file\ndef get_config():\n  "
    + "\n  ".join([*lines, "return config"])
  )
  assert cli.execute(train, [f"--config={file}", "--workdir=x"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message.format(file=file) in line


@pytest.mark.parametrize(
  ("error", "code", "line"),
  [
    (FloatingPointError("loss is nan at step 3"), 1, "loss is nan at step 3"),
    (OSError("No space left"), 1, "No space left"),
    *(
      (error, 1, f"a batch or block is too large for the memory: {error}")
      for error in (
        MemoryError("Unable to allocate 9 TiB"),
        RuntimeError("INTERNAL: Out of memory allocating 9 bytes."),
      )
    ),
    (KeyboardInterrupt(), 130, "interrupted"),
  ],
)
def test_what_stops_a_run_is_one_clear_line(
  error, code, line, capsys, monkeypatch
):
  def fail(config, workdir, **_):
    raise error

  monkeypatch.setattr(loop, "train", fail)
  assert cli.execute(train, [CONFIG, "--workdir=x"]) == code
  assert capsys.readouterr().err == f"error: {line}\n"


def test_values_reach_the_config_with_their_types(monkeypatch):
  seen = []
  monkeypatch.setattr(
    loop, "train", lambda *args, **_: seen.append(args) or 10**9
  )
  args = [
    "--config.optimizer.peak_lr=1",
    "--config=configs/flowar.py:digits",
    "--config.data.flip",
    "--noconfig.model.cross_attention",
    "--config.model.scales=(2, 4, 8)",
    "--config.sample.scale_steps=4,4,4,6",
    "--config.data.dir",
    "123",
    "--config.optimizer.decay_steps=7",
    "--config.checkpoint.keep_every=None",
    "--workdir=x",
  ]
  assert cli.execute(train, args) == 0
  assert cli.execute(train, [CONFIG, "--workdir=y"]) == 0
  (config, workdir), (other, elsewhere) = seen
  assert (workdir, elsewhere) == ("x", "y")
  assert config.optimizer.peak_lr == 1.0
  assert isinstance(config.optimizer.peak_lr, float)
  assert config.data.flip is True
  assert config.model.scales == (2, 4, 8)
  assert config.sample.scale_steps == (4, 4, 4, 6)
  assert config.data.dir == "123"
  assert config.optimizer.decay_steps == 7
  assert config.checkpoint.keep_every is None
  # Nothing is left of one call in the next.
  assert other.branch == "arflow"
  assert other.data.flip is False
  assert other.data.dir is None
