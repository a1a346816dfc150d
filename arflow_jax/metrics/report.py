"""The table that `evaluate` prints."""

from collections.abc import Sequence
from typing import Any

from arflow_jax.errors import ConfigError
from arflow_jax.metrics.pixels import PixelEvaluator, Score
from arflow_jax.parallel import processes
from arflow_jax.sampling import run as run_lib


def evaluate_run(
  workdir: str,
  guidance: Sequence[float],
  overrides: dict[str, Any],
  *,
  num_samples: int | None = None,
  seed: int = 0,
) -> dict[float, Score]:
  """Scores a run at each guidance scale and prints the table as it grows.

  Args:
    workdir: of the run.
    guidance: the scales to compare.
    overrides: of the run's sample settings.
    num_samples: images at each scale; the run's `eval.num_samples` if None.
    seed: of the noise.

  Raises:
    ConfigError: no run, data that cannot be judged, settings out of range.
  """
  if "guidance" in overrides:
    raise ConfigError("--set=guidance is another scale: add it to --guidance")
  run = run_lib.restore(workdir)
  generators = {
    scale: run.generator(overrides | {"guidance": scale}, seed)
    for scale in guidance
  }
  if num_samples is None:
    num_samples = run.config.eval.num_samples
  evaluator = PixelEvaluator(run.config, num_samples)
  count, real = len(evaluator.labels), evaluator.real
  settings = run.settings(overrides).to_dict()
  del settings["guidance"]  # each row has its own
  processes.say(
    f"weights of step {run.step}; {count} samples per guidance\n"
    f"{run_lib.describe(settings)} seed={seed}\n"
    f"the classifier is right on {evaluator.heldout:.4f} of the held-out images"
    f"\n\n{'':16}{'recognised':>12}{'distance':>10}{'x real':>8}"
  )
  scores = {}

  def row(name: str, score: Score) -> None:
    ratio = score.distance / real.distance
    processes.say(
      f"{name:16}{score.recognised:12.4f}{score.distance:10.3f}{ratio:8.2f}"
    )

  row("real images", real)
  for scale, generator in generators.items():
    for block in generator.blocks(evaluator.labels):
      evaluator.add(block.labels, block.whole())
    scores[scale] = evaluator.score()
    row(f"guidance {scale:g}", scores[scale])
  return scores
