"""A TFDS directory of ArrayRecord files, small enough to break in a test."""

import io
import json

import numpy as np
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

_FEATURES = "tensorflow_datasets.core.features."
_LABEL = {
  "pythonClassName": _FEATURES + "class_label_feature.ClassLabel",
  "classLabel": {"numClasses": "2"},
}
_SHAPE = {"dimensions": ["8", "8", "1"]}
_PIXELS = {
  "pythonClassName": _FEATURES + "image_feature.Image",
  "image": {"dtype": "uint8", "encodingFormat": "png", "shape": _SHAPE},
}
_FLOATS = {
  "pythonClassName": _FEATURES + "tensor_feature.Tensor",
  "tensor": {"dtype": "float32", "encoding": "none", "shape": _SHAPE},
}


def write(folder, images, shards=2, form="array_record"):
  """Writes data set `tiny`, its training images in shards of equal length.

  Args:
    folder: what `data.dir` names.
    images: `[n, 8, 8, 1]`, of class `i % 2`: uint8, or float32.
    shards: files.
    form: what the directory says of them.

  Returns:
    The files.
  """
  floats = images.dtype == np.float32
  root = folder / "tiny" / "1.0.0"
  root.mkdir(parents=True)
  (root / "label.labels.txt").write_text("even\nodd")
  features = {"image": _FLOATS if floats else _PIXELS, "label": _LABEL}
  (root / "features.json").write_text(
    json.dumps(
      {
        "pythonClassName": _FEATURES + "features_dict.FeaturesDict",
        "featuresDict": {"features": features},
      }
    )
  )
  split = {
    "name": "train",
    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    "shardLengths": [str(len(images) // shards)] * shards,
  }
  info = {"name": "tiny", "version": "1.0.0", "fileFormat": form}
  info["splits"] = [split]
  (root / "dataset_info.json").write_text(json.dumps(info))
  files = []
  for shard, part in enumerate(np.split(np.arange(len(images)), shards)):
    name = f"tiny-train.array_record-{shard:05}-of-{shards:05}"
    writer = array_record_module.ArrayRecordWriter(
      str(root / name), "group_size:1"
    )
    for i in part:
      writer.write(encode(images[i], i % 2))
    writer.close()
    files.append(root / name)
  return files


def encode(image, label) -> bytes:
  example = tf_example_pb2.Example()
  feature = example.features.feature
  feature["label"].int64_list.value.append(label)
  if image.dtype == np.float32:
    feature["image"].float_list.value.extend(image.ravel())
  else:
    png = io.BytesIO()
    Image.fromarray(image[..., 0]).save(png, "png")
    feature["image"].bytes_list.value.append(png.getvalue())
  return example.SerializeToString()
