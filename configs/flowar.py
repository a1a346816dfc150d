"""FlowAR (arXiv 2412.15205): digits, and every published size.

Digits, on two CPU cores (the default variant):

    python -m arflow_jax.train --config=configs/flowar.py:digits \\
      --workdir=runs/digits-flowar

Published networks and recipe, `imagenet256-{s,l,h}`, on the KL-16 autoencoder's
latents of ImageNet at 256 pixels (16 x 16 x 16, times 0.2325, random mirror):

    python -m arflow_jax.bench --config=configs/flowar.py:imagenet256-s \\
      --config.batch_size=2 --config.sample.block_size=4

Each of them also in bfloat16, `-pod`, and so that the published batch of 2,048
images fits one GPU by accumulation, `-gpu24` (not H) and `-gpu80`.
"""

import re

from ml_collections import ConfigDict

from arflow_jax.config import default_config
from arflow_jax.errors import ConfigError

# Width, depth of each half, heads; depth and width of the head, its form;
# steps, guidance and the lower end of its times (spec of the published code).
_SIZES = {
  "s": (768, 6, 12, 2, 1024, False, 25, 4.3, 0.1),
  "l": (1024, 8, 16, 12, 1024, True, 25, 2.4, 0.1),
  "h": (1536, 15, 16, 12, 1536, True, 50, 2.4, 0.3),
}
# For one GPU of so many GB: remat and micro-batches.
_GPU = {
  ("s", "gpu24"): ("dots", 32),
  ("l", "gpu24"): ("full", 64),
  ("s", "gpu80"): ("dots", 8),
  ("l", "gpu80"): ("dots", 16),
  ("h", "gpu80"): ("full", 32),
}
_EPOCH = 1_281_167 // 2048  # steps, ImageNet at the published batch size


def get_config(variant: str = "digits") -> ConfigDict:
  """Returns the locked config of a variant."""
  config = default_config()
  config.branch = "flowar"
  config.model = ConfigDict(
    {
      "image_size": 16,  # side of the (latent) images
      "channels": 16,
      "patch_size": 1,
      "scales": (1, 2, 4, 8, 16),  # in tokens
      "width": 768,
      "encoder_depth": 6,
      "decoder_depth": 6,
      "num_heads": 12,
      "mlp_ratio": 4.0,  # 3/2 of the feed-forward's hidden features over width
      "head_width": 1024,  # of the flow head
      "head_depth": 2,
      "cross_attention": False,  # in the flow head
      "num_classes": 1000,
      "label_dropout": 0.1,
      "dropout": 0.1,
      "rope_stretch": 16.0,  # range of positions at every scale
      "dtype": "float32",  # of matrix products: or "bfloat16"
      # "none", "dots", "attention", "feed_forward" or "full", see nn/stack.py.
      "remat": "dots",
    }
  )
  config.sample = ConfigDict(
    {
      "method": "ode",  # or "sde"
      "grid": "published",  # or "uniform", or noise levels "1,0.5,0"
      "num_steps": 25,  # of every scale
      "scale_steps": (),  # of each scale, such as (10, 10, 25, 25, 25)
      "guidance": 2.4,  # at the last scale; none at the first
      "guidance_low": 0.1,
      "guidance_high": 1.0,
      "block_size": 16,  # images per compiled call
    }
  )
  published = re.fullmatch(
    r"imagenet256-([slh])(?:-(pod|gpu24|gpu80))?", variant
  )
  if variant == "digits":
    _digits(config)
  elif published:
    _published(config, published[1])
    _place(config, published[1], published[2])
  else:
    raise ConfigError(
      f"unknown variant {variant!r} of configs/flowar.py; choose digits or"
      " imagenet256-{s,l,h} with or without -pod, -gpu24 or -gpu80 behind it"
    )
  return config.lock()


def _published(config: ConfigDict, size: str) -> None:
  model, sample = config.model, config.sample
  width, depth, heads, head_depth, head_width, cross, *sampling = _SIZES[size]
  model.width, model.num_heads = width, heads
  model.encoder_depth = model.decoder_depth = depth
  model.head_width, model.head_depth = head_width, head_depth
  model.cross_attention = cross
  model.remat = "dots" if size == "s" else "full"
  sample.num_steps, sample.guidance, sample.guidance_low = sampling
  config.batch_size = 2048
  config.mesh.fsdp = 0
  config.steps = 400 * _EPOCH
  config.data.flip = True
  optimizer = config.optimizer
  optimizer.peak_lr = 4e-4
  optimizer.schedule = "cosine"
  optimizer.warmup_steps = 100 * _EPOCH
  optimizer.decay_steps = 400 * _EPOCH
  optimizer.final_fraction = 0.025
  optimizer.weight_decay = 0.02
  optimizer.clip = "global_norm"
  optimizer.clip_threshold = 3.0


def _place(config: ConfigDict, size: str, place: str | None) -> None:
  """What a pod or one GPU needs other than the published recipe."""
  if place is None:
    return
  config.model.dtype = "bfloat16"
  if place == "pod":
    return
  if (size, place) not in _GPU:
    raise ConfigError(
      f"configs/flowar.py:imagenet256-{size}-{place}: weights, moments and"
      " averages of FlowAR-H alone take 31 GB; choose imagenet256-h-gpu80"
    )
  config.model.remat, config.optimizer.accumulation = _GPU[size, place]


def _digits(config: ConfigDict) -> None:
  model = config.model
  model.image_size, model.channels = 8, 1
  model.scales = (1, 2, 4, 8)
  model.width, model.num_heads = 96, 2
  model.encoder_depth = model.decoder_depth = 1
  model.head_width, model.head_depth = 64, 2
  model.num_classes = 10
  model.dropout = 0.0
  config.batch_size = 24
  config.steps = 1800
  config.data.source = "digits"
  optimizer = config.optimizer
  optimizer.peak_lr = 3e-3
  optimizer.schedule = "cosine"
  optimizer.warmup_steps = 100
  optimizer.decay_steps = 1800
  optimizer.b2 = 0.99
  optimizer.weight_decay = 0.02
  optimizer.clip = "global_norm"
  config.ema.decay = 0.998
  config.checkpoint.every = 500
  config.sample.guidance = 1.8
  config.sample.block_size = 100
  config.log.every = 100
  config.log.pictures = 450
