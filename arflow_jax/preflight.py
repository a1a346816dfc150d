"""Tells before a launch whether a config fits a TPU slice, and what it costs.

  python -m arflow_jax.preflight --config=configs/arflow.py:imagenet256-xl2 \\
    --config.batch_size=256 --config.mesh.fsdp=16 \\
    --config.model.dtype=bfloat16 --topology=v5e:16x16

Needs no TPU but libtpu, which compiles the true train step, or the true sampler
(--what=sample); nothing is run. Of a GPU (--topology=gpu:80GB) it says what a
formula tells of training. Exit code 0: it fits; 1: it does not.
"""

import contextlib

from arflow_jax import cli, console


def define(flags: cli.Flags) -> None:
  flags.config()
  flags.define(
    "string",
    "topology",
    None,
    "Such as v5e:16x16, v6e:4x4, v5p:4x4x8, tpu7x:4x4x4, two slices"
    " 2xv5e:16x16, or gpu:80GB.",
    required=True,
  )
  flags.define(
    "enum",
    "what",
    "train",
    "The program to compile: train or sample.",
    enum_values=["train", "sample"],
  )
  flags.define("path", "out", None, "X.json to keep the figures in.")
  flags.define("bool", "overwrite", False, "Replace an existing output.")


def main(args: cli.Args) -> int:
  from arflow_jax.analysis import chips

  place = chips.parse(args.topology)  # before JAX is imported
  from arflow_jax.analysis import bench_report, preflight_sample, tpu

  if args.what == "sample":
    preflight_sample.check(place)
  if args.out:
    bench_report.check_output(args.out, args.overwrite)
  prepared = tpu.schedules() if place.chip else contextlib.nullcontext()
  with prepared as dump:  # before anything uses JAX
    from arflow_jax.analysis import preflight, preflight_report

    if args.what == "sample":
      found = preflight_sample.examine(args.config, place, dump)
      text = preflight_report.sampler_table(found)
    else:
      found = preflight.examine(args.config, place, dump)
      text = preflight_report.table(found)
  console.say(text)
  if args.out:
    bench_report.write(args.out, found)
    console.say(args.out)
  return 0 if found["fits"] else 1


if __name__ == "__main__":
  cli.run(__name__)
