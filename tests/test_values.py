"""Rules of values, where the tables of keys and flags say nothing of them."""

import numpy as np
import pytest

from arflow_jax import values
from arflow_jax.errors import ConfigError


@pytest.mark.parametrize(
  ("rule", "allowed", "refused"),
  [
    (values.whole(2, 5), (2, 5, np.int64(3)), (1, 6, 3.0, True, "3", 10**30)),
    (values.real("(0, 1]"), (1e-9, 1, np.float32(0.5)), (0, 1.1, True, "1")),
    (values.real("[0, 1)"), (0, 0.9), (-1e-9, 1, float("nan"), None)),
    (values.one_of("a", "b"), ("a",), ("c", "", None, 1)),
    (values.switch, (True, False), (1, 0, None, "true")),
    (values.text, ("x",), ("", None, 3)),
    (values.each(values.SIZE), ((), (1, 2), [3]), (3, (0,), (1, None), "12")),
    (values.optional(values.SIZE), (None, 1), (0, "")),
  ],
)
def test_a_rule_allows_and_refuses(rule, allowed, refused):
  for value in allowed:
    rule("key", value)
  for value in refused:
    with pytest.raises(ConfigError, match="key="):
      rule("key", value)
