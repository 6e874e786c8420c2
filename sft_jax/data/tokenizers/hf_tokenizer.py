"""Hugging Face fast tokenizers: loaded by transformers (`hf_load`), kept as the plain `tokenizers` backend."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Self

import numpy as np
import tokenizers

from sft_jax.data.tokenizers.alignment import Encoding, TokenBytes, align, without_gaps
from sft_jax.data.tokenizers.tokenizer_files import write_files
from sft_jax.data.tokenizers.word_encoder import WordEncoder, word_encoder_of
from sft_jax.errors import UserError


class HFTokenizer:
    """See `sft_jax.data.tokenizers.tokens.Tokenizer`. Made by `hf_load.load_hf`."""

    def __init__(self, values: dict, files: dict[str, bytes], backend: str):
        """`values` are those that `hf_load` collects; `files` are the original ones; `backend` is a tokenizer.json."""
        self._values = values
        self._files = files
        self._backend = backend
        self._open()

    def _open(self) -> None:
        values = self._values
        self._tokenizer = tokenizers.Tokenizer.from_str(self._backend)
        self._tokenizer.encode_special_tokens = values["encode_special_tokens"]  # not part of a tokenizer.json
        self._remap = np.asarray(values["remap"], np.int32) if values["remap"] else None
        self._table: TokenBytes | None = None
        self._words: WordEncoder | None = None
        self._library_offsets = False
        self.vocab_size: int = values["vocab_size"]
        self.bos_id: int | None = values["bos_id"]
        self.eos_id: int | None = values["eos_id"]
        self.pad_id: int | None = values["pad_id"]
        self.chat_template: str | None = values["chat_template"]
        self.special_tokens: dict[str, str] = dict(values["special_tokens"])
        self.added_tokens: dict[str, int] = dict(values["added_tokens"])
        self.special_added_tokens = frozenset(values["special_added_tokens"])
        self.plain_prefix: tuple[int, ...] = tuple(values["plain_prefix"])

    def __getstate__(self) -> dict:
        return {"values": self._values, "files": self._files, "backend": self._backend}

    def __setstate__(self, state: dict) -> None:
        self._values, self._files, self._backend = state["values"], state["files"], state["backend"]
        self._open()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the backend, the special tokens and the chat template."""
        values = {key: value for key, value in self._values.items() if key != "original_template"}
        values = json.dumps(values, sort_keys=True)
        return hashlib.sha256(values.encode() + b"\0" + self._backend.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        (ids,) = self._ids_of_library([text])
        return ids if self._remap is None else self._remap[np.asarray(ids, np.int32)].tolist()

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Encoding]:
        if not texts:
            return []
        if self._library_offsets:
            return self._offsets_of_library(texts)
        if self._table is None:
            self._table = token_bytes(self._tokenizer)
            if not self._tokenizer.encode_special_tokens:
                self._words = word_encoder_of(self._backend, self._ids_of_library, self._table)
        ids = self._words.encode_batch(texts) if self._words else self._ids_of_library(texts)
        aligned = align(self._table, [text.encode() for text in texts], ids)
        if self._remap is not None:
            aligned = [item and item._replace(ids=self._remap[item.ids]) for item in aligned]
        rest = [index for index, item in enumerate(aligned) if item is None]
        # A tokenizer that changes most texts is asked for offsets at once from then on; the result is the same.
        self._library_offsets = len(texts) >= 32 and len(rest) > len(texts) // 2
        for index, item in zip(rest, self._offsets_of_library([texts[i] for i in rest]), strict=True):
            aligned[index] = item
        return aligned

    def _offsets_of_library(self, texts: Sequence[str]) -> list[Encoding]:
        result = []
        for text, item in zip(texts, self._raw_batch(texts, offsets=True), strict=True):
            ids = np.asarray(item.ids, np.int32)
            ranges = np.asarray(item.offsets, np.int32).reshape(-1, 2)
            ids = ids if self._remap is None else self._remap[ids]
            result.append(Encoding(ids, *without_gaps(ranges[:, 0], ranges[:, 1], len(text))))
        return result

    def _ids_of_library(self, texts: Sequence[str]) -> list[list[int]]:
        return [item.ids for item in self._raw_batch(texts, offsets=False)]

    def _raw_batch(self, texts: Sequence[str], offsets: bool) -> list[tokenizers.Encoding]:
        if not texts:
            return []
        run = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
        try:
            return run(list(texts), add_special_tokens=False)
        except TypeError as error:
            bad = next((text for text in texts if not _is_unicode(text)), None)
            if bad is None:
                raise
            raise UserError(
                f"The text {ascii(bad[:60])} holds half of a surrogate pair, which no tokenizer can read; remove it."
            ) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        if self._remap is not None:
            raise NotImplementedError("a tokenizer with aliases only encodes")
        text = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)
        return _clean_up(text) if self._values["clean_up"] else text

    def with_chat_template(self, chat_template: str | None) -> Self:
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        clone.chat_template = chat_template
        clone._values = {**self._values, "chat_template": chat_template}
        return clone

    def aliased(self, aliases: dict[str, str]) -> Self:
        state = json.loads(self._backend)
        _rename(state, aliases)
        backend = json.dumps(state, ensure_ascii=False)
        clone = tokenizers.Tokenizer.from_str(backend)
        vocabulary = clone.get_vocab(with_added_tokens=True)
        remap = list(range(max(max(vocabulary.values()) + 1, self.vocab_size)))
        for text, token in self.added_tokens.items():
            remap[vocabulary[aliases.get(text, text)]] = token
        return type(self)({**self._values, "remap": remap}, self._files, backend)

    def save(self, folder: str | os.PathLike) -> None:
        write_files(self._files, self.chat_template, self.chat_template != self._values["original_template"], folder)

    def state(self) -> tuple[dict, dict[str, bytes]]:
        files = {f"original/{name}": data for name, data in self._files.items()}
        return {"kind": "hf", **self._values}, {"backend": self._backend.encode(), **files}

    @classmethod
    def from_state(cls, values: dict, files: dict[str, bytes]) -> Self:
        values = {key: value for key, value in values.items() if key != "kind"}
        originals = {name.removeprefix("original/"): data for name, data in files.items() if name != "backend"}
        return cls(values, originals, files["backend"].decode())


def _rename(state: dict, aliases: dict[str, str]) -> None:
    """Renames added tokens in a parsed tokenizer.json, also in its model: their text cannot be made of pieces then."""
    for token in state["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model["vocab"]
    pieces = vocabulary if isinstance(vocabulary, dict) else {text for text, _ in vocabulary}
    if not any(text in pieces for text in aliases):
        return
    if isinstance(vocabulary, dict):
        model["vocab"] = {aliases.get(text, text): token for text, token in vocabulary.items()}
    else:
        model["vocab"] = [[aliases.get(text, text), score] for text, score in vocabulary]
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            pair for pair in pairs if not (pair[0] in aliases or pair[1] in aliases or pair[0] + pair[1] in aliases)
        ]


def token_bytes(tokenizer: tokenizers.Tokenizer) -> TokenBytes:
    """Returns the bytes of each id. A guess at the kind of vocabulary that is wrong only makes `align` refuse."""
    state = json.loads(tokenizer.to_str())
    kinds = json.dumps([state["normalizer"], state["pre_tokenizer"], state["decoder"]])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    pieces = [b""] * (max(vocabulary.values()) + 1)
    if '"ByteLevel"' in kinds:
        to_byte = {ord(char): byte for byte, char in byte_level_alphabet().items()}
        for text, token in vocabulary.items():
            if text in added:
                pieces[token] = text.encode()
                continue
            try:
                pieces[token] = text.translate(to_byte).encode("latin-1")
            except UnicodeEncodeError:
                pieces[token] = text.encode()
    else:
        for text, token in vocabulary.items():
            if text not in added and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                pieces[token] = bytes([int(text[3:5], 16)])
            else:
                pieces[token] = (text if text in added else text.replace("▁", " ")).encode()
    return TokenBytes(pieces)


def byte_level_alphabet() -> dict[int, str]:
    """Returns byte -> character of GPT-2's byte-level vocabulary: printable bytes stand for themselves.

    Source: `bytes_to_unicode` of https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _clean_up(text: str) -> str:
    """Removes spaces before punctuation, as transformers does for vocabularies that are not BPE."""
    for old in (" .", " ?", " !", " ,"):
        text = text.replace(old, old[1:])
    text = text.replace(" ' ", "'")
    for old in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(old, old[1:])
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
