"""Writing safetensors files and directories: one tensor in memory at a time, and all or nothing."""

import contextlib
import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sft_jax.errors import UserError
from sft_jax.hf.files import DTYPES, INDEX_FILE, SINGLE_FILE

MAX_SHARD_SIZE = 5_000_000_000  # bytes of tensors in one file
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WRITE_CALL = 1 << 26  # bytes handed to the file at a time
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is going to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def plan_shards(tensors: Sequence[TensorSpec], max_shard_size: int) -> dict[str, list[TensorSpec]]:
    """Divides tensors, in their order, into files of at most `max_shard_size` bytes; a larger one has its own file."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_tensors(
    folder: Path,
    tensors: Sequence[TensorSpec],
    fetch: Callable[[str], np.ndarray],
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Writes `model.safetensors`, or shards and their index, calling `fetch(name)` once per tensor."""
    shards = plan_shards(tensors, max_shard_size)
    for file, shard in shards.items():
        write_file(folder / file, shard, fetch)
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
        metadata = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        write_text(folder / INDEX_FILE, to_json({"metadata": metadata, "weight_map": weight_map}))


def write_order(tensors: Sequence[TensorSpec], max_shard_size: int) -> list[str]:
    """Returns the names in the order in which `write_tensors` fetches them."""
    return [spec.name for shard in plan_shards(tensors, max_shard_size).values() for spec in _aligned(shard)]


def _aligned(tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Orders the tensors of a file so that each begins at a multiple of its dtype's size."""
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


def write_file(path: Path, tensors: Sequence[TensorSpec], fetch: Callable[[str], np.ndarray]) -> None:
    """Writes one safetensors file, calling `fetch(name)` once per tensor."""
    ordered = _aligned(tensors)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    start = 0
    for tensor in ordered:
        stop = start + tensor.nbytes
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]
        }  # fmt: skip
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            array = np.asarray(fetch(tensor.name), order="C")
            assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape), (tensor, array.dtype, array.shape)
            data = memoryview(array.reshape(-1).view(np.uint8))
            for first in range(0, len(data), _WRITE_CALL):
                file.write(data[first : first + _WRITE_CALL])
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def to_json(value: dict) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def new_directory(path: Path, size: int, overwrite: bool) -> Iterator[Path]:
    """Yields a directory beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    `size` bytes must be free. With `overwrite` an earlier export at `path` is replaced in the end; anything else that
    is there is never touched. Raises UserError naming `path` where it is taken, unwritable, or the disk is full.
    """
    partial, old = partial_path(path), path.with_name(f".{path.name}.old")
    _check_target(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # what a killed export left
        partial.mkdir()
        free = shutil.disk_usage(partial).free
        if free < size:
            raise OSError(errno.ENOSPC, f"{size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
        yield partial
        _sync_directory(partial)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        _sync_directory(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"{path}: the disk is full ({error.strerror}); free some space or name another place."
            ) from error
        raise UserError(f"{path}: cannot be written ({error.strerror}); name a place that can.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_path(path: Path) -> Path:
    """Returns where `new_directory(path)` keeps the directory until it is whole."""
    return path.with_name(f".{path.name}.partial")


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists() or path.is_dir() and not any(path.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{path}: is there already; name another place, or ask to overwrite it.")
    is_model = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    if not path.is_dir() or not is_model or not any(path.glob("*.safetensors")):
        raise UserError(f"{path}: is no exported model, so it is not overwritten; name another place.")


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
