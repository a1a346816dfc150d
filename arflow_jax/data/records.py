"""Records of ArrayRecord files by number, each failure told by file and record.

The format has checksums, so that damage is proven when it is read. What fails
for another reason, such as a disk that does not answer, is tried again.
"""

import bisect
import itertools
import logging
import time
from collections.abc import Iterator, Sequence

from array_record.python import array_record_data_source

from arflow_jax.errors import ConfigError

PAUSES = (1.0, 5.0)  # seconds before a failed read is tried again
_AT_ONCE = 1024  # records, where all are read
# How the reader, whose errors are all RuntimeErrors, says what is wrong with a
# file: a checksum or an end that is missing, fewer records than promised, none.
_DAMAGE = (
  "/records file",
  "should be at least",
  "out of bound",
  "No such file",
)


class Records:
  """The records of some files, in order.

  Args:
    files: `filename`, and which records of it: `take` of them after `skip`.
  """

  def __init__(self, files: Sequence[array_record_data_source.FileInstruction]):
    self._files = files
    self._ends = list(itertools.accumulate(file.take for file in files))
    self._open()

  def _open(self):
    self._source = array_record_data_source.ArrayRecordDataSource(self._files)

  def __len__(self) -> int:
    return self._ends[-1]

  def name(self, index: int) -> str:
    """The file of a record and its number there."""
    which = bisect.bisect_right(self._ends, index)
    file = self._files[which]
    place = index - self._ends[which] + file.take + file.skip
    return f"record {place} of {file.filename}"

  def __getitem__(self, index: int) -> bytes:
    """The record of this number.

    Raises:
      ConfigError: it is damaged, or its file is damaged or missing.
      OSError: it could not be read, for another reason.
    """
    for pause in (*PAUSES, None):
      try:
        return self._source[index]
      except Exception as error:
        reason = str(error).partition("\n")[0]
        if any(sign in reason for sign in _DAMAGE):
          raise ConfigError(
            f"{self.name(index)} is damaged or missing ({reason}); bring the"
            " file back from a copy, or prepare the data again"
          ) from error
        if pause is None:
          raise OSError(
            f"{self.name(index)} could not be read in {len(PAUSES) + 1} tries"
            f" ({reason}), which does not mean that it is damaged; start the"
            " same command again when the cause is gone"
          ) from error
        logging.warning(
          "reading %s failed (%s); again in %g s",
          self.name(index),
          reason,
          pause,
        )
        time.sleep(pause)
        self._open()  # a reader keeps what it failed at

  def __iter__(self) -> Iterator[bytes]:
    """All records in order, many at once: that is eight times as fast."""
    for first in range(0, len(self), _AT_ONCE):
      chosen = range(first, min(first + _AT_ONCE, len(self)))
      try:
        yield from self._source.__getitems__(chosen)
      except Exception:  # one by one they tell which it is
        yield from map(self.__getitem__, chosen)
