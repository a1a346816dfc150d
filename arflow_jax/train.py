"""Trains a model, or goes on with a run that was stopped.

  python -m arflow_jax.train --config=configs/arflow.py:digits --workdir=DIR

Any config key can be set: --config.optimizer.peak_lr=1e-3. Launching the same
command again resumes from the newest checkpoint.
"""

from absl import flags

from arflow_jax import cli


def main() -> None:
  from arflow_jax.training import loop

  loop.train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
  cli.define_config()
  cli.define_workdir()
  cli.run(main)
