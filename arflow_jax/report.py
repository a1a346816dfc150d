"""Writes a page with the curves and pictures of a run, also while it trains.

  python -m arflow_jax.report --workdir=DIR

The page needs no other file: curves of loss, gradient norm, learning rate,
images/s and goodput, the pictures drawn on the way (--config.log.pictures of
the trainer), the launches and the config. The trainer writes it at the end.
"""

from arflow_jax import cli, console


def define(flags: cli.Flags) -> None:
  flags.workdir()
  text = "X.html to write; WORKDIR/report.html if unset."
  flags.define("path", "out", None, text)
  flags.define("bool", "overwrite", False, "Replace an existing output.")


def main(args: cli.Args) -> None:
  import jax

  # An accelerator of this machine may be at work for the run.
  jax.config.update("jax_platforms", "cpu")
  from arflow_jax.metrics import page

  console.say(page.write(args.workdir, args.out, overwrite=args.overwrite))


if __name__ == "__main__":
  cli.run(__name__)
