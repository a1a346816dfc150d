"""A run that was trained on some devices, drawn from on others."""

import os
import subprocess
import sys

import numpy as np
import pytest

# Trains with one mesh, then draws from runs on all devices there are; on eight
# also with the mesh and the shards of training, as pictures on the way are. Per
# run and mesh: noise, samples in float32, pixels, and the shape on a device.
SCRIPT = """
import sys
import jax, numpy as np
from arflow_jax.sampling import images, run
from arflow_jax.training import checkpoint, loop
from arflow_jax.training import program as program_lib
from tests.sampling.noise import Noise
from tests.tiny import tiny_config

folder, trains, *draws = sys.argv[1:]
small = {
  "arflow": dict(),
  "flowar": dict(
    model__patch_size=4, model__scales=(1, 2), model__head_width=256),
}
meshes = {
  "one": dict(), "eight": dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)}

def config(family, mesh):
  return tiny_config(
    family, batch_size=8, steps=60, optimizer__warmup_steps=2,
    checkpoint__every=60, sample__num_steps=25, log__every=60, log__pictures=0,
    **small[family], **meshes[mesh])

def draw(branch, params, mesh, settings, decode):
  generator = images.Generator(
    branch, params, settings, block_size=16, seed=3, mesh=mesh, decode=decode)
  blocks = list(generator.blocks(np.arange(40) % 10))
  (held,) = {s.data.shape for s in blocks[0].images.addressable_shards}
  return np.concatenate([block.whole() for block in blocks]), held

def save(name, branch, params, mesh, settings):
  found = {}
  found["samples"], found["held"] = draw(
    branch, params, mesh, settings, lambda x: x)
  found["pixels"], _ = draw(branch, params, mesh, settings, images.to_pixels)
  noise = Noise(branch.image_shape)
  found["noise"], _ = draw(noise, 1.0, mesh, 0, lambda x: x)
  np.savez(f"{folder}/{name}.npz", **found)

for family in small:
  if trains in meshes:
    assert loop.train(config(family, trains), f"{folder}/{family}-{trains}")
  for name in draws:
    workdir = f"{folder}/{family}-{name}"
    restored = run.restore(workdir)
    settings = restored.branch.settings(restored.config.sample)
    on = f"{family}-{name}-on-{jax.device_count()}"
    save(on, restored.branch, restored.params, restored.mesh, settings)
    if jax.device_count() == 8:
      program = program_lib.build(config(family, "eight"))
      state, _ = checkpoint.restore(
        workdir, program.abstract_state, program.init)
      save(on + "-split", program.branch, state.ema, program.mesh, settings)
"""


def _run(devices, *args):
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, *map(str, args)],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
  """What was drawn, by family, the devices of training, and those drawn on."""
  folder = tmp_path_factory.mktemp("drawn")
  _run(1, folder, "one")
  _run(8, folder, "eight", "one", "eight")
  _run(1, folder, "none", "one", "eight")
  return {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["one", "eight"])
@pytest.mark.parametrize(
  ("family", "bound"), [("arflow", 1e-4), ("flowar", 5e-4)]
)
def test_the_same_images_wherever_they_are_drawn(family, bound, trained, drawn):
  """Noise bit for bit, samples within a bound, pixels within one level."""
  alone = drawn[f"{family}-{trained}-on-1"]
  assert alone["held"].tolist() == [16, 8, 8, 1]
  assert alone["pixels"].std() > 10
  # Each device draws its share; two along `tensor` draw together.
  for mesh, share in (("8", 2), ("8-split", 4)):
    other = drawn[f"{family}-{trained}-on-{mesh}"]
    assert other["held"].tolist() == [share, 8, 8, 1]
    np.testing.assert_array_equal(other["noise"], alone["noise"])
    apart = np.abs(other["samples"] - alone["samples"]).max()
    levels = np.abs(other["pixels"].astype(int) - alone["pixels"])
    print(
      f"{family}, trained on {trained}, drawn on {mesh}: {apart:.1e} apart,"
      f" {(levels > 0).mean():.2%} of pixels differ, by {levels.max()} at most"
    )
    assert alone["samples"].std() > 0.1
    assert apart < bound
    assert levels.max() <= 1
    assert (levels > 0).mean() < 1e-3
