"""Reading Hugging Face directories: equal to transformers, equal on every mesh, and whatever is wrong is named."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny_models import ALL_CONFIGS, CONFIGS, FAMILY_CONFIGS, random_decoder, to_tensors, torch_model

import sft_jax
from sft_jax.errors import UserError
from sft_jax.hf.files import SINGLE_FILE
from sft_jax.hf.load import abstract_decoder, load, load_decoder
from sft_jax.hf.source import read_source
from sft_jax.model.options import Options
from sft_jax.model.sharding import make_mesh, named_leaves, shardings

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory written without transformers, for tests that change it: (folder, tensors)."""
    folder = tmp_path_factory.mktemp("written")
    tensors = write_folder(folder, "llama")
    return folder, tensors


def write_folder(folder, name: str) -> dict[str, np.ndarray]:
    decoder = random_decoder(name)
    tensors = {key: np.ascontiguousarray(value) for key, value in to_tensors(decoder, decoder, ALL_CONFIGS[name]).items()}
    safetensors.numpy.save_file(tensors, folder / SINGLE_FILE)
    (folder / "config.json").write_text(json.dumps(ALL_CONFIGS[name]))
    return tensors


def changed(tmp_path, written, tensors=None, **config):
    """Returns a copy of the directory with other tensors, other fields of config.json, or fields taken out (None)."""
    folder = tmp_path / "changed"
    shutil.copytree(written[0], folder)
    if tensors is not None:
        safetensors.numpy.save_file({**written[1], **tensors}, folder / SINGLE_FILE)
    merged = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in merged.items() if v != "REMOVE"}))
    return folder


def equal(ours, theirs) -> bool:
    pairs = zip(named_leaves(ours), named_leaves(theirs), strict=True)
    arrays = [(np.asarray(a.get_value()), np.asarray(b.get_value())) for (_, a), (_, b) in pairs]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in arrays)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, hf_folder):
    torch = pytest.importorskip("torch")
    model, tokenizer = load(hf_folder(name))
    with torch.no_grad():
        expected = torch_model(name)(torch.tensor(TOKENS).long()).logits.numpy()
    assert tokenizer is None
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(model, TOKENS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_shards_equal_a_single_file(name, hf_folder):
    sharded = hf_folder(name, "float32", "20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert equal(load(sharded)[0], load(hf_folder(name))[0])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", dict(fsdp=8)), ("llama", dict(fsdp=4, tensor=2)), ("llama", dict(data=2, fsdp=2, context=2)),
        ("gemma3", dict(fsdp=4, tensor=2)), ("gpt_oss", dict(fsdp=1, expert=4, tensor=2)),
    ],
)
def test_every_mesh_gives_the_same_parameters(name, sizes, tmp_path):
    write_folder(tmp_path, name)
    mesh = make_mesh(**sizes)
    decoder = load_decoder(tmp_path, Options(), mesh)
    assert equal(decoder, random_decoder(name))
    for (path, leaf), (_, place) in zip(named_leaves(decoder), named_leaves(shardings(decoder, mesh)), strict=True):
        assert leaf.get_value().sharding == place.get_value(), path


def test_a_sharded_model_computes_the_same(written):
    alone, spread = load(written[0])[0], load(written[0], mesh=make_mesh(1, 4, 2))[0]
    np.testing.assert_allclose(spread(TOKENS), alone(TOKENS), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_of_the_file_is_kept_or_changed(dtype, hf_folder):
    folder = hf_folder("gemma2", dtype)
    expected = safetensors.numpy.load_file(folder / SINGLE_FILE)
    for asked in (None, "float32"):
        decoder = load_decoder(folder, Options(), param_dtype=asked)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(decoder)} == {asked or dtype}
        tensors = to_tensors(decoder, decoder, CONFIGS["gemma2"])
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, expected[name].astype(tensor.dtype))


def test_a_stack_of_several_dtypes_holds_all_of_them_exactly(tmp_path, written):
    name = "model.layers.1.mlp.up_proj.weight"
    half = written[1][name].astype(np.float16)
    decoder = load_decoder(changed(tmp_path, written, {name: half}), Options())
    read = to_tensors(decoder, decoder, CONFIGS["llama"])[name]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, half)


def test_the_real_checkpoint(assets):
    """A trained model from outside: the losses per token that an independent float64 implementation gives."""
    model, tokenizer = sft_jax.load(assets / "models" / "stories260k")
    records = json.loads((assets / "reference" / "stories260k_nll.json").read_text())["records"]
    assert len(records) >= 3
    log_probs = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)))
    for record in records[:3]:
        ids = record["ids"]
        assert tokenizer.encode(record["text"]) == ids[1:]
        tokens = np.zeros((1, 80), np.int32)  # what follows changes nothing before it
        tokens[0, : len(ids)] = ids
        predicted = np.asarray(log_probs(model, tokens))[0, np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(-predicted, record["nll"], atol=1e-4)
    assert tokenizer.bos_id == 1


def test_source(written):
    decoder = load_decoder(written[0], Options())
    assert decoder.source.name == str(written[0]) and decoder.source.config_dict() == CONFIGS["llama"]
    assert decoder.source.ignored == () and decoder.source.dtype is None


# ---- random initialisation


def test_random_parameters_are_the_same_on_every_mesh(written):
    alone = load_decoder(written[0], Options(), init="random", seed=3)
    spread = load_decoder(written[0], Options(), make_mesh(1, 4, 2), init="random", seed=3)
    assert equal(alone, spread)
    assert not equal(alone, load_decoder(written[0], Options(), init="random", seed=4))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(alone)} == {"float32"}


def test_random_needs_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    decoder = load_decoder(tmp_path, Options(), param_dtype="bfloat16", init="random")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(decoder)} == {"bfloat16"}
    with pytest.raises(UserError, match="holds no weights"):
        load_decoder(tmp_path, Options())


def test_the_abstract_decoder_is_the_one_that_is_loaded(written):
    mesh = make_mesh(1, 4, 2)
    abstract = abstract_decoder(read_source(written[0], str(written[0])), Options(), mesh)
    loaded = load_decoder(written[0], Options(), mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(loaded)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(loaded), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)


# ---- what is left out


def test_buffers_of_old_exports_are_left_out_and_named(tmp_path, written):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    decoder = load_decoder(changed(tmp_path, written, extra), Options())
    assert decoder.source.ignored == tuple(extra)
    assert equal(decoder, random_decoder("llama"))


def test_a_tied_head_may_be_stored_twice_if_it_is_the_same(tmp_path):
    tensors = write_folder(tmp_path, "gemma2")
    embedding = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file({**tensors, "lm_head.weight": embedding.copy()}, tmp_path / SINGLE_FILE)
    assert load_decoder(tmp_path, Options()).source.ignored == ("lm_head.weight",)
    other = embedding.copy()
    other[-1, -1] += 1e-3
    for head in (other, embedding[:-1].copy(), embedding.astype(np.float16), np.array(1.0, np.float32)):
        safetensors.numpy.save_file({**tensors, "lm_head.weight": head}, tmp_path / SINGLE_FILE)
        with pytest.raises(UserError, match="'lm_head.weight' differs from 'model.embed_tokens.weight'.*tie_word_emb"):
            load_decoder(tmp_path, Options())


# ---- what is wrong


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 4}, r"lacks 9 tensors .*'model.layers.3.*config.json and weights must be of the same"),
        ({"num_hidden_layers": 2}, "holds 9 tensors that the model has no place for: 'model.layers.2."),
        ({"intermediate_size": 60}, r"has the shape \[56, 32\], but config.json asks for \[60, 32\]"),
        ({"vocab_size": 97}, r"'model.embed_tokens.weight' has the shape \[96, 32\], .* asks for \[97, 32\]"),
        ({"tie_word_embeddings": True}, "'lm_head.weight' differs from"),
        ({"attention_bias": True}, r"lacks 12 tensors .*'model.layers.0.self_attn.q_proj.bias'"),
        (
            {"architectures": ["LlammaForCausalLM"]},
            "architecture 'LlammaForCausalLM' .* did you mean 'LlamaForCausalLM'",
        ),
        ({"rms_norm_eps": "REMOVE"}, "rms_norm_eps"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_config_and_weights_that_do_not_match(tmp_path, written, config, message):
    folder = changed(tmp_path, written, **config)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


def test_weights_that_are_no_floats(tmp_path, written):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = changed(tmp_path, written, {name: written[1][name].astype(np.int8)})
    with pytest.raises(UserError, match=f"tensor '{name}' is int8; parameters must be float32, bfloat16, float16"):
        load(folder)


def test_a_mesh_that_does_not_divide(written):
    with pytest.raises(UserError, match="mesh.tensor=4 does not divide 2 kv_heads"):
        load_decoder(written[0], Options(), make_mesh(1, 2, 4))


def test_names_that_are_no_choice(written):
    with pytest.raises(UserError, match="model.init: must be 'checkpoint' or 'random', not 'zeros'"):
        load_decoder(written[0], Options(), init="zeros")
    with pytest.raises(UserError, match="model.dtype: must be one of .*, not 'int8'"):
        load_decoder(written[0], Options(), param_dtype="int8")
    with pytest.raises(UserError, match="model.dtype: must be one of .*, not 'int8'"):
        load_decoder(written[0], Options(), param_dtype="int8", init="random")


def test_places_without_a_model(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    cases = {
        tmp_path / "file": "is a file; name the directory",
        tmp_path / "empty": "holds no config.json",
        tmp_path / "broken": r"broken/config.json: is no valid JSON",
        tmp_path / "absent": "there is no such directory",
        "some-org/no-such-model": "is not a directory here, and the Hugging Face hub cannot be reached",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            load(path)


def test_a_model_without_pickle_is_asked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="as pickle"):
        load(tmp_path)
