"""Pictures drawn while a run trains, by which its progress can be seen."""

from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes
from arflow_jax.sampling import images, writers
from arflow_jax.training.program import Program
from arflow_jax.training.state import TrainState
from arflow_jax.training.telemetry import Telemetry

_CLASSES = 10  # evenly spaced among those of the model
_EACH = 2


class Pictures:
  """Draws `WORKDIR/pictures/STEP.png` every `log.pictures` steps.

  A grid like that of `sample`, a row for each of up to ten classes, with the
  averaged weights and the run's `sample` settings, and each time of the same
  noise. All devices of the run draw, with the weights as they are split over
  them. The program is compiled here, before the first step, when a signal still
  costs nothing. Later one waits for the block of `sample.block_size` images
  that is being drawn, and the rest of that picture is left out.

  What is in the way of a picture, such as samples that are not finite, a full
  disk or too little memory, is told and stops no run. Of a run whose samples
  are not pixels there are no pictures.

  Args:
    program: of the run.
    workdir: of the run.
    start: steps done before this launch.
    log: shows the pictures in TensorBoard.
  """

  def __init__(
    self, program: Program, workdir: str, start: int, log: Telemetry
  ):
    config, branch = program.config, program.branch
    self._program, self._log = program, log
    self._folder = epath.Path(workdir) / "pictures"
    self._every = config.log.pictures
    if not self._every:
      return
    before = max(start - 1, 0) // self._every
    if config.steps // self._every == before:  # this launch gets to none
      self._every = 0
      return
    classes = min(branch.num_classes, _CLASSES)
    spaced = np.linspace(0, branch.num_classes - 1, classes).round()
    self._labels = np.repeat(spaced.astype(int), _EACH)
    self._names = [str(int(label)) for label in spaced]
    try:
      self._decode = images.decoder(config, branch.image_shape)
    except ConfigError as error:
      self._give_up(str(error))
      return
    self._safely(self._generator(program.abstract_state.ema).compile)

  def between(
    self, step: int, state: TrainState, stopping: Callable[[], bool]
  ) -> None:
    """Draws where it is time to, unless the picture is there."""
    if not self._every or step == 0 or step % self._every:
      return
    out = self._folder / f"{step}.png"
    # The disks of processes may differ; all have to draw, or none.
    (wanted,) = processes.agree(processes.speaks() and not out.exists())
    if wanted:
      with self._log.paused(state):
        self._safely(lambda: self._draw(step, state, out, stopping))

  def close(self) -> None:
    """There is nothing to end."""

  def _draw(self, step, state, out, stopping) -> None:
    generator = self._generator(state.ema)
    drawn = []
    try:
      for block in generator.blocks(self._labels):
        if drawn and stopping():
          return
        drawn.extend(block.whole())
    except FloatingPointError as error:
      processes.say(f"no picture of step {step}: {error}")
      return
    if not processes.speaks():
      return
    layout = writers.Layout(
      generator.image_shape, self._labels, self._names, _EACH
    )
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      writers.write(
        str(out), drawn, layout, scratch=self._folder, overwrite=True
      )
      self._log.picture(step, out.read_bytes())
    except (ConfigError, OSError) as error:
      processes.say(f"no picture of step {step}: {error}")

  def _generator(self, params) -> images.Generator:
    sample = self._program.config.sample
    return images.Generator(
      self._program.branch,
      params,
      self._program.branch.settings(sample),
      block_size=min(sample.block_size, len(self._labels)),
      mesh=self._program.mesh,
      decode=self._decode,
    )

  def _safely(self, work: Callable[[], None]) -> None:
    """Does what may want more memory than training leaves."""
    try:
      work()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      self._give_up(
        "the devices have too little memory beside the training; lower"
        f" sample.block_size={self._program.config.sample.block_size}"
      )

  def _give_up(self, why: str) -> None:
    processes.say(f"no pictures are drawn on the way: {why}")
    self._every = 0
