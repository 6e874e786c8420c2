"""The embedded base model: its text, its tokenizer and its directory."""

import hashlib
import json
import sys
from pathlib import Path
from random import Random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import make_nano_corpus as corpus  # noqa: E402
import make_nano_tokenizer as maker  # noqa: E402
import make_quickstart_data as task  # noqa: E402

from sft_jax.data.tokenizers.tokens import load_tokenizer  # noqa: E402

MODEL = ROOT / "models" / "nano"
TEXT_DIGEST = "c63ddc107aca05a4bd0f9e95e44ae79efc4b32f3c3d939598a8163e7b23fedb7"  # what the committed weights have read


@pytest.fixture(scope="module")
def documents() -> list[str]:
    rng = Random(corpus.SEED)
    return [corpus.write_document(rng) for _ in range(3000)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def processor() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))


def test_the_text_is_the_one_that_the_committed_weights_have_read(documents):
    assert hashlib.sha256("\n".join(documents).encode()).hexdigest() == TEXT_DIGEST


def test_text_holds_nothing_of_the_task(documents):
    train, held_out = task.make()
    text = "\n".join(documents)
    assert '"action"' not in text
    for row in train + held_out:
        assert row["messages"][1]["content"] not in text


def test_records_in_the_text_are_json(documents):
    count = 0
    for line in "\n".join(documents).split("\n"):
        if "{" in line:
            json.loads(line[line.index("{") :])
            count += 1
    assert count > 1000


def test_corpus_script_writes_the_documents_in_order(tmp_path, monkeypatch, documents):
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--train", "40", "--held-out", "60"])
    corpus.main()
    read = {name: [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").open(encoding="utf-8")]
            for name in ("train", "held_out")}  # fmt: skip
    assert read["held_out"] + read["train"] == documents[:100]


def test_tokenizer_files_agree(tokenizer, processor, documents):
    """tokenizer.json (what servers use) gives the ids of tokenizer.model (what SentencePiece trained)."""
    requests = [message["content"] for row in task.make(train=500)[0] for message in row["messages"]]
    for text in documents[:500] + requests + ["", " ", "  two  spaces \n\n", "Zürich 你好 😀\t", "<0x41>", "a_b-c/d\\e"]:
        assert tokenizer.encode(text) == processor.encode(text), text


def test_tokenizer_json_is_made_from_the_model_file():
    fast = json.loads(maker.to_fast_tokenizer((MODEL / "tokenizer.model").read_bytes()).to_str())
    committed = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    assert fast["model"]["vocab"] == committed["model"]["vocab"]
    assert [list(m) for m in fast["model"]["merges"]] == [list(m) for m in committed["model"]["merges"]]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_every_text_comes_back(text):
    tokenizer = load_tokenizer.cache(MODEL) if hasattr(load_tokenizer, "cache") else _tokenizer()
    if not any(token in text for token in tokenizer.added_tokens):
        assert tokenizer.decode(tokenizer.encode(text)) == text


_LOADED = []


def _tokenizer():
    if not _LOADED:
        _LOADED.append(load_tokenizer(MODEL))
    return _LOADED[0]


def test_digits_and_spaces_stand_alone_and_words_do_not_depend_on_them(tokenizer):
    one = {char: tokenizer.encode(char) for char in "0123456789 "}
    assert all(len(ids) == 1 for ids in one.values())
    assert tokenizer.encode("19 05") == [*one["1"], *one["9"], *one[" "], *one["0"], *one["5"]]
    for word in ("Maria", "Lisbon", "kitchen", "unheardof"):
        assert tokenizer.encode(f'x {word} "{word}"')[-len(tokenizer.encode(word)) - 1 : -1] == tokenizer.encode(word)


def test_chat_template_marks_turns_and_the_prompt_is_a_prefix(tokenizer):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoTokenizer.from_pretrained(MODEL)
    user, answer = {"role": "user", "content": "Call Mia."}, {"role": "assistant", "content": "{}"}
    prompt = model.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    whole = model.apply_chat_template([user, answer], return_dict=False)
    assert prompt == [tokenizer.bos_id, *tokenizer.encode("<|user|>Call Mia.<|end|><|assistant|>")]
    assert whole == prompt + tokenizer.encode("{}") + [tokenizer.eos_id]
    assert model("Call Mia.")["input_ids"] == [tokenizer.bos_id, *tokenizer.encode("Call Mia.")]
    assert tokenizer.plain_prefix == (tokenizer.bos_id,)


def test_directory_is_small():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8 * 2**20
