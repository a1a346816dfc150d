"""What `sample` does: draws the images of a run into a file, resumably."""

import zlib
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath

from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes
from arflow_jax.sampling import images, run, writers
from arflow_jax.sampling.shards import Shards

_LARGEST = 10_000_000  # images in one output


def sample_to_file(
  workdir: str,
  out: str,
  *,
  labels: str,
  per_label: int,
  overrides: dict[str, Any],
  seed: int = 0,
  overwrite: bool = False,
) -> None:
  """Draws `per_label` images of each of `labels` (such as "0-9") into `out`.

  Blocks are kept in the folder `OUT.shards` as they are drawn. The same call
  goes on from there after an interruption; the output is put together at the
  end, and the folder removed. All processes of a job call it; one of them
  writes the output, and none returns before it is there.

  Args:
    workdir: of the run.
    out: `X.png` for a grid with a row for each label, `X.npz`, or a folder.
    labels: numbers and ranges; the one after the last class means none.
    per_label: images of each label.
    overrides: of the run's sample settings.
    seed: of the noise.
    overwrite: whether an output that is there, or unfinished images of another
      call, may be replaced.

  Raises:
    ConfigError: an output in the way, unknown labels or settings, no run, a
      run whose images are not pixels.
  """
  writers.check_output(out, overwrite)
  classes = images.parse_labels(labels)
  if len(classes) * per_label > _LARGEST:
    raise ConfigError(
      f"--per_label={per_label} of {len(classes)} labels is more than"
      f" {_LARGEST:,} images; draw fewer, or with several --seed"
    )
  restored = run.restore(workdir)
  null = restored.branch.num_classes
  every = np.repeat(images.check_labels(classes, null), per_label)
  generator = restored.generator(overrides, seed)
  names = ["none" if c == null else str(c) for c in classes]
  layout = writers.Layout(generator.image_shape, every, names, per_label)
  writers.check_layout(out, layout)
  path = epath.Path(out)
  settings = restored.settings(overrides).to_dict()
  manifest = {
    "step": restored.step,
    "weights": _checksum(restored.params),
    "seed": seed,
    "labels": classes,
    "per_label": per_label,
    "shape": generator.image_shape,
    # Every setting but one: the size of a block does not change an image.
    "settings": {k: v for k, v in settings.items() if k != "block_size"},
  }
  shards = Shards(
    path.with_name(path.name + ".shards"),
    manifest,
    len(every),
    replace=overwrite,
  )
  missing = shards.missing()
  done = len(every) - len(missing)
  processes.say(
    f"drawing {len(every)} images with the weights of step {restored.step}"
    + (f"; {done} of them are there from before" if done else "")
    + f"\n{run.describe(settings)} seed={seed}"
  )
  with tqdm.tqdm(
    total=len(every),
    initial=done,
    unit="image",
    disable=not processes.speaks(),
  ) as bar:
    for block in generator.blocks(every[missing], missing):
      indices, _, rows = block.local()
      shards.add(indices, rows)
      bar.update(len(block.indices))
  processes.meet()  # every process has written its rows
  if processes.speaks():
    drawn = shards.images()
    writers.write(
      out, drawn, layout, scratch=shards.folder, overwrite=overwrite
    )
    shards.remove()
  processes.meet()  # none leaves while one still writes


def _checksum(params: Any) -> int:
  """Tells the weights of one run from those of another at the same step."""
  checksum = 0
  for leaf in jax.tree.leaves(params):
    checksum = zlib.crc32(np.ascontiguousarray(leaf), checksum)
  return checksum
