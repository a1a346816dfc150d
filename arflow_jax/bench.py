"""Times the train step of a config beside the machine's matrix-product rate.

  python -m arflow_jax.bench --config=configs/arflow.py:imagenet128-s2 \\
    --config.batch_size=4

Random images stand in for the data. The whole step is timed, update included;
the share is that of the rate of a 2048-cube product measured in the same run.
"""

from absl import flags

from arflow_jax import cli


def main() -> None:
  from arflow_jax.analysis import benchmark

  speed = benchmark.train_step_speed(flags.FLAGS.config, flags.FLAGS.repeats)
  print(benchmark.report(speed))


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_integer("repeats", 10, "Timed steps.", lower_bound=1)
  cli.run(main)
