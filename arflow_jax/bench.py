"""Times a config's train step and sampler beside the matrix-product rate.

  python -m arflow_jax.bench --config=configs/arflow.py:imagenet128-s2 \\
    --config.batch_size=4 --config.sample.block_size=8 \\
    --config.sample.num_steps=20 --out=s2.json

Weights and images are random, the train step is whole, update included, and
sampling follows the config's own `sample` settings. --what=input times the data
pipeline alone, with config.data.workers loader processes, and tells its memory.
--compare prints the ratios of this run over an earlier --out. All processes of
a job share the train step; the sampler and the pipeline are timed on one alone.
"""

import dataclasses

from arflow_jax import cli


def define(flags: cli.Flags) -> None:
  flags.config()
  flags.define("list", "what", "train,sample", "Of train, sample, input.")
  flags.define(
    "integer",
    "repeats",
    10,
    "Timed calls of each.",
    lower_bound=10,
    upper_bound=10_000,
  )
  flags.define("path", "out", None, "X.json to keep the figures in.")
  flags.define("path", "compare", None, "X.json of another run, for ratios.")
  flags.define("bool", "overwrite", False, "Replace an existing output.")


def main(args: cli.Args) -> None:
  from arflow_jax.analysis import bench_report, benchmark, loading
  from arflow_jax.parallel import agreement, processes

  agreement.start(
    agreement.settings(args.config, what=args.what, repeats=args.repeats)
  )
  if args.out:
    agreement.by_one(
      lambda: bench_report.check_output(args.out, args.overwrite)
    )
  other = None
  if args.compare:
    other = agreement.by_one(lambda: bench_report.read(args.compare))
  speeds = benchmark.measure(args.config, args.what, args.repeats)
  if speeds:
    processes.say(bench_report.table(speeds, args.config.model.dtype))
  measured = bench_report.record(speeds, args.config)
  if "input" in args.what:
    found = loading.measure(args.config, args.repeats)
    processes.say(found.table())
    measured["input"] = dataclasses.asdict(found)
  if other:
    processes.say("\n" + bench_report.compare(measured, other))
  if args.out:
    agreement.by_one(lambda: bench_report.write(args.out, measured))
    processes.say(args.out)


if __name__ == "__main__":
  cli.run(__name__)
