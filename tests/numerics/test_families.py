"""Every family against transformers with the same weights: what it computes, what is trained, what is written, what it says."""

import copy
import json
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest
from family_configs import MORE_CONFIGS
from random_batches import random_batch
from tiny_models import ALL_CONFIGS, abstract, checkpoint_tensors, from_tensors, packed_rows, to_tensors, torch_model

from sft_jax.evaluation.generate import generate_ids
from sft_jax.hf.export import export_checkpoint
from sft_jax.hf.files import open_tensors
from sft_jax.hf.load import load_decoder
from sft_jax.hf.save import save
from sft_jax.model.decoder import Decoder
from sft_jax.model.loss import next_token_loss
from sft_jax.model.options import Options
from sft_jax.model.runs import layer_places
from sft_jax.model.sharding import named_leaves

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 48  # past the windows (8) and past the original length of the scaled ropes (16)
TOKENS = np.random.default_rng(1).integers(1, 92, (2, LENGTH)).astype(np.int32)  # below the tokens that mean an image
NEW = 10  # tokens that are generated


class Pair(NamedTuple):
    name: str
    theirs: torch.nn.Module
    tensors: dict[str, np.ndarray]  # of their checkpoint
    ours: Decoder


@pytest.fixture(scope="module", params=MORE_CONFIGS)
def pair(request) -> Iterator[Pair]:
    theirs = torch_model(request.param)
    tensors = checkpoint_tensors(theirs)
    yield Pair(request.param, theirs, tensors, from_tensors(abstract(request.param), tensors, ALL_CONFIGS[request.param]))
    jax.clear_caches()  # forty families' compiled programs are gigabytes


FORWARD = jax.jit(lambda decoder, *batch: decoder(*batch))


def their_logits(model, tokens: np.ndarray):
    return model(input_ids=torch.tensor(tokens).long()).logits


def with_options(decoder: Decoder, options: Options) -> Decoder:
    """The same parameters under other options."""
    other = jax.eval_shape(lambda: Decoder(decoder.spec, options, jax.random.key(0)))
    other.source = decoder.source
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(decoder))


def test_logits(pair):
    with torch.no_grad():
        expected = their_logits(pair.theirs, TOKENS).numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(FORWARD(pair.ours, TOKENS), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_scanned_equals_unrolled(pair):
    """The runs against a plain loop over layers taken from their places, on packed rows."""
    decoder = pair.ours
    tokens, positions, segments = packed_rows(np.random.default_rng(0), 2, LENGTH)
    with jax.disable_jit():
        x = decoder.embed(tokens, positions)
        lengths = np.stack([[positions[r, segments[r] == s].max() + 1 for s in segments[r]] for r in range(2)])
        tables = decoder.rope_tables(positions, lengths)
        for layer, place in zip(decoder.spec.layers, layer_places(decoder.spec), strict=True):
            block = jax.tree.map(lambda leaf, i=place.index: leaf[i], decoder.runs[place.run][place.place])
            x, _ = block(x, tables[layer.rope], decoder.mask(layer, positions, segments, positions, segments, True))
        unrolled = np.asarray(decoder.head(decoder.final_norm(x)))
    scanned = np.asarray(FORWARD(decoder, tokens, positions, segments))
    np.testing.assert_allclose(unrolled[segments > 0], scanned[segments > 0], atol=1e-4)


@pytest.mark.slow
def test_loss_and_gradient_of_packed_rows(pair):
    """Ours is of packed rows, theirs of each document alone; gradients by the names of the checkpoint."""
    batch = random_batch(2, LENGTH, seed=5, vocab=92)
    batch = batch._replace(tokens=np.maximum(batch.tokens, 1), targets=np.maximum(batch.targets, 1))
    theirs, ours = pair.theirs, with_options(pair.ours, Options(attention="reference"))
    total = lambda decoder: (loss := next_token_loss(decoder, batch)).total / loss.weight  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(total))(ours)

    theirs.zero_grad()
    expected = 0.0
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segments[row].max() + 1):
            here = batch.segments[row] == segment
            tokens, targets, weights = (torch.tensor(x[row, here]) for x in batch[:3])
            logits = their_logits(theirs, batch.tokens[row, here][None])[0]
            nll = torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
            expected = expected + (weights * nll).sum() / batch.weights.sum().item()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-4)
    named = checkpoint_tensors(of_gradients(theirs))
    found = to_tensors(ours, gradient, ALL_CONFIGS[pair.name])
    assert found.keys() <= named.keys()
    checked = 0
    for name, gradient in found.items():
        scale = np.linalg.norm(named[name])
        if scale == 0:  # chosen by, and not computed with
            assert name.endswith(("e_score_correction_bias",)) or ".experts." in name or "router" in name, name
            assert np.abs(gradient).max() == 0, name
            continue
        assert np.linalg.norm(gradient - named[name]) / scale < 1e-3, name
        checked += 1
    assert checked > 0.7 * len(found)


def of_gradients(model):
    """A copy of a transformers model with its gradients in place of the parameters, and nothing in place of buffers."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        gradients = dict(model.named_parameters())
        for name, parameter in copied.named_parameters():
            gradient = gradients[name].grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
        for name, buffer in copied.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
    return copied


@pytest.mark.slow
def test_import_then_export_is_the_same_bytes(pair, tmp_path):
    """As transformers writes it: one file in float32, and sharded in bfloat16."""
    for dtype, size, number in (("float32", "1GB", 10**9), ("bfloat16", "20KB", 20_000)):
        written, again = tmp_path / f"{dtype}-theirs", tmp_path / f"{dtype}-ours"
        copy.deepcopy(pair.theirs).to(getattr(torch, dtype)).save_pretrained(written, max_shard_size=size)
        save(load_decoder(written, Options()), None, again, max_shard_size=number)
        ours, theirs = open_tensors(again), open_tensors(written)
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name, info in theirs.tensors.items():
            assert (ours.tensors[name].dtype, ours.tensors[name].shape) == (info.dtype, info.shape), name
            assert ours.read(name).tobytes() == theirs.read(name).tobytes(), name
        expected = json.loads((written / "config.json").read_text())
        if "text_config" in expected:
            expected["text_config"]["dtype"] = dtype  # torch's `to` changes the outer one only
        assert json.loads((again / "config.json").read_text()) == expected


@pytest.mark.slow
def test_greedy_generation(pair):
    """Prompts shorter and longer than the windows; those of a scaling by length stay on one side of it."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, 92, size).tolist() for size in (20, 3)]
    by_length = "longrope" in json.dumps(ALL_CONFIGS[pair.name]) or "dynamic" in json.dumps(ALL_CONFIGS[pair.name])
    for prompt in prompts[:1] if by_length else prompts:
        got = generate_ids(pair.ours, [prompt], (), NEW)[0].ids
        tokens = list(prompt)
        for _ in range(NEW):  # without their cache, since for some families it is that of another computation
            with torch.no_grad():
                tokens.append(int(their_logits(pair.theirs, np.array([tokens]))[0, -1].argmax()))
        assert got == tokens[len(prompt) :]


def test_what_is_kept_exact(tmp_path):
    """DeepSeek-V3's corrections of the router stay float32 in a bfloat16 model: rounded, other experts would be chosen."""
    name = "deepseek_v3"
    tensors = checkpoint_tensors(torch_model(name))
    decoder = from_tensors(abstract(name), tensors, ALL_CONFIGS[name])
    save(decoder, None, tmp_path / "half", dtype="bfloat16")
    written = open_tensors(tmp_path / "half")
    correction = next(name for name in tensors if name.endswith("e_score_correction_bias"))
    assert {info.dtype.name for name, info in written.tensors.items() if name != correction} >= {"bfloat16"}
    np.testing.assert_array_equal(written.read(correction), tensors[correction])
    again = load_decoder(tmp_path / "half", Options(), param_dtype="bfloat16")
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(again)}
    assert dtypes == {"bfloat16", "float32"}
    assert all(leaf.dtype == np.float32 for path, leaf in named_leaves(again) if path.endswith("correction"))
    export_checkpoint(again, None, tmp_path / "again", dtype="bfloat16")  # reads it back and compares
