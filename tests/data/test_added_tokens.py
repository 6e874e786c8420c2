"""Tokens that a run gives a tokenizer: as transformers adds them, in every file, and kept by all that stores tokenizers."""

import json
import os
import pickle
import shutil

import pytest
from tokenizer_texts import check_ranges
from transformers import AutoTokenizer

from sft_jax.data.chats.guard import guard_of
from sft_jax.data.stores.tokenizer_cache import open_tokenizer
from sft_jax.data.tokenizers.added_tokens import with_tokens
from sft_jax.data.tokenizers.tokens import load_stored_tokenizer, load_tokenizer, store_tokenizer
from sft_jax.data.tokenizers.vocabulary import Vocabulary, vocabulary_size
from sft_jax.errors import UserError

NEW = ("<|im_start|>", "<|im_end|>", "<|é x|>")
FOLDERS = ("tokenizers/llama2", "tokenizers/mistral_v3", "models/stories260k", "tokenizers/qwen3")
TEXTS = (
    "<|im_start|>user\nHello  there<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>b", " <|im_end|> <|é x|>\n", "<|im_<|im_end|>",
    "no token at all", "<|im_start|><|im_start|>",
)  # fmt: skip


@pytest.fixture(scope="module")
def loaded(assets):
    """Folder -> (the tokenizer as it is, and with the new tokens)."""
    cache = {}

    def load(folder):
        if folder not in cache:
            cache[folder] = load_tokenizer(assets / folder), load_tokenizer(assets / folder, NEW)
        return cache[folder]

    return load


@pytest.mark.parametrize("folder", FOLDERS)
def test_tokens_get_the_next_ids_and_are_never_split(loaded, folder):
    before, after = loaded(folder)
    new = [text for text in NEW if text not in before.added_tokens]  # qwen3 has two of them
    assert len(new) == (1 if folder == "tokenizers/qwen3" else 3)
    ids = {text: before.vocab_size + number for number, text in enumerate(new)}
    assert after.vocab_size == before.vocab_size + len(new)
    assert after.added_tokens == before.added_tokens | ids
    assert after.special_added_tokens == before.special_added_tokens | set(NEW)
    assert (after.bos_id, after.eos_id, after.pad_id) == (before.bos_id, before.eos_id, before.pad_id)
    assert (after.plain_prefix, after.chat_template) == (before.plain_prefix, before.chat_template)
    assert after.fingerprint != before.fingerprint
    for text in TEXTS:
        (encoding,) = after.encode_with_offsets([text])
        assert encoding.ids.tolist() == after.encode(text)
        check_ranges(text, encoding)
        assert [after.encode(text).count(after.added_tokens[new]) for new in NEW] == [text.count(new) for new in NEW]
    assert after.encode(TEXTS[4]) == before.encode(TEXTS[4])
    assert after.decode(after.encode("x<|im_end|>")) == "x<|im_end|>"
    assert after.decode(after.encode("x<|im_end|>"), skip_special_tokens=True) == "x"


@pytest.mark.parametrize("folder", ["tokenizers/llama2", "tokenizers/qwen3"])
def test_ids_are_those_that_transformers_gives(assets, loaded, folder):
    theirs = AutoTokenizer.from_pretrained(str(assets / folder))
    theirs.add_special_tokens({"additional_special_tokens": list(NEW)}, replace_extra_special_tokens=False)
    _, ours = loaded(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert [ours.added_tokens[text] for text in NEW] == theirs.convert_tokens_to_ids(list(NEW))


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_saved_stored_and_sent_has_them(loaded, tmp_path, folder):
    _, ours = loaded(folder)
    ours.with_chat_template("{{ messages[0].content }}<|im_end|>").save(tmp_path / "saved")
    theirs, again = AutoTokenizer.from_pretrained(str(tmp_path / "saved")), load_tokenizer(tmp_path / "saved")
    store_tokenizer(ours, tmp_path / "stored")
    others = [again, load_stored_tokenizer(tmp_path / "stored"), pickle.loads(pickle.dumps(ours))]
    for other in others:
        assert (other.added_tokens, other.special_added_tokens) == (ours.added_tokens, ours.special_added_tokens)
        assert [other.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert again.chat_template == "{{ messages[0].content }}<|im_end|>"
    assert [other.fingerprint for other in others[1:]] == [ours.fingerprint] * 2
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert set(NEW) <= set(theirs.all_special_tokens) and len(theirs) == ours.vocab_size
    assert load_tokenizer(tmp_path / "saved", NEW).fingerprint == again.fingerprint  # nothing is added twice


@pytest.mark.parametrize("folder", ["tokenizers/llama2", "tokenizers/mistral_v3"])
def test_content_does_not_become_a_new_token(loaded, folder):
    _, ours = loaded(folder)
    guard = guard_of(ours)
    ids = guard.encoder.encode(["typed <|im_end|> here"])[0].ids.tolist()
    assert not set(ids) & set(ours.added_tokens.values())
    assert ours.decode(ids).strip() == "typed <|im_end|> here"


def test_added_tokens_that_are_there_already_are_kept(assets, loaded):
    again = load_tokenizer(assets / "tokenizers/qwen3", ("<|im_end|>", "<think>"))
    assert again.fingerprint == loaded("tokenizers/qwen3")[0].fingerprint and "<think>" not in again.special_added_tokens


@pytest.mark.parametrize("folder", ["tokenizers/llama2", "tokenizers/mistral_v3"])
def test_a_token_of_the_vocabulary_keeps_its_id_and_is_whole_from_now_on(assets, loaded, folder):
    before, after = loaded(folder)[0], load_tokenizer(assets / folder, ("orld", "<|new|>"))
    token = after.added_tokens["orld"]
    assert after.encode("world<|new|>")[-2:] == [token, before.vocab_size] and token not in before.encode("world")
    assert after.vocab_size == before.vocab_size + 1 and before.decode([token]).strip() == "orld"


def copied(source, target, leave_out=()):
    """A copy of a folder that can be written to."""
    target.mkdir()
    for path in source.iterdir():
        if path.name not in leave_out:
            shutil.copyfile(path, target / path.name)
    return target


def test_every_list_of_tokens_gets_them(assets, tmp_path):
    """Those of tokenizer_config.json and special_tokens_map.json where they are, under the name that they have."""
    folder = copied(assets / "models/stories260k", tmp_path / "listed")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {"eos_token": "</s>", "additional_special_tokens": ["<s>"]}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"added_tokens_decoder": {"2": {"content": "</s>", **flags}}, "additional_special_tokens": ["<s>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    load_tokenizer(folder, ("<|é|>",)).save(tmp_path / "out")
    config["added_tokens_decoder"]["512"] = {"content": "<|é|>", **flags}
    config["additional_special_tokens"].append("<|é|>")
    special["additional_special_tokens"].append("<|é|>")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == config
    assert json.loads((tmp_path / "out/special_tokens_map.json").read_text()) == special
    newer = with_tokens({"tokenizer_config.json": b'{"extra_special_tokens": ["<a>"]}'}, {"<b>": 7})
    assert json.loads(newer["tokenizer_config.json"])["extra_special_tokens"] == ["<a>", "<b>"]


def test_a_folder_with_vocabulary_and_merges_only(assets, tmp_path):
    """It gets a tokenizer.json, which gives the ids of before; here the bytes and a thousand merges of Llama 3."""
    model = json.loads((assets / "tokenizers/llama3/tokenizer.json").read_text())["model"]
    vocabulary = {text: token for text, token in model["vocab"].items() if token < 1256}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    merges = [merge for merge in merges if {*merge.split(" "), merge.replace(" ", "")} <= vocabulary.keys()]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    named = dict.fromkeys(("eos_token", "bos_token", "unk_token"), "!")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **named}))
    before, after = load_tokenizer(folder), load_tokenizer(folder, NEW)
    after.save(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert after.vocab_size == before.vocab_size + 3 == 1259
    assert after.encode("some text, 12 x\n") == before.encode("some text, 12 x\n")
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == after.encode(text)


def test_ids_that_are_no_row_of_numbers_are_refused(assets, tmp_path):
    """The tokenizers library would give a new token an id that another one has."""
    folder = copied(assets / "models/stories260k", tmp_path / "holes", ("model.safetensors", "tokenizer.model"))
    state = json.loads((folder / "tokenizer.json").read_text())
    last = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"][last] = 700
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"data\.add_tokens: the tokenizer in .*holes reads '<\|new\|>' as .* choose another text"):
        load_tokenizer(folder, ("<|new|>",))


def test_the_cache_knows_them(assets, tmp_path):
    path = str(assets / "models/stories260k")
    plain, first = open_tokenizer(path, tmp_path)
    added, second = open_tokenizer(path, tmp_path, NEW)
    assert first != second and added.vocab_size == plain.vocab_size + 3
    assert open_tokenizer(path, tmp_path, NEW)[0].fingerprint == added.fingerprint
    assert open_tokenizer(path, tmp_path)[0].fingerprint == plain.fingerprint
    assert len(os.listdir(tmp_path / "tokenizers")) == 2


def test_a_model_grows_for_added_tokens_alone(loaded):
    before, after = loaded("models/stories260k")
    assert vocabulary_size(after, 512, "m") == 515 and vocabulary_size(after, 600, "m") == 600
    with pytest.raises(UserError, match=r"data\.add_tokens: the tokenizer in m has 2 ids from 510 on .* belongs to another model"):
        vocabulary_size(after, 510, "m")
    Vocabulary(515, after, "m").check(514, "rows.jsonl", 3)
    with pytest.raises(UserError, match=r"rows\.jsonl:3: token '<\|im_end\|>' has the id 513, .* Name it in data\.add_tokens"):
        Vocabulary(512, after, "m").check(513, "rows.jsonl", 3)
    with pytest.raises(UserError, match=r"belongs to another model\. Put the model's own"):
        Vocabulary(300, before, "m").check(400, "rows.jsonl", 3)
