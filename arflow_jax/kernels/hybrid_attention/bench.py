"""Hybrid attention alone: times on this machine, or figures for a TPU.

  python -m arflow_jax.kernels.hybrid_attention.bench --out=attention.json
  python -m arflow_jax.kernels.hybrid_attention.bench --topology=v5e

The first times every implementation that this machine can run, in turn. The
second needs no TPU but libtpu: what its compiler says of each implementation,
and of the whole ARFlow-XL/2 train step with each.
"""

import tempfile

from absl import flags

from arflow_jax import cli
from arflow_jax.errors import ConfigError


def main() -> None:
  args = flags.FLAGS
  if args.topology:
    from arflow_jax.analysis import tpu

    with tempfile.TemporaryDirectory() as dump:
      tpu.prepare(dump)  # before anything uses JAX
      _report(args, dump)
  else:
    _report(args, None)


def _numbers(flag: str) -> list[int]:
  values = flags.FLAGS[flag].value
  if not values or not all(v.isdecimal() and int(v) > 0 for v in values):
    raise ConfigError(
      f"--{flag}={','.join(values)} must be positive whole numbers, such as"
      f" --{flag}={flags.FLAGS[flag].default[0]}"
    )
  return [int(value) for value in values]


def _report(args, dump: str | None) -> None:
  from arflow_jax.analysis import attention_bench as bench
  from arflow_jax.analysis import bench_report
  from arflow_jax.kernels.hybrid_attention import cases

  if args.out:
    bench_report.check_output(args.out, args.overwrite)
  tokens, images = _numbers("tokens"), _numbers("images")
  batches = _numbers("step_batch")
  bench.check_step(args.config, batches)
  for size in args.sizes:
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
    measured = bench.timed(problems, args.implementations, args.repeats)
  else:
    measured = bench.static(problems, args.implementations, args.topology, dump)
  print(bench.table(measured))
  if dump is not None and args.step:
    measured["step"] = bench.steps(args.config, args.topology, batches, dump)
    print("\n" + bench.step_table(measured["step"]))
  if args.out:
    bench_report.write(args.out, measured)
    print(args.out)


if __name__ == "__main__":
  flags.DEFINE_list("sizes", "S,B,L,XL", "Published networks.")
  flags.DEFINE_list("tokens", "256,64", "Tokens an image.")
  flags.DEFINE_list("images", "5,1", "Images in a sequence.")
  flags.DEFINE_integer("batch", 8, "Sequences.", lower_bound=1)
  flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of q, k, v.")
  flags.DEFINE_enum(
    "form",
    "fused",
    ["fused", "plain"],
    "With norms and output gate, as ARFlow calls it, or without.",
  )
  flags.DEFINE_list(
    "implementations",
    None,
    "Names; by default all that can run here, or xla,pallas_tpu.",
  )
  flags.DEFINE_integer("repeats", 10, "Timed calls of each.", lower_bound=3)
  flags.DEFINE_enum(
    "topology", None, ["v5e", "v5p", "v6e"], "Compile for this TPU instead."
  )
  flags.DEFINE_bool("step", True, "With --topology: the train step as well.")
  flags.DEFINE_list("step_batch", "256", "Its batch sizes, on 256 chips.")
  cli.define_config("configs/arflow.py:imagenet256-xl2")
  flags.DEFINE_string("out", None, "X.json to keep the figures in.")
  flags.DEFINE_bool("overwrite", False, "Replace an existing output.")
  cli.run(main)
