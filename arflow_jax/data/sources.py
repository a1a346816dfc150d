"""Random-access sources of labelled images, channels last.

Pixels lie in [-1, 1]. `digits` needs nothing but scikit-learn; `tfds:NAME`
reads a TensorFlow Datasets directory in ArrayRecord form, without TensorFlow;
`random` makes noise of any shape, to time a config whose data is elsewhere.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from arflow_jax import paths
from arflow_jax.errors import ConfigError

Split = Literal["train", "heldout"]
HELDOUT_DIGITS = 397


class Kind(NamedTuple):
  """What the name of a source alone tells.

  Attributes:
    pixels: its images are pixels in [-1, 1], which need no decoder.
    small: they are so small that distances between pixels say something.
  """

  pixels: bool
  small: bool


KINDS = {
  "digits": Kind(pixels=True, small=True),
  "tfds": Kind(pixels=True, small=False),
  "random": Kind(pixels=True, small=False),
  "latents": Kind(pixels=False, small=False),
}


def kind(config: ConfigDict) -> Kind:
  """What the name `config.data.source` tells, without opening the source.

  Raises:
    ConfigError: an unknown name.
  """
  name, _, argument = config.data.source.partition(":")
  if name not in KINDS or bool(argument) != (name == "tfds"):
    raise ConfigError(
      f"data.source={config.data.source!r} is unknown; choose digits,"
      " tfds:NAME or random"
    )
  return KINDS[name]


@runtime_checkable
class Source(Protocol):
  """Labelled images by index.

  Attributes:
    labels: class of every image, `[n]`.
    class_names: a name for each class.
  """

  labels: Int[np.ndarray, "n"]
  class_names: Sequence[str]

  def get(
    self, index: int, mirror: bool, rng: np.random.Generator
  ) -> Float[np.ndarray, "h w C"]:
    """Image `index`, float32.

    Args:
      index: of the image, below `len(labels)`.
      mirror: whether left and right are exchanged in the picture.
      rng: what a source may draw, such as the place of a crop, it draws here.
    """


class Digits:
  """The 1,797 handwritten 8x8 digits of scikit-learn, in a fixed split.

  1,400 to train on and 397 held out, stratified by class. The original pixels
  count ink from 0 to 16; here ink is 1 and paper is -1.
  """

  def __init__(self, split: Split):
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    train, heldout = model_selection.train_test_split(
      np.arange(len(digits.target)),
      test_size=HELDOUT_DIGITS,
      stratify=digits.target,
      random_state=0,
    )
    chosen = np.sort(train if split == "train" else heldout)
    images = digits.images[chosen, :, :, None] / 8 - 1
    self.images = images.astype(np.float32)
    self.labels = digits.target[chosen].astype(np.int64)
    self.class_names = [str(name) for name in digits.target_names]

  def get(
    self, index: int, mirror: bool, rng: np.random.Generator
  ) -> Float[np.ndarray, "h w C"]:
    return _mirrored(self.images[index], mirror)


class Tfds:
  """A TFDS data set with `image` and `label` features, as ArrayRecord files.

  Raises:
    ConfigError: no such data set, or a file of it that is damaged.
    OSError: a file that could not be read, for another reason.
  """

  def __init__(self, name: str, directory: str | None, split: Split):
    import tensorflow_datasets as tfds

    from arflow_jax.data.records import Records

    directory = paths.expand(directory) if directory else None
    if not directory or not pathlib.Path(directory).is_dir():
      raise ConfigError(
        f"data.dir={directory!r} is not a directory; give the TFDS data"
        f" directory that holds {name}"
      )
    tfds_split = "train" if split == "train" else "test"
    try:
      info = tfds.builder(name, data_dir=directory).info
      files = info.splits[tfds_split].file_instructions
      if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(f"its files are in the form {info.file_format.value}")
      only = lambda key: tfds.features.FeaturesDict({key: info.features[key]})
      self._image_part, label_part = only("image"), only("label")
    except Exception as error:  # TFDS raises many kinds, over many lines
      reason = f"{type(error).__name__}: {error}".splitlines()[0]
      raise ConfigError(
        f"data.source=tfds:{name} cannot be read from data.dir={directory!r}:"
        f" {reason}; prepare it with"
        " download_and_prepare(file_format='array_record')"
      ) from error
    self._undecoded = {"image": tfds.decode.SkipDecoding()}
    self._records = Records(files)
    label = lambda record: label_part.deserialize_example_np(record)["label"]
    self.labels = np.array(
      [self._part(label, i, each) for i, each in enumerate(self._records)]
    )
    self.class_names = info.features["label"].names

  def get(
    self, index: int, mirror: bool, rng: np.random.Generator
  ) -> Float[np.ndarray, "h w C"]:
    record = self._records[index]
    image = self._part(self._image, index, record)
    return _mirrored(image.astype(np.float32) / 127.5 - 1, mirror)

  def _image(self, record: bytes) -> np.ndarray:
    image = self._image_part.deserialize_example_np(
      record, decoders=self._undecoded
    )["image"]
    if not isinstance(image, bytes):
      return image  # stored as numbers
    # By PIL: what TFDS itself takes depends on what is installed.
    feature = self._image_part["image"]
    return feature.decode_example_np_with_pil(image, feature.shape[-1])

  def _part(
    self, read: Callable[[bytes], Any], index: int, record: bytes
  ) -> Any:
    """What `read` makes of a record, which is named where that fails."""
    try:
      return read(record)
    except Exception as error:
      reason = f"{type(error).__name__}: {error}".splitlines()[0]
      raise ConfigError(
        f"{self._records.name(index)} cannot be decoded ({reason}); prepare"
        " the data again"
      ) from error


class Random:
  """Sixteen images of noise per class, of whatever shape the model wants."""

  def __init__(self, shape: tuple[int, int, int], num_classes: int):
    self._shape = shape
    self.labels = np.arange(16 * num_classes) % num_classes
    self.class_names = [str(i) for i in range(num_classes)]

  def get(
    self, index: int, mirror: bool, rng: np.random.Generator
  ) -> Float[np.ndarray, "h w C"]:
    noise = np.random.default_rng(index).standard_normal(
      self._shape, np.float32
    )
    return _mirrored(noise, mirror)


def _mirrored(
  image: Float[np.ndarray, "h w C"], mirror: bool
) -> Float[np.ndarray, "h w C"]:
  return image[:, ::-1] if mirror else image


def fingerprint(source: Source) -> dict[str, Any]:
  """What tells one data set from another, as JSON can hold it.

  Returns:
    `classes`, the name of each, and `images`, how many each has.
  """
  counts = np.bincount(source.labels, minlength=len(source.class_names))
  return {"classes": list(source.class_names), "images": counts.tolist()}


def open_source(config: ConfigDict, split: Split) -> Source:
  """The source that `config.data` names, checked against `config.model`.

  Raises:
    ConfigError: an unknown or unreadable source, or images and classes that do
      not fit the model.
  """
  kind(config)
  model = config.model
  wanted = (model.image_size, model.image_size, model.channels)
  name, _, argument = config.data.source.partition(":")
  if name == "digits":
    source = Digits(split)
  elif name == "tfds":
    source = Tfds(argument, config.data.dir, split)
  elif name == "random":
    source = Random(wanted, model.num_classes)
  else:
    raise ConfigError(
      "data.source='latents': this version cannot make or read a cache of"
      f" autoencoder latents yet ({model.image_size} x {model.image_size} x"
      f" {model.channels} of each image and of its mirror image, scaled to unit"
      " variance); train on pixels with data.source=digits or tfds:NAME, or"
      " time this network with data.source=random"
    )
  found = source.get(0, False, np.random.default_rng(0)).shape
  if found != wanted:
    raise ConfigError(
      f"data.source={config.data.source!r} has images of {found}, but"
      f" model.image_size={model.image_size} and"
      f" model.channels={model.channels} want {wanted}"
    )
  if len(source.class_names) != model.num_classes:
    raise ConfigError(
      f"model.num_classes={model.num_classes}, but"
      f" data.source={config.data.source!r} has {len(source.class_names)}"
    )
  return source
