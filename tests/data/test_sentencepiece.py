"""Bare SentencePiece models: against SentencePiece, llama.cpp's vectors, and transformers for what is exported."""

import io
import json
import pickle

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_texts import check_ranges, unicode_texts, vectors
from transformers import AutoTokenizer

from sft_jax.data.longest import longest_of
from sft_jax.data.tokenizers import sentencepiece_tokenizer
from sft_jax.data.tokenizers.tokens import load_tokenizer
from sft_jax.errors import UserError

MODELS = ("tokenizers/llama2", "tokenizers/mistral_v3", "models/stories260k")
CORPUS = [
    f"{name} buys {count} red apples for ${price}.50 each, and pays with a {bill} dollar note.\tHow much is left?"
    for count, price, bill in ((2, 1, 10), (5, 3, 20), (7, 2, 50), (11, 4, 100))
    for name in ("Natalia", "Weng", "Betty", "Mr. O'Neill", "Zoë", "José")
]


@pytest.fixture(scope="module")
def models(assets):
    """Folder -> (our tokenizer, SentencePiece's own), each loaded once."""
    cache = {}

    def load(folder):
        if folder not in cache:
            path = assets / folder / "tokenizer.model"
            cache[folder] = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
        return cache[folder]

    return load


@pytest.mark.parametrize("folder", MODELS)
def test_ids_are_those_of_sentencepiece_on_the_vectors(assets, models, folder):
    ours, theirs = models(folder)
    inputs, _ = vectors(assets, "llama2")
    for text, encoding in zip(inputs, ours.encode_with_offsets(inputs), strict=True):
        assert ours.encode(text) == theirs.encode(text) == encoding.ids.tolist()
        check_ranges(text, encoding)
        assert ours.decode(encoding.ids) == theirs.decode(theirs.encode(text))


def test_ids_are_those_of_llama_cpp(assets, models):
    ours, _ = models("tokenizers/llama2")
    inputs, outputs = vectors(assets, "llama2")
    for text, wanted in zip(inputs, outputs, strict=True):
        assert ours.encode(text) == wanted, text


@pytest.mark.parametrize("folder", ["tokenizers/mistral_v3", "models/stories260k"])
def test_ids_are_those_of_sentencepiece_on_any_text(models, folder, monkeypatch):
    ours, theirs = models(folder)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(unicode_texts.filter(lambda text: not any(name in text for name in ours.added_tokens)), max_size=4))
    def check(batch):
        encodings = ours.encode_with_offsets(batch)
        with monkeypatch.context() as patch:
            patch.setattr(sentencepiece_tokenizer, "align", lambda table, texts, ids: [None] * len(texts))
            slow = ours.encode_with_offsets(batch)
        for text, encoding, other in zip(batch, encodings, slow, strict=True):
            assert encoding.ids.tolist() == theirs.encode(text) == ours.encode(text) == other.ids.tolist()
            check_ranges(text, encoding)
            check_ranges(text, other)

    check()


def test_bytes_of_a_character_carry_the_character(models, monkeypatch):
    ours, _ = models("tokenizers/mistral_v3")
    text = "a🤗é½"
    wanted = [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3), (3, 4)]
    encoding = ours.encode_with_offsets([text])[0]
    assert list(zip(encoding.starts.tolist(), encoding.ends.tolist(), strict=True)) == wanted
    monkeypatch.setattr(sentencepiece_tokenizer, "align", lambda table, texts, ids: [None] * len(texts))
    encoding = ours.encode_with_offsets([text])[0]
    assert list(zip(encoding.starts.tolist(), encoding.ends.tolist(), strict=True)) == wanted


def test_control_tokens_are_recognised_and_get_no_space(models):
    ours, theirs = models("tokenizers/mistral_v3")
    ids = ours.added_tokens
    text = "<s>[INST] hello[/INST] hi</s>"
    hello, hi = theirs.encode("hello"), theirs.encode("hi")
    assert ours.encode(text) == [ids["<s>"], ids["[INST]"], *hello, ids["[/INST]"], *hi, ids["</s>"]]
    encoding = ours.encode_with_offsets([text])[0]
    assert encoding.ids.tolist() == ours.encode(text)
    check_ranges(text, encoding)
    assert ours.decode(encoding.ids) == text
    assert ours.decode(encoding.ids, skip_special_tokens=True) == "hello hi"


def test_what_a_bare_model_says_of_itself(models):
    ours, theirs = models("tokenizers/mistral_v3")
    assert ours.vocab_size == theirs.vocab_size() == 32768
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, None)
    assert ours.plain_prefix == (1,)
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert ours.added_tokens["[INST]"] == 3 and "[INST]" in ours.special_added_tokens
    assert "[REFERENCE_DOC_1]" in ours.added_tokens and "[REFERENCE_DOC_1]" not in ours.special_added_tokens
    assert ours.chat_template is None
    again = pickle.loads(pickle.dumps(ours))
    assert again.fingerprint == ours.fingerprint != ours.with_chat_template("x").fingerprint


@pytest.mark.parametrize("folder", MODELS)
def test_transformers_gives_the_same_ids_for_what_is_exported(models, tmp_path_factory, folder):
    ours, _ = models(folder)
    target = tmp_path_factory.mktemp("export")
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    ours.with_chat_template(template).save(target)
    theirs = AutoTokenizer.from_pretrained(str(target))
    assert (target / "tokenizer.model").is_file()
    assert theirs.chat_template == template
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert theirs.get_added_vocab() == ours.added_tokens
    chat = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": " ½🤗"}]
    wanted = ours.encode(f"{theirs.bos_token}Hi there{theirs.eos_token} ½🤗{theirs.eos_token}")
    assert theirs.apply_chat_template(chat, return_dict=False) == wanted

    @settings(max_examples=100, deadline=None)
    @given(unicode_texts)
    @example("▁")
    @example(" ▁ a▁ </s> ▁▁ ")
    def check(text):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == [*ours.plain_prefix, *ids]

    check()
    again = load_tokenizer(target)
    assert again.encode(" a</s>b") == ours.encode(" a</s>b")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("unigram", {"normalization_rule_name": "nmt_nfkc"}),
        ("unigram", {"normalization_rule_name": "identity", "byte_fallback": True, "remove_extra_whitespaces": False}),
        ("bpe", {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True}),
        ("bpe", {"add_dummy_prefix": False, "remove_extra_whitespaces": False}),
    ],
)
def test_models_of_other_kinds(tmp_path, kind, options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=380 if "byte_fallback" in options else 120,
        hard_vocab_limit=False, model_type=kind, minloglevel=2, control_symbols=["<|a|>"],
        user_defined_symbols=["<sep>", "\n", "▁▁", "▁▁▁"], **options,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    ours, native = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours.save(tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "export"))
    texts = ["", " ", "  two", "How  much   is", "½ Ａ ﬁ e\u0301 Zoë", "漢字 🤗", "\t tab", *CORPUS[:4]]
    for text in texts:
        assert ours.encode(text) == native.encode(text)
    for text in [*texts, "x<sep>y\n\n z", "<|a|>apples<|a|> red", "a\nb"]:
        encoding = ours.encode_with_offsets([text])[0]
        assert theirs(text, add_special_tokens=False)["input_ids"] == encoding.ids.tolist() == ours.encode(text), text
        if len(encoding.ids):
            check_ranges(text, encoding)
    if not options.get("remove_extra_whitespaces", True):
        assert ours.encode("x<sep>y\n\n z") == native.encode("x<sep>y\n\n z")  # user-defined symbols, as it has them


def test_tokens_that_the_config_adds(assets, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((assets / "tokenizers/llama2/tokenizer.model").read_bytes())
    config = {
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            "32000": {"content": "<|im_start|>", "special": True},
            "32001": {"content": "<|im_end|>", "special": False},
        },
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "</s>",
        "add_bos_token": False,
        "chat_template": "T",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == 32002
    assert ours.encode("a<|im_end|> b<|im_start|>") == [263, 32001, 289, 32000]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.plain_prefix, ours.chat_template) == (1, 32001, 2, (), "T")
    assert ours.decode([263, 32001, 32000, 289]) == "a<|im_end|><|im_start|> b"
    assert ours.decode([263, 32001, 32000], skip_special_tokens=True) == "a<|im_end|>"
    ours.save(tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "export"))
    assert theirs("a<|im_end|> b<|im_start|>")["input_ids"] == [263, 32001, 289, 32000]
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.chat_template) == (32001, 2, "T")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"added_tokens_decoder": {"5": {"content": "<x>"}}}, "'<x>' is declared as id 5"),
        ({"added_tokens_decoder": {"32000": {"content": "<x>", "lstrip": True}}}, "white space"),
        ({"eos_token": "<nope>"}, "eos_token '<nope>' is not in"),
    ],
)
def test_a_config_that_contradicts_the_model(assets, tmp_path, config, message):
    (tmp_path / "tokenizer.model").write_bytes((assets / "tokenizers/llama2/tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", b"\x00\xff" * 50])
def test_a_file_that_is_no_model(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model: is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_half_of_a_surrogate_pair_is_refused(models):
    ours, _ = models("models/stories260k")
    for run in (ours.encode, lambda text: ours.encode_with_offsets([text])):
        with pytest.raises(UserError, match="surrogate"):
            run("a\udc00")


@given(st.lists(st.text("ab<>|\n", min_size=1, max_size=5), min_size=1, max_size=6), st.text("ab<>|\n", max_size=12))
def test_the_trie_finds_the_longest_name(names, text):
    import re

    wanted = re.findall("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)), text)
    assert re.findall(longest_of(names), text) == wanted
