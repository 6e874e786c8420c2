"""TensorFlow Datasets that are prepared as ArrayRecord: `tfds:name/config:split`, read without TensorFlow."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from sft_jax.data.examples import RowError
from sft_jax.data.sources.array_records import RecordFile, record_count
from sft_jax.data.sources.json_rows import text_or_bytes
from sft_jax.data.sources.parts import File, Part, Row, Shared
from sft_jax.data.sources.pieces import file_sha256, state_of
from sft_jax.data.sources.remote import is_url
from sft_jax.errors import UserError, reason_of

PREFIX = "tfds:"
_NAME = re.compile(r"tfds:(?P<set>\w+(/[\w.-]+)?(:[\d.*]+)?):(?P<split>[A-Za-z_][^:]*(\[[^\]]*\][^:]*)*)")


def open_tfds(name: str, label: str, shared: Shared) -> list[Part]:
    """Opens the split of a data set that TFDS has prepared, a part for each of its files.

    Slices such as `train[:10%]` and sums such as `train+test` are those of TFDS, the version is the newest one unless
    the name has one (`tfds:name/config:1.0.0:split`). Nothing is ever downloaded. Raises UserError saying how to prepare
    a data set that is not there.
    """
    found = _NAME.fullmatch(name)
    if not found:
        raise UserError(
            f"{label}: names no split of a TFDS data set; write it as tfds:name:split or tfds:name/config:split."
        )
    builder = _builder(found["set"], label)
    try:
        instructions = builder.info.splits[found["split"]].file_instructions
    except (ValueError, KeyError) as error:
        known = ", ".join(builder.info.splits)
        raise UserError(f"{label}: has no such split ({reason_of(error)}); it has {known}.") from error
    features = builder.info.features
    known = [features.to_json(), list(_labels(features))]  # labels are read as their names
    kind = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    parts: list[Part] = []
    for number, each in enumerate(instructions):
        path = os.fspath(each.filename)
        if is_url(path):
            raise UserError(
                f"{label}: lies in {os.path.dirname(path)}; copy it to a local disk and set TFDS_DATA_DIR to the folder there."
            )
        file = File(f"{name}/{os.path.basename(path)}", label, path, shared)
        if any(part.name == file.name for part in parts):  # of a sum of slices of one file
            file = file._replace(name=f"{file.name}#{number}")
        available, state = record_count(file), state_of(path)
        count = each.take if each.take >= 0 else available - each.skip
        if each.skip + count > available:
            needed = each.skip + count
            raise UserError(f"{label}: {path} has {available} of {needed} records; prepare the data set again.")
        content = f"tfds {builder.info.full_name} {kind} {each.skip} {count} {file_sha256(path)}"
        parts.append(RecordFile(file, state, content, available, each.skip, count, partial(_parse, features)))
    return parts


def _labels(feature: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yields (path, names) of every feature whose numbers stand for names."""
    if getattr(feature, "names", None):
        yield path, list(feature.names)
    elif hasattr(feature, "items"):  # several features by name
        for name, inner in feature.items():
            yield from _labels(inner, f"{path}/{name}")
    elif hasattr(feature, "feature"):  # a list of one
        yield from _labels(feature.feature, f"{path}[]")


def _builder(name: str, label: str) -> Any:
    import tensorflow_datasets as tfds  # here: it takes half a second, and few data sets need it

    prepare = f"tfds.builder('{name}', file_format='array_record').download_and_prepare()"
    try:
        builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR") or None)
        prepared = builder.is_prepared()
    except (ValueError, ImportError, AssertionError, OSError) as error:
        raise UserError(
            f"{label}: TFDS knows and has no such data set ({reason_of(error)}); check its name, and TFDS_DATA_DIR, the "
            "folder in which it was prepared."
        ) from error
    if not prepared:
        raise UserError(
            f"{label}: is not prepared in {builder.data_path}; prepare it in Python with {prepare}, or set TFDS_DATA_DIR to "
            "the folder in which it was prepared."
        )
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise UserError(
            f"{label}: is prepared as {file_format}, which has no rows by number; prepare it as ArrayRecord, in Python with "
            f"{prepare}."
        )
    return builder


def _parse(features: Any, record: bytes) -> Row:
    """Returns the row in a record. Raises RowError."""
    try:
        row = features.deserialize_example_np(record)
    except Exception as error:  # every feature has a decoder of its own, whose errors could be any
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise RowError(f"cannot be decoded by TFDS ({reason}); prepare the data set again.") from error
    return _plain(features, row)


def _plain(feature: Any, value: Any) -> Any:
    """Returns a value of a feature as plain Python: names for class labels, lists of objects for sequences of them."""
    from tensorflow_datasets.core import features as kinds

    if isinstance(feature, kinds.FeaturesDict):
        return {name: _plain(feature[name], value[name]) for name in feature}
    if isinstance(feature, kinds.Dataset):
        return [_plain(feature.feature, item) for item in value]
    if isinstance(feature, kinds.Sequence):
        if isinstance(feature.feature, kinds.FeaturesDict):  # TFDS keeps them as lists side by side
            value = [_element(value, index) for index in range(_length(value))]
        return [_plain(feature.feature, item) for item in value]
    if isinstance(feature, kinds.ClassLabel):
        return feature.int2str(int(value)) if value >= 0 else None
    return _leaf(value)


def _length(value: Any) -> int:
    return max(map(_length, value.values()), default=0) if isinstance(value, dict) else len(value)


def _element(value: Any, index: int) -> Any:
    return {name: _element(items, index) for name, items in value.items()} if isinstance(value, dict) else value[index]


def _leaf(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, list):
        return [_leaf(item) for item in value]
    return text_or_bytes(value) if isinstance(value, bytes) else value
