"""Judges the images of a run: how many are recognised, how far from real ones.

  python -m arflow_jax.evaluate --workdir=DIR --guidance=1.0,1.5,2.5

Per guidance, the share of samples to which a classifier trained on the real
training images gives the asked class, and the Frechet distance in pixel space
to the images the model never saw, beside that of real training images.
"""

from arflow_jax import cli
from arflow_jax.errors import ConfigError


def define(flags: cli.Flags) -> None:
  flags.workdir()
  flags.define(
    "list", "guidance", ["1.0", "1.5"], "Guidance scales to compare."
  )
  flags.define(
    "integer",
    "num_samples",
    None,
    "Images at each scale; the run's own number if unset.",
    lower_bound=1,
  )
  flags.define(
    "multi_string", "set", [], "KEY=VALUE of the run's sample config."
  )
  flags.seed()


def main(args: cli.Args) -> None:
  try:
    scales = [float(scale) for scale in args.guidance]
  except ValueError as error:
    raise ConfigError(f"--guidance={args.guidance}: {error}") from None
  if not scales:
    raise ConfigError("--guidance names no scale; give one, such as 1.5")
  from arflow_jax.metrics import report
  from arflow_jax.sampling import run

  report.evaluate_run(
    args.workdir,
    scales,
    run.parse_overrides(args.set),
    num_samples=args.num_samples,
    seed=args.seed,
  )


if __name__ == "__main__":
  cli.run(__name__)
