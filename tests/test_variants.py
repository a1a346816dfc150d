"""The variants of the config files: all can be built, and fit what they say."""

import importlib
import itertools

import pytest

from arflow_jax import config as config_lib
from arflow_jax.analysis import chips, footprint
from arflow_jax.errors import ConfigError

PLACES = ("pod", "gpu24", "gpu80")
SIZES = {
  "arflow": [
    f"imagenet{pixels}-{size}{patch}"
    for pixels, size, patch in itertools.product(
      (128, 256), ("s", "b", "l", "xl"), (2, 4, 8)
    )
  ],
  "flowar": [f"imagenet256-{size}" for size in "slh"],
}
ON_GPUS = [
  (family, size, place)
  for family, sizes in SIZES.items()
  for size in sizes
  for place in PLACES[1:]
  if (size, place) != ("imagenet256-h", "gpu24")
]
IN_SHORT = [
  ("arflow", "imagenet256-xl2", "gpu24"),
]


def _config(family, variant):
  return importlib.import_module(f"configs.{family}").get_config(variant)


@pytest.mark.parametrize("family", SIZES)
def test_a_place_leaves_the_model_as_published(family):
  for size in SIZES[family]:
    published = config_lib.flatten(_config(family, size).to_dict())
    for place in PLACES:
      if (size, place) == ("imagenet256-h", "gpu24"):
        continue
      config = _config(family, f"{size}-{place}")
      config_lib.check(config)
      found = config_lib.flatten(config.to_dict())
      changed = {key for key in found if found[key] != published[key]}
      allowed = {"model.dtype", "model.remat", "optimizer.accumulation"}
      if (family, place) == ("arflow", "pod"):
        allowed |= {"batch_size", "optimizer.peak_lr"}
        assert (config.batch_size, config.steps) == (256, 400_000)
      assert changed <= allowed, (size, place)


@pytest.mark.parametrize(
  ("family", "size", "place"),
  IN_SHORT
  + [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in ON_GPUS
    if case not in IN_SHORT
  ],
)
def test_a_variant_for_a_gpu_fits_by_the_formula(family, size, place):
  config = _config(family, f"{size}-{place}")
  there = chips.parse(f"gpu:{place.removeprefix('gpu')}GB").hbm
  assert footprint.divide(config, 1, tpu=False)["total"] < 0.85 * there


@pytest.mark.parametrize(
  ("family", "variant", "line"),
  [
    ("arflow", "imagenet256-xl2-tpu", "-pod, -gpu24 or -gpu80"),
    ("flowar", "imagenet256-s-gpu", "-pod, -gpu24 or -gpu80"),
    ("flowar", "imagenet256-h-gpu24", "choose imagenet256-h-gpu80"),
  ],
)
def test_an_unknown_variant_names_those_that_there_are(family, variant, line):
  with pytest.raises(ConfigError, match=line):
    _config(family, variant)
