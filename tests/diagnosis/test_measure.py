"""What is computed with the models of a run, against arithmetic in float64 on their logits; and the causes that it finds."""

import json
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy
from planted_runs import ROOT, planted, train

import sft_jax
from sft_jax.diagnosis.diagnose import examine
from sft_jax.diagnosis.finding import Evidence
from sft_jax.diagnosis.measure import NEUTRAL, _pieces, _text_loss, divergence, measure, read_general
from sft_jax.diagnosis.page import write_page
from sft_jax.diagnosis.run_files import read_run
from sft_jax.errors import UserError
from sft_jax.model.sharding import make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def general():
    """Text as the base writes it, so that it knows it."""
    model, tokenizer = sft_jax.load(ROOT / "models/nano")
    prompts = ["The train to", "Every morning", "Good evening, I"]
    answers = sft_jax.generate(model, tokenizer, prompts, max_new_tokens=160, temperature=1.0, seed=3)
    return "\n".join(prompt + answer for prompt, answer in zip(prompts, answers, strict=True))


@pytest.fixture(scope="module")
def measured(healthy, mesh, general):
    """The report of the sound run, with general text that its base knew and that nobody trained on."""
    return examine(healthy, measure=partial(measure, mesh=mesh, general=general))


def log_p(model, ids):
    logits = np.asarray(model(np.array([ids], np.int32)), np.float64)[0]
    return logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)


def test_divergence_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    of = [[rng.normal(size=(n, 7)) for n in (3, 5)] for _ in range(2)]
    ours, theirs = ([np.log(np.exp(x) / np.exp(x).sum(-1, keepdims=True)) for x in texts] for texts in of)
    total = 0.0
    for p, q in zip(ours, theirs, strict=True):
        for place in range(len(p)):
            for token in range(7):
                total += np.exp(p[place, token]) * (p[place, token] - q[place, token])
    found = divergence(ours, theirs)
    assert found.kl == pytest.approx(total / 8) and found.tokens == 8 and found.error > 0
    assert divergence(ours, ours).kl == 0
    assert divergence(ours, [x[:, :6] for x in theirs]) is None


def test_losses_and_divergences_are_those_of_the_logits(measured, healthy, general):
    found = measured.evidence.measured
    (base, tokenizer), (tuned, _) = sft_jax.load(ROOT / "models/nano"), sft_jax.load(healthy)
    kl, count = 0.0, 0
    for text in NEUTRAL[:3] + NEUTRAL[-2:]:
        ids = [*tokenizer.plain_prefix, *tokenizer.encode(text)]
        p, q = log_p(tuned, ids), log_p(base, ids)
        kl, count = kl + (np.exp(p) * (p - q)).sum(), count + len(ids)
    assert 0.5 < kl / count / found.from_base.kl < 2  # five of the texts
    ids, prefix = tokenizer.encode(general), list(tokenizer.plain_prefix)
    size = max(len(ids) // 16, 32)  # the text is shorter than 16 rows of training
    starts = range(0, len(ids), size)
    for model, loss in ((base, found.general.base), (tuned, found.general.tuned)):
        nll = []
        for first in starts:
            context, piece = [*prefix, *ids[max(first + size - 128, 0) : first]], ids[first : first + size]
            nll.append(-log_p(model, [*context, *piece])[np.arange(len(context) - 1, len(context) + len(piece) - 1), piece].sum())
        assert loss == pytest.approx(sum(nll) / len(ids), rel=1e-4)
    assert found.general.tokens == len(ids)


def test_general_text_that_was_forgotten_is_named_first(measured):
    found = measured.evidence.measured
    assert list(measured.findings) == ["forgetting"]
    assert found.general.rise_interval[0] > 0 and found.own_samples.tuned > found.own_samples.base
    assert found.export.kl < 1e-6  # the base is float32, and so is its export
    assert json.loads(json.dumps(measured.to_json(), allow_nan=False))["measured"]["general"]["texts"] == found.general.texts


@pytest.mark.parametrize(("tokens", "texts", "size"), [(20, 1, 20), (100, 4, 32), (1600, 16, 100), (3200, 25, 128), (128 * 100, 50, 128)])
def test_a_short_text_is_cut_in_pieces_enough_for_an_interval(healthy, tokens, texts, size):
    config = read_run(healthy).config
    words = SimpleNamespace(encode=lambda text: list(range(len(text))), plain_prefix=(1,))
    model = SimpleNamespace(source=SimpleNamespace(config_dict=lambda: {"max_position_embeddings": 512}))
    pieces = _pieces(words, "x" * tokens, config, model)
    assert len(pieces) == texts and len(pieces[0][1]) == size
    assert all(len(context) + len(piece) == 1 + min(piece[-1] + 1, 128) for context, piece in pieces if len(piece) == size)  # whole rows
    values = np.arange(texts, dtype=float)
    assert (_text_loss(values, values + 1, pieces).rise_interval is None) == (texts == 1)


@pytest.mark.slow
def test_an_export_of_other_weights_is_named_first_and_answers_are_made_where_there_are_none(healthy, tmp_path, mesh):
    run = planted(healthy, tmp_path / "run", checkpoints=True)
    (run / "samples.jsonl").unlink()
    place = run / "export" / "model.safetensors"
    tensors = safetensors.numpy.load_file(place)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name] = np.zeros_like(tensors[name])
    safetensors.numpy.save_file(tensors, place, {"format": "pt"})
    report = examine(run, measure=partial(measure, mesh=mesh))
    assert next(iter(report.findings)) == "export_differs"
    assert report.findings["export_differs"].evidence["kl_from_checkpoint"] == report.evidence.measured.export.kl
    health = report.evidence.health["held_out"]
    assert health.answers == 16 and health.ended > 0.8
    write_page(tmp_path / "page.html", report)
    assert "Side by side" in (tmp_path / "page.html").read_text() and len(report.evidence.answers) == 16


def test_models_that_have_gone_are_notes(healthy, tmp_path, mesh):
    run = planted(healthy, tmp_path / "run")
    (run / "export" / "model.safetensors").unlink()
    evidence, notes = measure(Evidence(read_run(run)), mesh)
    assert evidence.measured.from_base is None and any("trained model" in note for note in notes)


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe\x00"])
def test_a_general_text_that_is_none_is_one_message(tmp_path, content):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="--general: .*text"):
        read_general(path)


@pytest.mark.slow
def test_a_mesh_of_all_devices_finds_the_same(measured, healthy):
    found, notes = measure(Evidence(read_run(healthy)), make_mesh())
    assert not notes
    for name in ("from_base", "own_samples"):
        ours, theirs = (getattr(one.measured, name) for one in (found, measured.evidence))
        np.testing.assert_allclose([ours.tokens, getattr(ours, "kl", 0) or ours.base], [theirs.tokens, getattr(theirs, "kl", 0) or theirs.base], rtol=1e-3)


@pytest.mark.slow
def test_a_sound_run_with_adapters_has_no_cause_and_its_adapter_is_what_was_trained(tmp_path, mesh):
    changes = {"adapter__name": "lora", "adapter__rank": 32, "optim__learning_rate": 1e-2, "train__epochs": 6.0}
    report = examine(train(tmp_path, "run", **changes), measure=partial(measure, mesh=mesh))
    assert not report.findings and report.evidence.measured.export.kl < 1e-6 < report.evidence.measured.from_base.kl
