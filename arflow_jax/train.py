"""Trains a model, or goes on with a run that was stopped.

  python -m arflow_jax.train --config=configs/arflow.py:digits --workdir=DIR

Any config key can be set: --config.optimizer.peak_lr=1e-3. Launching the same
command again resumes from the newest checkpoint. At the end WORKDIR/report.html
has the curves of the run; `python -m arflow_jax.report` makes it at any time.
"""

from arflow_jax import cli
from arflow_jax.errors import STOPPED


def define(flags: cli.Flags) -> None:
  flags.config()
  flags.workdir()


def main(args: cli.Args) -> int:
  from arflow_jax.analysis import utilization
  from arflow_jax.metrics import page
  from arflow_jax.sampling import pictures
  from arflow_jax.training import loop

  done = loop.train(
    args.config,
    args.workdir,
    ideal_step=utilization.ideal_step,
    makes=[pictures.Pictures],
  )
  if done < args.config.steps:
    return STOPPED
  page.finish(args.workdir)
  return 0


if __name__ == "__main__":
  cli.run(__name__)
