"""Words that are encoded once: a memory in front of a tokenizer that reads words apart from each other.

Nearly all text is made of words that came before, but a library encodes each again, and one without a pre-tokenizer (Llama 2)
searches whole texts for merges. Where a tokenizer's own rules say that no token and no rule reaches across the space
between two words, the tokens of a text are those of its words, and each is encoded by the library once. For all
other tokenizers there is no such encoder.

A text is cut before each space that stands behind something else than white space. Tokens end there

- in a BPE without expression for words, if no token of its vocabulary has a space behind something else (then no merge
  has, and what is merged on one side does not depend on the other);
- in a BPE over words found by one of WORD_PATTERNS: none matches a space behind something else, and none looks at more
  than the first character behind a word, which is that space.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sft_jax.data.longest import longest_of
from sft_jax.data.tokenizers.alignment import TokenBytes

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_PATTERNS = frozenset(
    {
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,  # GPT-4, Llama 3
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,  # Qwen 2 and 3
    }
)

_SPACE = "\u2581"  # SentencePiece's sign for a space
# A word with the white space before it, and others that no plain space divides from it; or white space at the end of a text.
_WORD = re.compile(r"\s*\S+(?:[^\S ]\s*\S*)*|\s+")
_LEAD = "x"  # what stands before a word that is not the first
_LONGEST = 48  # characters of a word that is remembered
_REMEMBERED = 1 << 17  # words, some 25 MB

Encode = Callable[[list[str]], Iterable[Sequence[int]]]


def word_encoder_of(backend: str, encode: Encode, table: TokenBytes) -> "WordEncoder | None":
    """Returns the encoder of a tokenizer, or None where its rules do not say that words are read apart.

    Args:
        backend: a tokenizer.json.
        encode: texts -> ids of each, as the tokenizer itself reads them, without special tokens put before or behind.
        table: the bytes of each id.
    """
    state = json.loads(backend)
    added = state["added_tokens"]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"] or re.search(r"\s", token["content"]) for token in added):
        return None  # it takes white space along, looks at what is beside it, or is found in a text that was changed
    return WordEncoder({token["content"]: token["id"] for token in added}, encode, table) if _reads_words_apart(state) else None


def _reads_words_apart(state: dict[str, Any]) -> bool:
    """Returns whether the rules of a tokenizer.json end tokens before each space that does not follow white space."""
    model, words = state["model"], state["pre_tokenizer"]
    if model["type"] != "BPE" or model["dropout"] or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    steps = words["pretokenizers"] if words is not None and words["type"] == "Sequence" else [words]
    if [step and step["type"] for step in steps] == ["Split", "ByteLevel"]:
        split, bytes_ = steps
        known = split["pattern"].get("Regex") in WORD_PATTERNS and split["behavior"] == "Isolated" and not split["invert"]
        return known and not bytes_["use_regex"] and not bytes_["add_prefix_space"] and _is_unicode_form(state["normalizer"])
    crosses = re.compile(f"[^{_SPACE}]{_SPACE}")
    if state["normalizer"] is not None or [step and step["type"] for step in steps] != ["Metaspace"] or steps[0]["replacement"] != _SPACE:
        return False
    return not any(map(crosses.search, model["vocab"]))


def _is_unicode_form(normalizer: dict[str, Any] | None) -> bool:
    """Returns whether a normaliser at most composes characters, which nothing does with a plain space that follows them."""
    return normalizer is None or normalizer["type"] in ("NFC", "NFD")


class WordEncoder:
    """Encodes texts word by word, with the ids that the library has for the whole."""

    def __init__(self, added_tokens: dict[str, int], encode: Encode, table: TokenBytes):
        self._added = {text: _as_bytes([token]) for text, token in added_tokens.items()}
        self._any_added = re.compile(f"({longest_of(added_tokens)})") if added_tokens else None
        self._first = _Words("", encode)  # at the beginning of a text, where some tokenizers add a space
        # Directly behind an added token, where some add one, too; the longest token is the beginning of no other.
        self._behind = _Words(max(added_tokens, key=len, default=""), encode)
        self._inner = _InnerWords(encode, table)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32 [n]."""
        plans = [self._plan(text) for text in texts]
        for memory in (self._first, self._behind, self._inner):
            memory.learn(set(itertools.chain.from_iterable(words for plan in plans for known, words in plan if known is memory.known)))
        result = [
            np.frombuffer(b"".join(itertools.chain.from_iterable(map(known.__getitem__, words) for known, words in plan)), np.int32)
            for plan in plans
        ]
        for memory in (self._first, self._behind, self._inner):
            memory.forget()
        return result

    def _plan(self, text: str) -> list[tuple[dict[str, bytes], list[str]]]:
        """Returns what a text is made of: words, and where the ids of each are found."""
        plan = []
        memory = self._first
        for number, part in enumerate(self._any_added.split(text) if self._any_added else [text]):
            if number % 2:
                plan.append((self._added, [part]))
            elif part:
                words = _WORD.findall(part)
                plan += [(memory.known, words[:1]), (self._inner.known, words[1:])]
            memory = self._behind
        return plan


class _Words:
    """The ids of words that stand behind a certain text, as bytes of int32."""

    def __init__(self, lead: str, encode: Encode):
        self.known: dict[str, bytes] = {}
        self._lead, self._encode = lead, encode
        self._lead_ids = len(next(iter(encode([lead])))) if lead else 0
        self._long: list[str] = []

    def learn(self, words: set[str]) -> None:
        """Makes all `words` known, until `forget` at least."""
        new = [word for word in words if word not in self.known]
        if len(self.known) + len(new) > _REMEMBERED:
            self.known.clear()
            new = list(words)
        self._long = [word for word in new if len(word) > _LONGEST]
        self.known.update(zip(new, self._read(new), strict=True))

    def forget(self) -> None:
        """Forgets the long words of the last `learn`: they hardly come again."""
        for word in self._long:
            del self.known[word]

    def _read(self, words: list[str]) -> Iterable[bytes]:
        return [_as_bytes(ids[self._lead_ids :]) for ids in self._encode([self._lead + word for word in words])]


class _InnerWords(_Words):
    """Words inside of a text. They are read in one text, and known by their bytes: a call of the library has its price."""

    def __init__(self, encode: Encode, table: TokenBytes):
        super().__init__(_LEAD, encode)
        self._table = table

    def _read(self, words: list[str]) -> Iterable[bytes]:
        (ids,) = self._encode([_LEAD + "".join(words)])
        ids = np.asarray(ids[self._lead_ids :], np.int32)
        made, ends = self._table.concatenate(ids)
        spelt = [word.encode() for word in words]
        cuts = np.cumsum([len(word) for word in spelt])
        places = np.searchsorted(ends, cuts)
        if made.tobytes() != b"".join(spelt) or not np.array_equal(ends[np.minimum(places, len(ends) - 1)], cuts):
            return super()._read(words)  # a normaliser has changed some
        data, stops = ids.tobytes(), [0, *(4 * (places + 1)).tolist()]
        return [data[start:stop] for start, stop in itertools.pairwise(stops)]


def _as_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, np.int32).tobytes()
