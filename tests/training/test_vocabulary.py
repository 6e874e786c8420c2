"""Runs that give their model tokens: from a base that has none of a template's to an export that transformers reads."""

import json
import shutil

import numpy as np
import pytest
import transformers
from slow_values import slow
from tiny_models import CONFIGS
from tiny_run import final_checksums, make_model, make_rows, metrics, tiny_config

import sft_jax
from sft_jax import fit
from sft_jax.data.tokenizers.tokens import load_tokenizer
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.hf.export import export_checkpoint
from sft_jax.hf.files import open_tensors
from sft_jax.hf.load import load_decoder
from sft_jax.hf.save import save
from sft_jax.model.options import Options

TOKENS = ("<|im_start|>", "<|im_end|>")
CHAT = [{"role": "user", "content": "Hello  there"}, {"role": "assistant", "content": "rain"}]


def save_random(folder, config: dict) -> None:
    """Writes weights beside config.json and tokenizer, which stay what they are."""
    (folder / "config.json").write_text(json.dumps(config))
    save(load_decoder(folder, Options(), init="random", seed=3), None, folder.parent / "weights", overwrite=True)
    shutil.copy(folder.parent / "weights/model.safetensors", folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of 1,024 tokens with weights, and rows of chats."""
    folder = tmp_path_factory.mktemp("runs")
    make_model(folder / "model")
    make_rows(folder / "train.jsonl")
    make_rows(folder / "held_out.jsonl", 12, seed=1)
    save_random(folder / "model", json.loads((folder / "model/config.json").read_text()))
    return folder


def added_config(folder, **changes):
    defaults = dict(
        model__init="checkpoint", data__chat_template="chatml", data__add_tokens=",".join(TOKENS), data__max_length=256,
        train__steps=3,
    )  # fmt: skip
    return tiny_config(folder, **{**defaults, **changes})


def embedding_of(folder) -> np.ndarray:
    return open_tensors(folder).read("model.embed_tokens.weight")


@pytest.mark.parametrize("name, size, tied", [("llama2", 32000, False), *slow(("mistral_v3", 32768, True))])
def test_a_base_learns_a_template_that_it_has_no_tokens_for(assets, tmp_path, name, size, tied, capsys):
    """Two tokenizers, of each implementation one, over a mesh that cuts the vocabulary; the export against transformers."""
    torch = pytest.importorskip("torch")
    model = tmp_path / "model"
    model.mkdir()
    for path in (assets / "tokenizers" / name).glob("tokenizer*"):
        shutil.copyfile(path, model / path.name)
    save_random(model, {**CONFIGS["llama"], "vocab_size": size, "num_hidden_layers": 1, "tie_word_embeddings": tied})
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    make_rows(tmp_path / "train.jsonl")
    config = added_config(tmp_path, data__max_length=128, data__overlength="drop", train__export=True, mesh__fsdp=4, mesh__tensor=2)
    config.data.add_tokens = [*TOKENS, "<|unused|>"]
    run = tmp_path / "run"
    fit(config, run)

    out = capsys.readouterr().out
    assert f"<|im_start|> is {size}, <|im_end|> is {size + 1}, <|unused|> is {size + 2}." in out
    assert f"goes from {size:,} to {size + 3:,} tokens" in out and f"held in {size + 128:,} rows" in out
    assert "no training row holds '<|unused|>', so" in out
    counts = json.loads((run / "data_report.json").read_text())["train"]["sets"]["train"]["added_tokens"]
    assert counts["<|im_start|>"] == counts["<|im_end|>"] > 96 and counts["<|unused|>"] == 0
    assert json.loads((run / "export/config.json").read_text())["vocab_size"] == size + 3
    assert json.loads((run / "export/generation_config.json").read_text())["eos_token_id"] == size + 1
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before

    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "export", attn_implementation="eager")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export")
    ours, tokenizer = sft_jax.load(run)
    ids = their_tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert ids == tokenizer.encode(their_tokenizer.apply_chat_template(CHAT, tokenize=False))
    assert [ids.count(size), ids.count(size + 1)] == [2, 2]
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits.numpy()
    assert logits.shape == (1, len(ids), size + 3)
    np.testing.assert_allclose(ours(np.array([ids])), logits, atol=1e-4)

    base, tuned = embedding_of(model), embedding_of(run / "export")
    assert base.shape[0] == size and tuned.shape[0] == size + 3
    used, unused = tuned[size : size + 2], tuned[size + 2]
    mean = base.astype(np.float64).mean(axis=0)
    assert np.abs(used - mean).max() > 1e-3 and not np.array_equal(*used)
    if not tied:  # it is in no row, so only as a head it has learned that it is none
        np.testing.assert_array_equal(unused, mean.astype(np.float32))


@pytest.fixture(scope="module")
def interrupted(folder):
    """A run over fsdp 4 x tensor 2 that was stopped after its first step."""
    with pytest.raises(StoppedBySignal):
        fit(added_config(folder, mesh__fsdp=4, mesh__tensor=2, train__stop_after_steps=1), folder / "stopped")
    return folder / "stopped"


@pytest.mark.slow
def test_a_run_goes_on_with_its_tokens(folder, interrupted):
    """Bit for bit on the same mesh, and on another one: what is saved does not depend on it."""
    fit(added_config(folder, mesh__fsdp=4, mesh__tensor=2), folder / "whole")
    for copy in ("same", "other"):
        shutil.copytree(interrupted, folder / copy)
    fit(added_config(folder, mesh__fsdp=4, mesh__tensor=2), folder / "same")
    assert final_checksums(folder / "same") == final_checksums(folder / "whole")
    fit(added_config(folder, mesh__fsdp=8), folder / "other")
    losses = [[record["loss"] for record in metrics(folder / name)] for name in ("whole", "other")]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    shape, *_ = final_checksums(folder / "whole")["arrays"]["params/embed/embedding"]
    assert list(shape) == [1152, 32]


def test_a_run_without_an_export_is_loaded_with_its_tokens(folder, interrupted):
    model, tokenizer = sft_jax.load(interrupted)
    assert model.spec.vocab_size == 1026 and [tokenizer.added_tokens[text] for text in TOKENS] == [1024, 1025]
    ids = tokenizer.encode("<|im_start|>user\nHello<|im_end|>")
    assert (ids[0], ids[-1]) == (1024, 1025) and model(np.array([ids])).shape == (1, len(ids), 1026)


def test_tokens_may_not_change_in_the_middle_of_a_run(folder, interrupted):
    with pytest.raises(UserError, match=r"data\.add_tokens: was \['<\|im_start\|>', '<\|im_end\|>'\] when this run began"):
        fit(added_config(folder, data__add_tokens="<|im_start|>,<|im_end|>,<|more|>"), interrupted)


@pytest.mark.slow
def test_a_run_from_a_run_keeps_its_tokens_and_gives_more(folder, interrupted, capsys):
    """Of the new one's weights the rows of old tokens are the old ones; also where the old one has no export."""
    before, _ = sft_jax.load(interrupted)
    changes = dict(model__path=str(interrupted), data__add_tokens="<|more|>,<|im_end|>", optim__learning_rate=1e-30)
    fit(added_config(folder, data__chat_template="auto", train__export=True, **changes), folder / "second")
    assert json.loads((folder / "second/config.json").read_text())["data"]["add_tokens"] == [*TOKENS, "<|more|>"]
    model, tokenizer = sft_jax.load(folder / "second")
    assert model.spec.vocab_size == 1027 and tokenizer.added_tokens["<|more|>"] == 1026
    old, new = (np.asarray(decoder.embed.embedding[...]) for decoder in (before, model))
    np.testing.assert_array_equal(new[:1026], old[:1026])
    np.testing.assert_array_equal(new[1026], old[:1026].astype(np.float64).mean(axis=0).astype(np.float32))
    assert not new[1027:].any() and old.shape == new.shape == (1152, 32)
    assert load_tokenizer(folder / "second/export").added_tokens == tokenizer.added_tokens
    capsys.readouterr()
    again = dict(model__path=str(folder / "second"), data__add_tokens=[], train__stop_after_steps=1)
    with pytest.raises(StoppedBySignal):
        fit(added_config(folder, data__chat_template="auto", **again), folder / "third")
    out = capsys.readouterr().out
    assert "<|more|> is 1026 as before. The model has rows for them among its 1,027." in out


def test_tokens_take_rows_that_a_model_has_to_spare(folder, tmp_path, capsys):
    """As of Qwen, whose models have more rows than tokens: nothing is added, and what is there is used."""
    shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text()) | {"vocab_size": 1056}
    save_random(tmp_path / "model", config)
    make_rows(tmp_path / "train.jsonl")
    fit(added_config(tmp_path, optim__learning_rate=1e-30, train__export=True), tmp_path / "run")
    out = capsys.readouterr().out
    assert "<|im_start|> is 1024, <|im_end|> is 1025. The model has rows for them among its 1,056." in out
    assert "held in" not in out
    np.testing.assert_array_equal(embedding_of(tmp_path / "run/export"), embedding_of(tmp_path / "model"))
    assert json.loads((tmp_path / "run/export/config.json").read_text()) == config


@pytest.mark.slow
def test_a_tokenizer_with_more_tokens_than_the_model(folder, tmp_path):
    """They are refused where data use them, until one of them is named; then the model is enlarged for all."""
    shutil.copytree(folder / "model", tmp_path / "model")
    load_tokenizer(folder / "model", (*TOKENS, "<|third|>")).save(tmp_path / "model")
    make_rows(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl:1: token '<\|im_\w+\|>' has the id 102\d, .* Name it in data\.add_tokens"):
        fit(added_config(tmp_path, data__add_tokens=[]), tmp_path / "run")
    config = added_config(tmp_path, data__add_tokens="<|im_start|>", train__stop_after_steps=1)
    with pytest.raises(StoppedBySignal):
        fit(config, tmp_path / "run")
    assert sft_jax.load(tmp_path / "run")[0].spec.vocab_size == 1027


def test_a_new_model_is_drawn_with_the_tokens(folder):
    fit(added_config(folder, model__init="random", train__steps=1), folder / "random")
    model, _ = sft_jax.load(folder / "random")
    table = np.asarray(model.embed.embedding[...])
    assert model.spec.vocab_size == 1026 and table[:1026].any(axis=1).all() and not table[1026:].any()


ADAPTER = dict(adapter__name="lora", adapter__rank=4, adapter__targets=["query"], model__init="checkpoint")


@pytest.mark.slow
def test_adapters_on_a_model_that_is_given_tokens(folder):
    """The base is enlarged when it is read, in training, in going on, and in loading; its fingerprint is that of its files."""
    given = ADAPTER | dict(adapter__tokens=list(TOKENS), adapter__train=["final_norm"], optim__learning_rate=0.03)
    with pytest.raises(StoppedBySignal):
        fit(added_config(folder, **given, train__stop_after_steps=1), folder / "adapted")
    fit(added_config(folder, **given), folder / "adapted")
    model, tokenizer = sft_jax.load(folder / "adapted")
    assert model.adapters.tokens == (1024, 1025) and model.spec.vocab_size == 1026 and tokenizer.added_tokens[TOKENS[0]] == 1024
    report = export_checkpoint(model, tokenizer, folder / "merged", stop_ids=(1025,), dtype=None)
    assert report is not None and embedding_of(folder / "merged").shape == (1026, 32)
    again, _ = sft_jax.load(folder / "merged")
    ids = np.array([tokenizer.encode("<|im_start|>user\nHello<|im_end|>")])
    np.testing.assert_allclose(again(ids), model(ids), atol=1e-5)
    moved = embedding_of(folder / "merged")[1024:] - embedding_of(folder / "model").astype(np.float64).mean(axis=0)
    assert (np.abs(moved).max(axis=1) > 1e-3).all()
    np.testing.assert_array_equal(embedding_of(folder / "merged")[:1024], embedding_of(folder / "model"))


@pytest.mark.slow
def test_adapters_on_a_run_that_has_given_its_model_tokens(folder, interrupted):
    """They lie on its model and not on the smaller one that it began with; nothing is to be trained for old tokens."""
    given = ADAPTER | dict(model__path=str(interrupted), data__chat_template="auto", data__add_tokens=[], train__steps=1)
    fit(added_config(folder, **given), folder / "on_a_run")
    model, _ = sft_jax.load(folder / "on_a_run")
    assert model.spec.vocab_size == 1026 and not model.adapters.tokens


def test_adapters_of_which_new_tokens_would_learn_nothing(folder):
    with pytest.raises(UserError, match=r"data\.add_tokens: the base has no row for <\|im_end\|>, .* name the tokens in adapter\.tokens"):
        fit(added_config(folder, **ADAPTER, adapter__tokens=TOKENS[:1]), folder / "refused")
    with pytest.raises(UserError, match=r"train\.export: the model was given 2 tokens that its base .* set train\.export=False"):
        fit(added_config(folder, **ADAPTER, adapter__train=["embed"], train__export=True), folder / "refused")


def test_another_models_tokenizer_does_not_make_it_grow(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    make_rows(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"data\.add_tokens: the tokenizer in .*model has 52\d ids .* belongs to another model"):
        fit(added_config(tmp_path), tmp_path / "run")
