"""Draws images with the averaged weights of a run, also while it trains.

  python -m arflow_jax.sample --workdir=DIR --labels=0-9 --per_label=10 \\
    --guidance=1.5 --out=samples.png

The run knows its config. --set changes sampling settings for this call:
--set=num_steps=50 --set=method=ode.
"""

from absl import flags

from arflow_jax import cli


def main() -> None:
  args = flags.FLAGS
  from arflow_jax.sampling import run

  run.sample_to_file(
    args.workdir,
    args.out,
    labels=args.labels,
    per_label=args.per_label,
    overrides=run.parse_overrides(args.set, args.guidance),
    seed=args.seed,
    overwrite=args.overwrite,
  )
  print(args.out)


if __name__ == "__main__":
  cli.define_workdir()
  flags.DEFINE_string("out", None, "X.png (grid), X.npz or a folder of PNGs.")
  cli.require("out")
  flags.DEFINE_string("labels", "0-9", "Classes, such as 0-3,7.")
  flags.DEFINE_integer("per_label", 10, "Images of each class.", lower_bound=1)
  flags.DEFINE_float("guidance", None, "Guidance scale; 1 means none.")
  flags.DEFINE_multi_string("set", [], "KEY=VALUE of the run's sample config.")
  flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
  flags.DEFINE_bool("overwrite", False, "Replace an existing output.")
  cli.run(main)
