"""Draws images with the averaged weights of a run, also while it trains.

  python -m arflow_jax.sample --workdir=DIR --labels=0-9 --per_label=10 \\
    --guidance=1.5 --out=samples.png

The run knows its config. --set changes sampling settings for this call:
--set=num_steps=50 --set=method=ode. After an interruption the same command goes
on with the images it has drawn, which lie in OUT.shards until it is finished.
"""

from arflow_jax import cli


def define(flags: cli.Flags) -> None:
  flags.workdir()
  flags.define(
    "path",
    "out",
    None,
    "X.png (grid), X.npz or a folder of PNGs.",
    required=True,
  )
  flags.define("string", "labels", "0-9", "Classes, such as 0-3,7.")
  flags.define(
    "integer", "per_label", 10, "Images of each class.", lower_bound=1
  )
  flags.define("float", "guidance", None, "Guidance scale; 1 means none.")
  flags.define(
    "multi_string", "set", [], "KEY=VALUE of the run's sample config."
  )
  flags.seed()
  flags.define("bool", "overwrite", False, "Replace an existing output.")


def main(args: cli.Args) -> None:
  from arflow_jax.parallel import processes
  from arflow_jax.sampling import draw, run

  draw.sample_to_file(
    args.workdir,
    args.out,
    labels=args.labels,
    per_label=args.per_label,
    overrides=run.parse_overrides(args.set, args.guidance),
    seed=args.seed,
    overwrite=args.overwrite,
  )
  processes.say(args.out)


if __name__ == "__main__":
  cli.run(__name__)
