"""The batches of a run: one held ahead, errors told in time."""

import pytest

from arflow_jax.training import feed as feed_lib


def _given(count, error=None):
  yield from ({"row": row} for row in range(count))
  if error:
    raise error


def test_batches_come_in_order_and_none_beyond_the_last():
  feed = feed_lib.Feed(_given(3, AssertionError("one too many")), 5)
  found = [feed.take(more)["row"] for more in (True, True, False)]
  assert found == [0, 1, 2]
  assert feed.trouble == 0
  feed.check(0)


@pytest.mark.parametrize(
  ("error", "trouble"),
  [
    (OSError("no disk"), feed_lib.UNREADABLE),
    (KeyError("no disk"), feed_lib.BROKEN),
    (None, feed_lib.BROKEN),  # it has ended too soon
  ],
)
def test_an_error_is_known_one_step_ahead(error, trouble, capsys):
  feed = feed_lib.Feed(_given(2, error), 5)
  feed.tell()
  assert (feed.take(True), feed.trouble) == ({"row": 0}, 0)
  assert feed.take(True) == {"row": 1}
  assert feed.trouble == trouble
  assert capsys.readouterr().out == ""
  feed.tell()
  assert capsys.readouterr().out.startswith("no data for step 7: ")
  with pytest.raises(type(error) if error else StopIteration):
    feed.check(trouble)


def test_the_error_of_another_process_is_one_here():
  feed = feed_lib.Feed(_given(2), 5)
  with pytest.raises(OSError, match="another process has no data for step 5"):
    feed.check(feed_lib.BROKEN)
