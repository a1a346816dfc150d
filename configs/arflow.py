"""ARFlow (arXiv 2501.16085): digits, and every published size.

Digits, on two CPU cores (the default variant):

    python -m arflow_jax.train --config=configs/arflow.py:digits \\
      --workdir=runs/digits

Pixels of any TFDS directory of 32x32 images, here CIFAR-10:

    python -m arflow_jax.train --config=configs/arflow.py:cifar10 \\
      --config.data.dir=DIR --workdir=runs/cifar10

Published networks and recipe, `imagenet{128,256}-{s,b,l,xl}{2,4,8}`:

    python -m arflow_jax.bench --config=configs/arflow.py:imagenet256-xl2

Each of them also for one GPU and for a pod, in bfloat16:

    imagenet256-xl2-gpu24, -gpu80   the published recipe in 24 or 80 GB
    imagenet256-xl2-pod             256 sequences a step instead of 8

The published 8 sequences a step cannot be split over more than 8 devices. The
256 of `-pod` and their learning rate of 2e-4 are ours: the published 1e-4 times
2, about the square root of how many more images a step has than the 256 of
SiT, which trains with 1e-4. Nobody has trained with them yet.
"""

import re

from ml_collections import ConfigDict, config_dict

from arflow_jax.config import default_config
from arflow_jax.errors import ConfigError

# width, depth, heads (spec of the published code). XL has 18 heads of 64 with
# patches of 2, and 16 of 72 otherwise.
_SIZES = {
  "s": (384, 12, 6),
  "b": (768, 12, 12),
  "l": (1024, 24, 16),
  "xl": (1152, 28, 16),
}


def get_config(variant: str = "digits") -> ConfigDict:
  """Returns the locked config of a variant."""
  config = default_config()
  config.branch = "arflow"
  config.model = ConfigDict(
    {
      "image_size": 32,  # side of the (latent) images
      "channels": 4,
      "patch_size": 2,
      "width": 1152,
      "depth": 28,
      "num_heads": 18,
      "mlp_ratio": 4.0,  # hidden features of the feed-forward over width
      "num_classes": 1000,
      "learn_sigma": True,  # 2C output channels, half of them unused
      "label_dropout": 0.1,
      "dtype": "float32",  # of matrix products: or "bfloat16"
      # "none", "dots", "attention", "feed_forward" or "full", see nn/stack.py.
      "remat": "dots",
      # "reference", "xla", "xla_cudnn", "pallas_tpu", "pallas_tpu_interpret" or
      # None: the best known for platform and size.
      "attention": config_dict.placeholder(str),
    }
  )
  config.sample = ConfigDict(
    {
      # "sde", "sde-heun", "ode", "ode-midpoint", "-heun2", "-heun3" or "-rk4".
      "method": "sde",
      "num_steps": 250,  # the last one included; each of one stage or more
      # Of the SDE: "constant", "sbdm", "sigma", "linear", "decreasing" or
      # "increasing-decreasing", and a factor on it.
      "diffusion": "sigma",
      "diffusion_norm": 1.0,
      "last_step": "mean",  # or "euler", "tweedie", "none"
      "last_step_size": 0.04,  # the SDE stops at 1 minus this
      "guidance": 1.5,  # 1: none
      "guidance_low": 0.0,  # times at which it applies, 0 noise to 1 data
      "guidance_high": 1.0,
      "guidance_channels": config_dict.placeholder(int),  # None: all
      "block_size": 16,  # images per compiled call
    }
  )
  config.data.sequence_length = 5
  published = re.fullmatch(
    r"imagenet(128|256)-(s|b|l|xl)([248])(?:-(pod|gpu24|gpu80))?", variant
  )
  if variant == "digits":
    _digits(config)
  elif variant == "cifar10":
    _cifar10(config)
  elif published:
    _published(config, int(published[1]), published[2], int(published[3]))
    _place(config, published[2], published[4])
  else:
    raise ConfigError(
      f"unknown variant {variant!r} of configs/arflow.py; choose digits,"
      " cifar10 or imagenet{128,256}-{s,b,l,xl}{2,4,8} with or without -pod,"
      " -gpu24 or -gpu80 behind it"
    )
  return config.lock()


def _published(config: ConfigDict, pixels: int, size: str, patch: int) -> None:
  model = config.model
  model.image_size = pixels // 8
  model.patch_size = patch
  model.width, model.depth, model.num_heads = _SIZES[size]
  if (size, patch) == ("xl", 2):
    model.num_heads = 18
  config.batch_size = 8
  config.mesh.fsdp = 0
  config.optimizer.weight_decay = 0.02
  config.optimizer.clip = "value"
  config.optimizer.clip_threshold = 3.0
  config.data.flip = True
  config.sample.guidance_channels = 3


def _place(config: ConfigDict, size: str, place: str | None) -> None:
  """What a pod or one GPU needs other than the published recipe."""
  if place is None:
    return
  config.model.dtype = "bfloat16"
  if place == "pod":
    config.model.remat = "feed_forward"  # the fewest cycles, as estimated
    config.batch_size = 256
    config.optimizer.peak_lr = 2e-4
  elif place == "gpu24":
    config.model.remat = "full" if size == "xl" else "dots"
  else:
    config.model.remat = "dots" if size == "xl" else "none"


def _cifar10(config: ConfigDict) -> None:
  model = config.model
  model.image_size, model.channels, model.patch_size = 32, 3, 4
  model.width, model.depth, model.num_heads = _SIZES["s"]
  model.num_classes = 10
  config.batch_size = 64
  config.steps = 100_000
  config.data.source = "tfds:cifar10"
  config.data.flip = True
  config.optimizer.weight_decay = 0.02
  config.optimizer.clip = "value"
  config.optimizer.clip_threshold = 3.0


def _digits(config: ConfigDict) -> None:
  model = config.model
  model.image_size, model.channels, model.patch_size = 8, 1, 2
  model.width, model.depth, model.num_heads = 96, 4, 6
  model.num_classes = 10
  model.learn_sigma = False
  config.batch_size = 12
  config.steps = 2200
  config.data.source = "digits"
  optimizer = config.optimizer
  optimizer.peak_lr = 3e-3
  optimizer.schedule = "cosine"
  optimizer.warmup_steps = 100
  optimizer.decay_steps = 2200
  optimizer.b2 = 0.99
  optimizer.weight_decay = 0.02
  optimizer.clip = "global_norm"
  config.ema.decay = 0.998
  config.checkpoint.every = 500
  config.sample.num_steps = 25
  config.sample.block_size = 100
  config.log.every = 100
  config.log.pictures = 550
