"""The map of names between published weights and ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.nn import published

ROWS = [
  *published.linear("head", "out"),
  *published.linear("blocks.fc", "blocks.{}.fc", bias=False),
  *published.linear("blocks.qkv", "blocks.{}.qkv"),
  *published.linear("blocks.proj", "blocks.{}.proj", bias=False, inputs=2),
  published.Row("patch", "conv.weight", published.patch_convolution(2, 3)),
]


def _params():
  keys = jax.random.split(jax.random.key(0), 7)
  return {
    "head": {
      "kernel": jax.random.normal(keys[0], (4, 6)),
      "bias": jax.random.normal(keys[1], (6,)),
    },
    "blocks": {
      "fc": {"kernel": jax.random.normal(keys[2], (11, 4, 5))},
      "qkv": {  # parts, heads, features
        "kernel": jax.random.normal(keys[4], (11, 4, 3, 2, 5)),
        "bias": jax.random.normal(keys[5], (11, 3, 2, 5)),
      },
      "proj": {"kernel": jax.random.normal(keys[6], (11, 2, 5, 4))},
    },
    "patch": jax.random.normal(keys[3], (12, 7)),
  }


def test_layouts_and_layers_go_out_and_come_back():
  params = _params()
  named = published.export(params, ROWS)
  assert len(named) == 3 + 4 * 11
  np.testing.assert_array_equal(
    named["blocks.10.fc.weight"], params["blocks"]["fc"]["kernel"][10].T
  )
  # Features of one head stand together, heads of one part as well.
  blocks, row = params["blocks"], (2 * 2 + 1) * 5 + 3
  weight, bias = named["blocks.10.qkv.weight"], named["blocks.10.qkv.bias"]
  np.testing.assert_array_equal(
    weight[row], blocks["qkv"]["kernel"][10, :, 2, 1, 3]
  )
  assert bias[row] == blocks["qkv"]["bias"][10, 2, 1, 3]
  np.testing.assert_array_equal(
    named["blocks.10.proj.weight"][:, 5 + 3],
    blocks["proj"]["kernel"][10, 1, 3],
  )
  # A patch flattened as (row, column, channel) meets conv weight (C, row, col).
  assert named["conv.weight"].shape == (7, 3, 2, 2)
  np.testing.assert_array_equal(
    named["conv.weight"][5, 2, 1, 0], params["patch"][1 * 6 + 0 * 3 + 2, 5]
  )
  named["table"] = jnp.zeros(3)  # a buffer
  abstract = jax.eval_shape(lambda: params)
  back = published.restore(named, ROWS, abstract, {"table": (3,)})
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_layers_are_counted_up_to_a_gap():
  names = ["b.0.q", "b.1.q", "b.norm.q", "b.2.k", "b.4.q"]
  assert published.count_layers(dict.fromkeys(names), "b.{}.q") == 2
  assert published.count_layers({}, "b.{}.q") == 0


def test_sizes_come_from_arrays_of_the_right_rank():
  state_dict = {"a": np.zeros((2, 3)), "b": [1.0, 2.0], "c": None}
  found = published.sizes(state_dict, {"a": 2, "b": 1})
  assert found == {"a": (2, 3), "b": (2,)}
  with pytest.raises(ConfigError, match=r"lack c of 2 axes.*found \(\)"):
    published.sizes(state_dict, {"c": 2})
  with pytest.raises(ConfigError, match=r"lack d of 1 axes.*found nothing"):
    published.sizes(state_dict, {"d": 1})
  with pytest.raises(ConfigError, match=r"lack e of 2 axes.*\(0, 3\)"):
    published.sizes({"e": np.zeros((0, 3))}, {"e": 2})


@pytest.mark.parametrize("share", [1, 2 / 3])
def test_the_ratio_behind_rounded_features_is_found(share):
  for width in (16, 64, 384, 768, 1024, 1152, 1536):
    features = lambda ratio, width=width: int(width * ratio * share)
    for ratio in (1.0, 2.5, 3.0, 4.0, 16 / 3):
      found = published.simplest_ratio(features(ratio), features)
      assert found == pytest.approx(ratio, abs=0.1 if width == 16 else 1e-9)
    for hidden in (1, 7, width + 1, 4 * width - 1):  # no simple one
      assert features(published.simplest_ratio(hidden, features)) == hidden


def test_a_parameter_without_a_row_is_an_error():
  with pytest.raises(KeyError, match=r"head\.bias"):
    published.export(_params(), [r for r in ROWS if r.ours != "head.bias"])


def test_all_faults_are_named_together():
  shapes = {"a": (2, 3), "b": (4,), "c": ()}
  given = {"a": np.zeros((3, 2)), "c": np.zeros(()), "d": np.zeros(1)}
  with pytest.raises(ConfigError) as caught:
    published.check_names(given, shapes)
  assert str(caught.value).endswith(
    "missing: b; unexpected: d; misshapen: a (3, 2) instead of (2, 3)"
  )
