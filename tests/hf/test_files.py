"""Safetensors directories: what the reference library writes is read back, and every damaged file is named."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.errors import UserError
from sft_jax.hf import files
from sft_jax.hf.files import INDEX_FILE, SINGLE_FILE, open_tensors, parse_json, read_header

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(4, 3),
    "b": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
    "c": np.arange(5, dtype=np.int64),
    "d": np.array(2.5, np.float16),
    "e": np.zeros((0, 4), np.float32),
    "f": np.array([[True], [False]]),
}


def write_raw(path, header: dict | bytes, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape, start, stop, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def folder(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    shards = {"x-1.safetensors": ["a", "b"], "x-2.safetensors": ["c", "d", "e", "f"]}
    for shard, names in shards.items():
        safetensors.numpy.save_file({name: TENSORS[name] for name in names}, tmp_path / shard)
    write_index(tmp_path, {name: shard for shard, names in shards.items() for name in names})
    return tmp_path


def write_index(folder, weight_map) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map(folder) -> dict:
    return json.loads((folder / INDEX_FILE).read_text())["weight_map"]


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_reads_what_the_reference_writes(kind, request):
    tensors = open_tensors(request.getfixturevalue(kind))
    assert tensors.tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        read = tensors.read(name)
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        assert read.tobytes() == value.tobytes()


@given(first=st.integers(0, 4), data=st.data())
def test_reads_rows(tmp_path_factory, first, data):
    count = data.draw(st.integers(0, 4 - first))
    folder = tmp_path_factory.getbasetemp() / "rows"
    if not folder.exists():
        folder.mkdir()
        safetensors.numpy.save_file(TENSORS, folder / SINGLE_FILE)
    read = open_tensors(folder).read("a", first, count)
    np.testing.assert_array_equal(read, TENSORS["a"][first : first + count])


def test_every_cut_is_noticed(folder):
    path = folder / SINGLE_FILE
    whole = path.read_bytes()
    for size in [0, 7, 8, 40, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model\.safetensors: .*is cut"):
            open_tensors(folder)


def test_bytes_at_the_end_are_noticed(folder):
    with open(folder / SINGLE_FILE, "ab") as file:
        file.write(b"\0\0\0")
    with pytest.raises(UserError, match="has 3 bytes after its last tensor"):
        open_tensors(folder)


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (b"{not json", 0, "header is no valid JSON"),
        (b"[1, 2]", 0, "header is no JSON object"),
        (b"\xff\xfe{}", 0, "header is no valid JSON"),
        (b"[" * 100_000, 0, "header is no valid JSON"),
        (b'{"t": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "t": {}}', 4, "key 't' occurs twice"),
        ({"t": 3}, 0, "'t': has no dtype"),
        ({"t": {"dtype": "F32", "shape": [1]}}, 4, "'t': has no dtype, shape and data_offsets"),
        ({"t": entry([1], 0, 4, "F3")}, 4, "'t': has the unknown dtype 'F3'; known are F64, F32"),
        ({"t": entry([-1], 0, 4)}, 4, "'t': has the shape"),
        ({"t": entry([1.0], 0, 4)}, 4, "'t': has the shape"),
        ({"t": entry([True], 0, 4)}, 4, "'t': has the shape"),
        ({"t": entry([1], 4, 0)}, 4, "'t': has the data_offsets"),
        ({"t": entry([1], -4, 0)}, 4, "'t': has the data_offsets"),
        ({"t": entry([2], 0, 4)}, 4, r"'t': F32 \[2\] takes 8 bytes, but its data_offsets \[0, 4\] hold 4"),
        ({"t": entry([1], 400, 404)}, 4, "is cut: tensor 't' ends at byte"),
        ({"t": entry([2], 0, 8), "u": entry([1], 4, 8)}, 8, "tensor 'u' overlaps tensor 't'"),
        ({"t": entry([1], 0, 4), "u": entry([1], 8, 12)}, 12, "tensor 'u' leaves a gap after tensor 't'"),
        ({"t": entry([1], 4, 8)}, 8, "tensor 't' leaves a gap after the header"),
    ],
)  # fmt: skip
def test_bad_headers(tmp_path, header, size, message):
    write_raw(tmp_path / SINGLE_FILE, header, b"\0" * size)
    with pytest.raises(UserError, match=message) as error:
        open_tensors(tmp_path)
    assert str(tmp_path / SINGLE_FILE) in str(error.value)


def test_a_header_length_beyond_the_limit(tmp_path):
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(UserError, match="no safetensors file"):
        open_tensors(tmp_path)


@given(noise=st.binary(max_size=64))
def test_noise_is_never_a_traceback(tmp_path_factory, noise):
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    for data in (noise, struct.pack("<Q", len(noise)) + noise):
        path.write_bytes(data)
        try:
            tensors = read_header(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert json.loads(noise) == {} and tensors == {}


@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_header_byte_is_refused_or_consistent(tmp_path_factory, position, value):
    path = tmp_path_factory.getbasetemp() / "flip.safetensors"
    data = bytearray(safetensors.numpy.save(TENSORS))
    size = len(data)
    data[min(position, size - 1)] = value
    path.write_bytes(data)
    try:
        tensors = read_header(path)
    except UserError:
        return
    assert sum(info.nbytes for info in tensors.values()) <= size
    for info in tensors.values():
        assert 8 <= info.start and info.start + info.nbytes <= size


def test_tensors_read_by_several_threads(folder, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 7)
    tensors = open_tensors(folder)
    for name, value in TENSORS.items():
        assert tensors.read(name).tobytes() == value.tobytes()


@pytest.mark.parametrize("piece", [1 << 26, 7])
def test_a_file_cut_after_it_was_opened(piece, folder, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", piece)
    tensors = open_tensors(folder)
    with open(folder / SINGLE_FILE, "r+b") as file:
        file.truncate(os.path.getsize(folder / SINGLE_FILE) - 30)
    with pytest.raises(UserError, match="ended at byte"):
        for name in TENSORS:
            tensors.read(name)


def test_a_missing_shard(sharded):
    (sharded / "x-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"tensor 'c' is placed in 'x-2.safetensors', which is missing"):
        open_tensors(sharded)


@pytest.mark.parametrize("stem", ["x" * 300, "a\0b", "\ud800"])
def test_a_shard_that_no_file_can_be(sharded, stem):
    write_index(sharded, {**weight_map(sharded), "a": f"{stem}.safetensors"})
    with pytest.raises(UserError, match="tensor 'a' is placed in .*, which is missing") as error:
        open_tensors(sharded)
    str(error.value).encode("utf-8")


def test_a_tensor_whose_name_is_no_text(sharded):
    write_index(sharded, {**weight_map(sharded), "\ud800": "x-1.safetensors"})
    with pytest.raises(UserError, match="places tensor .*ud800") as error:
        open_tensors(sharded)
    str(error.value).encode("utf-8")


@pytest.mark.parametrize("shard", ["../x.safetensors", "sub/../../x.safetensors", "/tmp/x.safetensors"])
def test_an_index_that_leads_outside(sharded, shard):
    safetensors.numpy.save_file(TENSORS, sharded.parent / "x.safetensors")
    write_index(sharded, {**weight_map(sharded), "a": shard})
    with pytest.raises(UserError, match="tensor 'a' is placed in .*, outside the directory"):
        open_tensors(sharded)


def test_a_link_that_leads_outside(sharded, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x-2.safetensors"
    (sharded / "x-2.safetensors").rename(outside)
    (sharded / "x-2.safetensors").symlink_to(outside)
    with pytest.raises(UserError, match="a link to .* outside the directory"):
        open_tensors(sharded)


def test_the_links_of_the_hub_cache(sharded, tmp_path_factory):
    cache = tmp_path_factory.mktemp("models--org--name")
    (cache / "blobs").mkdir()
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for path in sharded.iterdir():
        path.rename(cache / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert open_tensors(snapshot).read("a").tobytes() == TENSORS["a"].tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": "x-1.safetensors"}, "places tensor 'z' in x-1.safetensors, which does not hold it"),
        ({"a": "x-2.safetensors"}, "places tensor 'a' in x-2.safetensors, which does not hold it"),
        ({"a": "x.bin"}, "'x.bin', which is no safetensors file"),
        ({"a": 3}, "3, which is no safetensors file"),
        ({"a": ["x"]}, "which is no safetensors file"),
    ],
)
def test_an_index_that_disagrees_with_its_shards(sharded, change, message):
    write_index(sharded, {**weight_map(sharded), **change})
    with pytest.raises(UserError, match=message):
        open_tensors(sharded)


def test_a_tensor_that_the_index_leaves_out(sharded):
    names = weight_map(sharded)
    del names["b"]
    write_index(sharded, names)
    with pytest.raises(UserError, match="x-1.safetensors: holds tensor 'b', which .* does not name"):
        open_tensors(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_a_damaged_index(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin"], r"as pickle \(pytorch_model.bin\).*save_pretrained"),
        (["model.pt"], "as pickle"),
        (["model.gguf"], "as model.gguf"),
        (["model-00001-of-00002.safetensors"], "found model-00001-of-00002.safetensors"),
        (["adapter_model.safetensors"], "holds an adapter"),
        (["config.json"], "holds no weights"),
    ],
)
def test_directories_without_safetensors(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        open_tensors(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(UserError, match="is no directory"):
        open_tensors(tmp_path / "absent")


def test_parse_json_names_what_it_reads():
    with pytest.raises(UserError, match="here is no valid JSON"):
        parse_json(b"{", "here")
