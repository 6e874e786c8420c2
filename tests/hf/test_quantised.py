"""Files that hold quantised tensors: the numbers are those of transformers' dequantisation, and the export is plain."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny_models import CONFIGS, random_decoder, to_tensors

from sft_jax.errors import UserError
from sft_jax.hf.export import export_checkpoint
from sft_jax.hf.files import SINGLE_FILE, open_tensors
from sft_jax.hf.load import load, load_decoder
from sft_jax.hf.names import NAMES
from sft_jax.hf.names.parts import body
from sft_jax.hf.names.table import NameTable
from sft_jax.hf.quantised import METHODS, open_model, plain_config
from sft_jax.hf.source import read_source
from sft_jax.model.options import Options
from sft_jax.model.sharding import make_mesh, named_leaves

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 8]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
RNG = np.random.default_rng(0)


def write(folder, tensors: dict[str, np.ndarray], section: dict, config: dict | None = None):
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / SINGLE_FILE)
    (folder / "config.json").write_text(json.dumps({**(config or {}), "quantization_config": section}))
    return folder


def in_files(folder) -> dict[str, np.ndarray]:
    directory = open_tensors(folder)
    return {name: directory.read(name) for name in directory.tensors}


def every_range(directory, name: str, whole: np.ndarray) -> None:
    """What is read from any row to any other is that part of the whole."""
    assert (directory.tensors[name].shape, directory.tensors[name].dtype) == (whole.shape, BF16)
    assert directory.read(name).tobytes() == whole.tobytes()
    for first in range(len(whole)):
        assert directory.read(name, first).tobytes() == whole[first:].tobytes()
        for count in range(len(whole) - first + 1):
            assert directory.read(name, first, count).tobytes() == whole[first : first + count].tobytes()


# ---- the numbers


def random_fp8(shape, scale_shape, scale_dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Every byte but the two that are NaN, and scales as they occur."""
    codes = RNG.integers(0, 254, shape).astype(np.uint8)
    codes += codes >= 127
    return codes.view(ml_dtypes.float8_e4m3fn), (RNG.random(scale_shape) * 1e-3 + 1e-5).astype(scale_dtype)


@pytest.mark.parametrize("scale_dtype", [np.float32, BF16])
def test_fp8_blocks_are_those_of_transformers(scale_dtype, tmp_path):
    torch = pytest.importorskip("torch")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight, scale = random_fp8((48, 24), (3, 3), scale_dtype)
    directory = open_model(write(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scale, "x.bias": np.ones(3)}, FP8))
    codes = torch.tensor(weight.view(np.uint8)).view(torch.float8_e4m3fn)
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(codes, torch.tensor(scale.astype(np.float32)), torch.bfloat16)
    every_range(directory, "x.weight", theirs.view(torch.uint16).numpy().view(BF16))
    assert directory.tensors.keys() == {"x.weight", "x.bias"} and directory.read("x.bias").dtype == np.float64


@pytest.mark.parametrize("shape", [(37, 19), (5, 3), (16, 9)])
def test_fp8_blocks_that_do_not_divide(shape, tmp_path):
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows in blocks of 128: its kernel reads scale [i // 128, j // 128]."""
    weight, scale = random_fp8(shape, tuple(-(-size // b) for size, b in zip(shape, (16, 8), strict=True)))
    expected = np.empty(shape, BF16)
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected[i, j] = np.float32(weight[i, j]) * scale[i // 16, j // 8]
    every_range(open_model(write(tmp_path, {"x": weight, "x_scale_inv": scale}, FP8)), "x", expected)


@pytest.mark.parametrize("scale_shape", [(), (1,)])
def test_fp8_with_one_scale_of_a_static_scheme(scale_shape, tmp_path):
    """As Ministral 3 is published: scales of the activations are of no use, and left out."""
    weight, scale = random_fp8((9, 6), scale_shape, BF16)
    section = {**FP8, "weight_block_size": None, "activation_scheme": "static", "modules_to_not_convert": ["lm_head"]}
    tensors = {"x.weight": weight, "x.weight_scale_inv": scale, "x.activation_scale": scale}
    directory = open_model(write(tmp_path, tensors, section))
    assert directory.tensors.keys() == {"x.weight"}
    expected = (weight.astype(np.float32) * np.float32(scale.reshape(()))).astype(BF16)
    every_range(directory, "x.weight", expected)


def test_mxfp4_is_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = RNG.integers(0, 256, (3, 6, 2, 16)).astype(np.uint8)
    blocks[0, 0, 0], blocks[0, 0, 1] = np.arange(16) * 17, np.arange(16)  # every number in either half of a byte
    scales = RNG.integers(90, 160, (3, 6, 2)).astype(np.uint8)
    scales[1, 0] = 0, 254  # the smallest and the largest
    tensors = {"e.up_blocks": blocks, "e.up_scales": scales, "e.up_bias": np.ones(3)}
    directory = open_model(write(tmp_path, tensors, MXFP4))
    theirs = mxfp4.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    every_range(directory, "e.up", theirs.contiguous().view(torch.uint16).numpy().view(BF16))
    assert directory.tensors["e.up"].shape == (3, 64, 6) and directory.tensors.keys() == {"e.up", "e.up_bias"}


@pytest.mark.parametrize("method", METHODS)
def test_large_tensors_are_made_in_chunks(method, tmp_path, monkeypatch):
    """A chunk of a single number and one of everything give the same."""
    sections = {"fp8": {**FP8, "weight_block_size": None}, "mxfp4": MXFP4}
    weight, scale = random_fp8((9, 32), ())
    blocks = RNG.integers(0, 256, (2, 9, 1, 16)).astype(np.uint8)
    tensors = {
        "fp8": {"x": weight, "x_scale_inv": scale},
        "mxfp4": {"x_blocks": blocks, "x_scales": RNG.integers(120, 130, (2, 9, 1)).astype(np.uint8)},
    }
    directory = open_model(write(tmp_path, tensors[method], sections[method]))
    whole = directory.read("x")
    monkeypatch.setattr(f"sft_jax.hf.quantised.{method}.CHUNK", 1)
    assert directory.read("x").tobytes() == whole.tobytes()


# ---- a whole model


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A tiny Llama in float8 blocks, without embedding, head and norms, as published: (folder, the plain tensors)."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    decoder = random_decoder("llama")
    stored, plain = {}, {}
    for name, value in to_tensors(decoder, decoder, CONFIGS["llama"]).items():
        if "_proj" not in name:
            stored[name] = plain[name] = value.astype(BF16)
            continue
        height, width = value.shape
        scale = (RNG.integers(1, 9, (-(-height // 16), -(-width // 8))) * 2.0**-7).astype(np.float32)
        grid = np.repeat(np.repeat(scale, 16, 0), 8, 1)[:height, :width]
        stored[name] = (value / grid).astype(ml_dtypes.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        plain[name] = (stored[name].astype(np.float32) * grid).astype(BF16)
    return write(folder, stored, FP8, CONFIGS["llama"]), plain


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
def test_a_model_is_the_plain_one(sizes, quantised, tmp_path):
    folder, plain = quantised
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in plain.items()}, tmp_path / SINGLE_FILE)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    mesh = make_mesh(*sizes) if sizes != (1, 1, 1) else None
    ours, theirs = load_decoder(folder, Options(), mesh), load_decoder(tmp_path, Options(), mesh)
    for (path, a), (_, b) in zip(named_leaves(ours), named_leaves(theirs), strict=True):
        assert a.get_value().dtype == BF16 and np.array_equal(a.get_value(), b.get_value()), path
    assert ours.source.fingerprint == theirs.source.fingerprint


def test_the_export_is_plain_and_in_bfloat16(quantised, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, plain = quantised
    decoder, _ = load(folder)
    assert decoder.source.dtype == "bfloat16" and decoder.source.root == "model."
    export_checkpoint(decoder, None, tmp_path / "out", dtype=decoder.source.dtype)
    written = open_tensors(tmp_path / "out")
    assert written.tensors.keys() == plain.keys()
    for name, value in plain.items():
        assert written.read(name).tobytes() == value.tobytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**CONFIGS["llama"], "torch_dtype": "bfloat16"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = np.arange(20, dtype=np.int32)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(load_decoder(folder, Options(), param_dtype="float32")(tokens), expected, atol=1e-4)


def test_what_is_carried_is_plain_too(quantised, tmp_path, monkeypatch):
    """As the layers for multi-token prediction of DeepSeek-V3 are, which are float8 as the others."""
    folder, _ = quantised
    weight, scale = random_fp8((20, 12), (2, 2))
    stored = in_files(folder)
    extra = {"model.layers.3.x.weight": weight, "model.layers.3.x.weight_scale_inv": scale}
    base = write(tmp_path / "base", stored | extra, FP8, CONFIGS["llama"])
    monkeypatch.setitem(NAMES, "LlamaForCausalLM", NameTable(body(), carried=(r"model\.layers\.{layers}\..*",)))
    report = export_checkpoint(load(base)[0], None, tmp_path / "out")
    written = open_tensors(tmp_path / "out")
    assert report.carried == 1 and "model.layers.3.x.weight_scale_inv" not in written.tensors
    expected = open_model(base).read("model.layers.3.x.weight")
    assert expected.dtype == BF16 and written.read("model.layers.3.x.weight").tobytes() == expected.tobytes()
    assert written.tensors["model.layers.3.x.weight"].dtype == BF16


def test_the_dtype_that_config_names_stays(quantised, tmp_path):
    assert plain_config({"dtype": "float16", "quantization_config": FP8, "a": 1}, "DIR") == {"dtype": "float16", "a": 1}
    assert plain_config({"a": 1, "quantization_config": None}, "DIR") == {"a": 1, "quantization_config": None}
    assert "quantization_config" not in read_source(quantised[0], "name").config


# ---- what is wrong


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "the method 'gptq' is not read; Known: fp8, mxfp4. Take the"),
        ({"bits": 4}, "quantization_config: the method None is not read"),
        ([], r"quantization_config: the method None is not read"),
        ({"quant_method": ["fp8"]}, "is not read"),
        ({**FP8, "rotation": 1}, "quantization_config: the field 'rotation' is not known for this method"),
        ({**FP8, "fmt": "e5m2"}, "'fmt' is 'e5m2', which is not read; supported: 'e4m3'"),
        ({**FP8, "weight_block_size": [16]}, r"'weight_block_size' is \[16\]; it must be two whole numbers, or null"),
        ({**FP8, "weight_block_size": [16, 0]}, "it must be two whole numbers"),
        ({**FP8, "weight_block_size": [8, 8]}, r"has the shape \[2, 7\], but \[4, 7\] is what a weight of"),
        ({**FP8, "weight_block_size": None}, r"has the shape \[2, 7\], but \[\] is what .* in one piece"),
    ],
)
def test_sections_that_are_not_read(section, message, quantised, tmp_path):
    folder = write(tmp_path, in_files(quantised[0]), section, CONFIGS["llama"])
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


FLOAT8, SCALE = random_fp8((32, 16), (2, 2))
GOOD = {"x": FLOAT8, "x_scale_inv": SCALE}
BLOCKS, SCALES = np.zeros((2, 6, 3, 16), np.uint8), np.zeros((2, 6, 3), np.uint8)
PACKED = {"x_blocks": BLOCKS, "x_scales": SCALES}


@pytest.mark.parametrize(
    ("section", "tensors", "message"),
    [
        (FP8, {"x": FLOAT8}, "'x' is float8, and its scale 'x_scale_inv' is missing"),
        (FP8, {"x_scale_inv": SCALE}, "'x_scale_inv' is a scale of no tensor 'x'"),
        (FP8, {**GOOD, "x": FLOAT8.astype(np.float32)}, "'x' has a scale, but is float32 and not float8"),
        (FP8, {**GOOD, "x": FLOAT8[None]}, r"'x' is float8 and has the shape \[1, 32, 16\]"),
        (FP8, {**GOOD, "x_scale_inv": SCALE[:1]}, r"'x_scale_inv' has the shape \[1, 2\], but \[2, 2\] is"),
        (FP8, {**GOOD, "x_scale_inv": SCALE.astype(np.uint8)}, "'x_scale_inv' is uint8; scales are float32 or"),
        (MXFP4, {"x_blocks": BLOCKS}, "'x_blocks' is quantised, and 'x_scales' is missing"),
        (MXFP4, {"x_scales": SCALES}, "'x_scales' is quantised, and 'x_blocks' is missing"),
        (MXFP4, {**PACKED, "x_blocks": BLOCKS.astype(np.int8)}, "'x_blocks' is int8; in MXFP4 it is uint8"),
        (MXFP4, {**PACKED, "x_blocks": BLOCKS[..., :8]}, r"'x_blocks' has the shape \[2, 6, 3, 8\]; blocks are"),
        (MXFP4, {**PACKED, "x_scales": SCALES[:, :5]}, r"'x_scales' has the shape \[2, 5, 3\], but there are"),
        (MXFP4, {**PACKED, "x": BLOCKS}, "holds tensor 'x' both plain and quantised"),
    ],
)
def test_tensors_that_do_not_fit_the_method(section, tensors, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        open_model(write(tmp_path, tensors, section))
    assert str(tmp_path / SINGLE_FILE) in str(error.value)
