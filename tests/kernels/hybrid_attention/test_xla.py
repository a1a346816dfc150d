"""The XLA form where a GPU would run it: lowering, and cuDNN's surroundings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from arflow_jax.kernels import hybrid_attention as package
from arflow_jax.kernels.hybrid_attention import xla
from arflow_jax.kernels.hybrid_attention.cases import SMALL, published
from tests.conftest import relative_error
from tests.kernels.hybrid_attention import float64
from tests.kernels.hybrid_attention.test_pallas_tpu import problem

H100 = AbstractMesh(
  (1,),
  ("x",),
  (AxisType.Auto,),
  abstract_device=AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"
  ),
)


@pytest.mark.parametrize("tokens", [64, 256])
def test_the_best_on_a_gpu_lowers_for_cuda(tokens):
  _, _, both, args = problem(published("B", tokens, 5, batch=2), jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(H100):
    lowered = jax.jit(both).trace(*args).lower(lowering_platforms=("cuda",))
  text = lowered.as_text()
  assert text.count("dot_general") >= 12
  assert "custom_call" not in text


def test_cudnn_is_for_gpus_and_bfloat16():
  size = dict(tokens=256, heads=12, head=64)
  serves = lambda dtype, **kw: package.misfit("xla_cudnn", dtype=dtype, **kw)
  assert serves("bfloat16", **size) is None
  assert "not float32 and 64" in serves("float32", **size)
  assert "not bfloat16 and 160" in serves("bfloat16", **size | {"head": 160})
  with jax.sharding.use_abstract_mesh(H100):
    assert serves("bfloat16", batch=2, **size) is None
  assert "needs an NVIDIA GPU" in serves("bfloat16", batch=2, **size)


def test_around_cudnn_everything_is_in_its_place(monkeypatch):
  """With JAX's own attention in cuDNN's stead, which only a GPU can load."""
  asked = []
  attend = jax.nn.dot_product_attention

  def stand_in(*args, implementation, **kwargs):
    asked.append(implementation)
    return attend(*args, implementation="xla", **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  case = SMALL[0]
  given = float64.inputs(case)
  operands = [
    jnp.asarray(given[name]) for name in ("q", "k", "v", "log_gate", "state")
  ]
  out, state = xla.hybrid_attention(
    *operands, num_chunks=case.images, cudnn=True
  )
  wanted_out, wanted_state, _ = float64.evaluate(given, case)
  assert relative_error(np.asarray(out), wanted_out) < 1e-5
  assert relative_error(np.asarray(state), wanted_state) < 1e-5
  assert asked == ["cudnn"]
