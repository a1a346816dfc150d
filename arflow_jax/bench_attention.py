"""Hybrid attention alone: times on this machine, or figures for a TPU.

  python -m arflow_jax.bench_attention --out=attention.json
  python -m arflow_jax.bench_attention --topology=v5e

The first times every implementation that this machine can run, in turn. The
second needs no TPU but libtpu: what its compiler says of each implementation,
and of the whole ARFlow-XL/2 train step with each.
"""

from arflow_jax import cli
from arflow_jax.errors import ConfigError

_LARGEST = 65_536  # of any number of tokens, images or items
_NUMBERS = {"tokens": "256,64", "images": "5,1", "step_batch": "256"}


def define(flags: cli.Flags) -> None:
  flags.define("list", "sizes", "S,B,L,XL", "Published networks.")
  flags.define("list", "tokens", _NUMBERS["tokens"], "Tokens an image.")
  flags.define("list", "images", _NUMBERS["images"], "Images in a sequence.")
  flags.define(
    "integer", "batch", 8, "Sequences.", lower_bound=1, upper_bound=_LARGEST
  )
  flags.define(
    "enum",
    "dtype",
    "bfloat16",
    "Of q, k, v.",
    enum_values=["bfloat16", "float32"],
  )
  flags.define(
    "enum",
    "form",
    "fused",
    "With norms and output gate, as ARFlow calls it, or without.",
    enum_values=["fused", "plain"],
  )
  flags.define(
    "list",
    "implementations",
    None,
    "Names; by default all that can run here, or xla,pallas_tpu.",
  )
  flags.define(
    "integer",
    "repeats",
    10,
    "Timed calls of each.",
    lower_bound=3,
    upper_bound=10_000,
  )
  flags.define(
    "enum",
    "topology",
    None,
    "Compile for this TPU instead.",
    enum_values=["v5e", "v5p", "v6e"],
  )
  flags.define("bool", "step", True, "With --topology: the train step as well.")
  flags.define(
    "list",
    "step_batch",
    _NUMBERS["step_batch"],
    "Its batch sizes, on 256 chips.",
  )
  flags.config("configs/arflow.py:imagenet256-xl2")
  flags.define("path", "out", None, "X.json to keep the figures in.")
  flags.define("bool", "overwrite", False, "Replace an existing output.")


def main(args: cli.Args) -> None:
  if args.topology:
    from arflow_jax.analysis import tpu

    with tpu.schedules() as dump:  # before anything uses JAX
      _report(args, dump)
  else:
    from arflow_jax.parallel import agreement

    agreement.start()
    _report(args, None)


def _numbers(args: cli.Args, flag: str) -> list[int]:
  values = getattr(args, flag)
  if not values or not all(
    v.isascii() and v.isdecimal() and int(v) > 0 for v in values
  ):
    raise ConfigError(
      f"--{flag}={','.join(values)} must be positive whole numbers, such as"
      f" --{flag}={_NUMBERS[flag]}"
    )
  numbers = [int(value) for value in values]
  if max(numbers) > _LARGEST:
    raise ConfigError(
      f"--{flag}={max(numbers)} is more than this benchmark times; at most"
      f" {_LARGEST}"
    )
  return numbers


def _report(args: cli.Args, dump: str | None) -> None:
  from arflow_jax.analysis import attention_bench as bench
  from arflow_jax.analysis import attention_static as static
  from arflow_jax.analysis import bench_report
  from arflow_jax.kernels.hybrid_attention import cases
  from arflow_jax.parallel import agreement, processes

  if args.out:
    agreement.by_one(
      lambda: bench_report.check_output(args.out, args.overwrite)
    )
  tokens, images, batches = (_numbers(args, flag) for flag in _NUMBERS)
  static.check_step(args.config, batches)
  for size in args.sizes or [""]:
    if size not in cases.PUBLISHED_HEADS:
      raise ConfigError(
        f"--sizes={size} is unknown; choose from {list(cases.PUBLISHED_HEADS)}"
      )
  problems = bench.problems(
    [
      cases.published(size, n, s, args.batch)
      for size in args.sizes
      for n in tokens
      for s in images
    ],
    args.dtype,
    args.form,
  )
  if dump is None:
    measured = agreement.together(
      lambda: bench.timed(problems, args.implementations, args.repeats)
    )
  else:
    measured = static.compiled(
      problems, args.implementations, args.topology, dump
    )
  processes.say(bench.table(measured))
  if dump is not None and args.step:
    measured["step"] = static.steps(args.config, args.topology, batches, dump)
    processes.say("\n" + bench.step_table(measured["step"]))
  if args.out:
    agreement.by_one(lambda: bench_report.write(args.out, measured))
    processes.say(args.out)


if __name__ == "__main__":
  cli.run(__name__)
