"""Safetensors directories read with nothing but `os.preadv`: headers first, then byte ranges.

The format (https://huggingface.co/docs/safetensors) is eight bytes of header length, a JSON header
`{name: {dtype, shape, data_offsets}}` and the tensors' bytes, little-endian and row-major. Every number in the header
is checked against the file before a tensor is read, so a cut, padded or forged file is refused by name. Nothing is
unpickled, and an index file cannot reach outside its directory.
"""

import json
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from sft_jax.errors import UserError

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_COMPARE_BYTES = 1 << 26  # of two tensors, held at a time
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_PIECE = 1 << 26  # bytes that one thread reads; Linux returns at most 2 GiB - 4 KiB to a call
_READERS = 8  # threads that read one tensor: fast disks, and those behind a network, are faster so
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OTHER = (".gguf", ".msgpack", ".h5", ".npz", ".onnx")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` from byte `start` of `file`, row-major."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorDirectory:
    """The tensors of a Hugging Face directory by name. Headers are in memory, data stays in the files."""

    folder: Path
    tensors: dict[str, TensorInfo]

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """Returns rows [first, first + count) of tensor `name` along its first axis: one contiguous byte range.

        Raises UserError if the file has become shorter than its header says.
        """
        info = self.tensors[name]
        shape = info.shape
        if shape and (first, count) != (0, None):
            count = shape[0] - first if count is None else count
            assert 0 <= first <= first + count <= shape[0], (name, first, count, shape)
            shape = (count, *shape[1:])
        row_bytes = math.prod(shape[1:]) * info.dtype.itemsize
        data = np.empty(math.prod(shape) * info.dtype.itemsize, np.uint8)
        _read_into(info.file, info.start + first * row_bytes, memoryview(data))
        return data.view(info.dtype).reshape(shape)


def open_tensors(folder: str | Path) -> TensorDirectory:
    """Reads the headers of a directory's `model.safetensors`, or of the shards its index names.

    Raises UserError naming the file and tensor where weights are missing, in another format, cut, damaged, of an
    unknown dtype, or named by the index outside the directory.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: is no directory; name a Hugging Face directory that holds {SINGLE_FILE}.")
    if (folder / SINGLE_FILE).is_file():
        return TensorDirectory(folder, read_header(folder / SINGLE_FILE))
    if (folder / INDEX_FILE).is_file():
        return TensorDirectory(folder, _read_shards(folder))
    raise UserError(no_weights(str(folder), (path.name for path in folder.iterdir())))


def equal_bytes(ours: TensorDirectory, our_name: str, theirs: TensorDirectory, their_name: str) -> bool:
    """Returns whether two tensors of one shape and dtype hold the same bytes, comparing some rows at a time."""
    info = ours.tensors[our_name]
    if not info.shape:
        return ours.read(our_name).tobytes() == theirs.read(their_name).tobytes()
    rows = max(1, _COMPARE_BYTES * info.shape[0] // max(1, info.nbytes))
    for first in range(0, info.shape[0], rows):
        count = min(rows, info.shape[0] - first)
        if ours.read(our_name, first, count).tobytes() != theirs.read(their_name, first, count).tobytes():
            return False
    return True


def has_weights(folder: Path) -> bool:
    """Returns whether a directory holds weights that `open_tensors` reads, or tries to."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of one safetensors file, checked against the size of the file; data is not read."""
    try:
        size = path.stat().st_size
        if size < 8:
            raise UserError(f"{path}: is cut: {size} bytes do not hold a safetensors header; download the file again.")
        length = int.from_bytes(_read_range(path, 0, 8), "little")
        if length > _MAX_HEADER:
            raise UserError(
                f"{path}: says its header is {length} bytes long, above the format's limit; it is no safetensors file, "
                "or damaged; download it again."
            )
        if 8 + length > size:
            raise UserError(
                f"{path}: is cut: its header ends at byte {8 + length} and the file has {size}; download it again."
            )
        header = parse_json(_read_range(path, 8, length), f"{path}: header")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, tensors.values(), 8 + length, size)
    return tensors


def read_json(path: Path) -> dict:
    """Returns the JSON object in a file; raises UserError naming the file for anything else."""
    return parse_json(read_bytes(path), f"{path}:")


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error


def parse_json(data: bytes, what: str) -> dict:
    """Returns the JSON object in `data`; raises UserError beginning with `what` for anything else."""

    def unique(pairs):
        result = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"key '{key}' occurs twice")
            result[key] = value
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is no valid JSON ({error}); the file is damaged, download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{what} is no JSON object; the file is damaged, download it again.")
    return value


def _tensor_info(path: Path, name: str, entry, data_start: int) -> TensorInfo:
    where = f"{path}: tensor '{name}'"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UserError(f"{where}: has no dtype, shape and data_offsets; the file is damaged, download it again.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise UserError(f"{where}: has the unknown dtype {dtype!r}; known are {', '.join(DTYPES)}.")
    if not _is_sizes(shape):
        raise UserError(f"{where}: has the shape {shape!r}, which is no list of sizes; the file is damaged.")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{where}: has the data_offsets {offsets!r}, which are no range of bytes; the file is damaged.")
    info = TensorInfo(name, DTYPES[dtype], tuple(shape), path, data_start + offsets[0])
    if info.nbytes != offsets[1] - offsets[0]:
        raise UserError(
            f"{where}: {dtype} {shape} takes {info.nbytes} bytes, but its data_offsets {offsets} hold "
            f"{offsets[1] - offsets[0]}; the file is damaged, download it again."
        )
    return info


def _is_sizes(value) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    """Raises UserError unless the tensors cover the data of the file exactly, without overlap or gap."""
    end, before = data_start, "the header"
    for info in sorted(tensors, key=lambda info: (info.start, info.nbytes)):
        if info.start + info.nbytes > size:
            raise UserError(
                f"{path}: is cut: tensor '{info.name}' ends at byte {info.start + info.nbytes} "
                f"and the file has {size}; download it again."
            )
        if info.start != end:
            fault = "overlaps" if info.start < end else "leaves a gap after"
            raise UserError(f"{path}: tensor '{info.name}' {fault} {before}; the file is damaged, download it again.")
        end, before = info.start + info.nbytes, f"tensor '{info.name}'"
    if end != size:
        raise UserError(
            f"{path}: has {size - end} bytes after its last tensor; the file is damaged, download it again."
        )


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map of tensor names to files; download it again.")
    headers, tensors = {}, {}
    for name, shard in weight_map.items():
        path = _shard_path(folder, index, name, shard)
        if shard not in headers:
            headers[shard] = read_header(path)
        if name not in headers[shard]:
            raise UserError(f"{index}: places tensor '{name}' in {shard}, which does not hold it; download both again.")
        tensors[name] = headers[shard][name]
    for shard, header in headers.items():
        for name in header:
            if weight_map.get(name) != shard:
                raise UserError(
                    f"{folder / shard}: holds tensor '{name}', which {INDEX_FILE} "
                    f"{'does not name' if name not in weight_map else 'places in ' + weight_map[name]}; "
                    "index and shards are not of one checkpoint, download all of them again."
                )
    return tensors


def _shard_path(folder: Path, index: Path, name: str, shard) -> Path:
    """Returns the file of a shard; raises UserError if it is missing or lies outside the directory."""
    where = f"{index}: tensor '{name:.200}' is placed in {shard!r:.200}"
    if not isinstance(shard, str) or not shard.endswith(".safetensors"):
        raise UserError(f"{where}, which is no safetensors file.")
    if os.path.isabs(shard) or ".." in Path(shard).parts:
        raise UserError(f"{where}, outside the directory; such an index is refused.")
    path = folder / shard
    try:
        found = path.exists()
    except (OSError, ValueError):  # no file of such a name can exist: it is too long, or no text
        found = False
    if not found:
        raise UserError(f"{where}, which is missing from {folder}; download the shard.")
    allowed = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":  # the hub's cache links snapshots/REVISION/FILE to blobs/HASH
        allowed.append((folder.absolute().parent.parent / "blobs").resolve())
    if not any(path.resolve().is_relative_to(root) for root in allowed):
        raise UserError(f"{where}, a link to {path.resolve()} outside the directory; copy the file into {folder}.")
    return path


def no_weights(folder: str, names: Iterable[str]) -> str:
    """Returns what to tell of a directory or a repository with these files, none of which are weights that are read."""
    names = sorted(names)
    unsafe = [name for name in names if name.endswith(_UNSAFE)]
    if "adapter_model.safetensors" in names:
        return f"{folder}: holds an adapter and no model; name the base model's directory."
    if any(name.endswith(".safetensors") for name in names):
        found = ", ".join(name for name in names if name.endswith(".safetensors"))
        return f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE} (found {found}); download the index as well."
    if unsafe:
        return (
            f"{folder}: holds its weights as pickle ({', '.join(unsafe[:3])}), which can run code and is never read. "
            'Convert it where you trust it: `python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('DIR', dtype='auto').save_pretrained('OUT')\"` writes safetensors; then name OUT."
        )
    other = [name for name in names if name.endswith(_OTHER)]
    if other:
        return f"{folder}: holds its weights as {other[0]}; a directory with {SINGLE_FILE} is needed."
    return f"{folder}: holds no weights; a Hugging Face directory with {SINGLE_FILE} or {INDEX_FILE} is needed."


def _read_range(path: Path, start: int, count: int) -> bytes:
    data = bytearray(count)
    _read_into(path, start, memoryview(data))
    return bytes(data)


def _read_into(path: Path, start: int, target: memoryview) -> None:
    try:
        file = os.open(path, os.O_RDONLY)
        read = lambda first: _read_piece(path, file, start + first, target[first : first + _PIECE])  # noqa: E731
        try:
            if len(target) <= _PIECE:
                read(0)
                return
            with ThreadPoolExecutor(_READERS) as readers:
                for _ in readers.map(read, range(0, len(target), _PIECE)):  # raises what they raised
                    pass
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error


def _read_piece(path: Path, file: int, start: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], start + done)
        if count == 0:
            raise UserError(f"{path}: ended at byte {start + done} while being read; download it again.")
        done += count
