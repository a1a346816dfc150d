"""Reads a whole run and names what of it is damaged.

  python -m arflow_jax.verify --workdir=DIR

Every array of every checkpoint is read and compared with its checksum. Nothing
is changed; the exit code is 1 where something is damaged.
"""

from arflow_jax import cli


def define(flags: cli.Flags) -> None:
  flags.workdir()


def main(args: cli.Args) -> int:
  from arflow_jax.training import verification

  return 0 if verification.verify(args.workdir) else 1


if __name__ == "__main__":
  cli.run(__name__)
