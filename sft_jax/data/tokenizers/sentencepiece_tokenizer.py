"""Bare SentencePiece models, encoded by SentencePiece itself.

Control and user-defined symbols are recognised in text, as servers do with the added tokens of a tokenizer.json; what
lies between them is encoded by SentencePiece, so text without them has SentencePiece's own ids. Only text at the very
beginning gets the space that the model puts before a sentence: `[INST] hello`, written by a template, gives the pieces
`[INST]` and `▁hello`.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Self

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as schema

from sft_jax.data.longest import longest_of
from sft_jax.data.tokenizers.alignment import Encoding, TokenBytes, align, without_gaps
from sft_jax.data.tokenizers.sentencepiece_export import to_tokenizer_json
from sft_jax.data.tokenizers.tokenizer_files import CONFIG, write_files
from sft_jax.errors import UserError

MODEL = "tokenizer.model"
Piece = schema.ModelProto.SentencePiece


class SentencePieceTokenizer:
    """See `sft_jax.data.tokenizers.tokens.Tokenizer`. Made by `sentencepiece_load.load_sentencepiece`."""

    def __init__(self, values: dict, files: dict[str, bytes]):
        """`values` are those that `load_sentencepiece` collects; `files` holds the model and its config."""
        self._values = values
        self._files = files
        self._open()

    def _open(self) -> None:
        values = self._values
        aliases = values["aliases"]
        proto = schema.ModelProto.FromString(self._files[MODEL])
        for piece in proto.pieces:
            if piece.type in (Piece.CONTROL, Piece.USER_DEFINED):
                piece.piece = aliases.get(piece.piece, piece.piece)
        self._first = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        proto.normalizer_spec.add_dummy_prefix = False
        self._rest = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._table = _token_bytes(proto)
        self.vocab_size: int = values["vocab_size"]
        self.bos_id: int | None = values["bos_id"]
        self.eos_id: int | None = values["eos_id"]
        self.pad_id: int | None = values["pad_id"]
        self.chat_template: str | None = values["chat_template"]
        self.special_tokens: dict[str, str] = dict(values["special_tokens"])
        self.added_tokens: dict[str, int] = dict(values["added_tokens"])
        self.special_added_tokens = frozenset(values["special_added_tokens"])
        self.plain_prefix: tuple[int, ...] = tuple(values["plain_prefix"])
        self._special_ids = {self.added_tokens[text] for text in self.special_added_tokens}
        self._cut = {aliases.get(text, text): token for text, token in self.added_tokens.items()}
        self._id_to_cut = {token: text for text, token in self._cut.items()}
        self._pattern = re.compile(longest_of(self._cut)) if self._cut else None
        # Such a model strips the spaces at both ends of what it encodes; one after an added token has a meaning.
        self._strips = proto.normalizer_spec.remove_extra_whitespaces

    def __getstate__(self) -> dict:
        return {"values": self._values, "files": self._files}

    def __setstate__(self, state: dict) -> None:
        self._values, self._files = state["values"], state["files"]
        self._open()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model, the special tokens and the chat template."""
        values = {key: value for key, value in self._values.items() if key != "original_template"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode() + b"\0" + self._files[MODEL]).hexdigest()

    def encode(self, text: str) -> list[int]:
        _check_unicode(text)
        ids: list[int] = []
        for piece, token, start in self._fragments(text):
            ids += [token] if token is not None else self._processor(piece, start).encode(piece)
        return ids

    def _processor(self, piece: str, start: int) -> sentencepiece.SentencePieceProcessor:
        """Returns the model that puts a space before the text, or the one that does not."""
        return self._first if start == 0 or (self._strips and piece.startswith(" ")) else self._rest

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Encoding]:
        fragments = [self._fragments(text) for text in texts]
        plain: dict[sentencepiece.SentencePieceProcessor, list[str]] = {self._first: [], self._rest: []}
        for text, parts in zip(texts, fragments, strict=True):
            _check_unicode(text)
            for piece, token, start in parts:
                if token is None:
                    plain[self._processor(piece, start)].append(piece)
        encoded = {processor: iter(self._encode_plain(pieces, processor)) for processor, pieces in plain.items()}
        result = []
        for parts in fragments:
            items = []
            for piece, token, start in parts:
                if token is None:
                    ids, starts, ends = next(encoded[self._processor(piece, start)])
                    items.append(Encoding(ids, starts + np.int32(start), ends + np.int32(start)))
                else:
                    items.append(
                        Encoding(*(np.asarray([value], np.int32) for value in (token, start, start + len(piece))))
                    )
            result.append(items[0] if len(items) == 1 else _concatenate(items))
        return result

    def _fragments(self, text: str) -> list[tuple[str, int | None, int]]:
        """Returns (part of the text, id if it is an added token, first character) in order."""
        if self._pattern is None or not text:
            return [(text, None, 0)] if text else []
        parts, position = [], 0
        for match in self._pattern.finditer(text):
            if match.start() > position:
                parts.append((text[position : match.start()], None, position))
            parts.append((match.group(), self._cut[match.group()], match.start()))
            position = match.end()
        if position < len(text):
            parts.append((text[position:], None, position))
        return parts

    def _encode_plain(self, texts: list[str], processor: sentencepiece.SentencePieceProcessor) -> list[Encoding]:
        if not texts:
            return []
        aligned = align(self._table, [text.encode() for text in texts], processor.encode(texts))
        return [
            item if item is not None else self._offsets_of_library(text, processor)
            for text, item in zip(texts, aligned, strict=True)
        ]

    def _offsets_of_library(self, text: str, processor: sentencepiece.SentencePieceProcessor) -> Encoding:
        """Returns offsets as SentencePiece counts them, in UTF-8 bytes, turned into characters."""
        from sentencepiece import sentencepiece_pb2

        serialized = processor.encode(text, out_type="serialized_proto")
        pieces = sentencepiece_pb2.SentencePieceText.FromString(serialized).pieces
        data = np.frombuffer(text.encode(), np.uint8)
        character = np.concatenate([[0], np.cumsum((data & 0xC0) != 0x80)])  # characters begun before byte i
        ids = np.fromiter((piece.id for piece in pieces), np.int32, len(pieces))
        starts = character[np.fromiter((piece.begin for piece in pieces), np.int64, len(pieces))]
        ends = character[np.fromiter((piece.end for piece in pieces), np.int64, len(pieces))]
        # All bytes of a character but the last have no width, and neither has a space put before the text: theirs is
        # the character that they stand at.
        ends = np.where(ends == starts, np.minimum(starts + 1, len(text)), ends)
        return Encoding(ids, *without_gaps(starts, ends, len(text)))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        ids = [int(token) for token in ids]
        if skip_special_tokens:
            ids = [token for token in ids if token not in self._special_ids]
        text, run, processor = [], [], self._first
        for token in [*ids, None]:
            cut = self._id_to_cut.get(token)
            if token is not None and cut is None:
                run.append(token)
                continue
            if run:
                if self._strips and processor is self._rest and processor.id_to_piece(run[0]).startswith("▁"):
                    text.append(" ")
                text.append(processor.decode(run))
            run, processor = [], self._rest
            text.append(cut or "")
        return "".join(text)

    def with_chat_template(self, chat_template: str | None) -> Self:
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        clone.chat_template = chat_template
        clone._values = {**self._values, "chat_template": chat_template}
        return clone

    def aliased(self, aliases: dict[str, str]) -> Self:
        return type(self)({**self._values, "aliases": dict(aliases)}, self._files)

    def save(self, folder: str | os.PathLike) -> None:
        files = dict(self._files)
        config = json.loads(files.get(CONFIG, b"{}"))
        # transformers would make the unknown token an added one, matched in text, if it were named.
        named = {name: text for name, text in self.special_tokens.items() if text in self.added_tokens}
        config = {
            **config,
            **named,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        files[CONFIG] = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
        proto = schema.ModelProto.FromString(self._files[MODEL])
        files["tokenizer.json"] = to_tokenizer_json(
            proto, self.added_tokens, self.special_added_tokens, self.plain_prefix
        )
        write_files(files, self.chat_template, self.chat_template != self._values["original_template"], folder)

    def state(self) -> tuple[dict, dict[str, bytes]]:
        return {"kind": "sentencepiece", **self._values}, dict(self._files)

    @classmethod
    def from_state(cls, values: dict, files: dict[str, bytes]) -> Self:
        return cls({key: value for key, value in values.items() if key != "kind"}, files)


def _concatenate(items: list[Encoding]) -> Encoding:
    empty = np.zeros(0, np.int32)
    return Encoding(*(np.concatenate([empty, *(item[field] for item in items)]) for field in range(3)))


def _token_bytes(proto: schema.ModelProto) -> TokenBytes:
    pieces = []
    for piece in proto.pieces:
        if piece.type == Piece.BYTE:
            pieces.append(bytes([int(piece.piece[3:5], 16)]))
        elif piece.type in (Piece.UNKNOWN, Piece.CONTROL):
            pieces.append(b"")
        else:
            pieces.append(piece.piece.replace("▁", " ").encode())
    return TokenBytes(pieces)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text {ascii(text[:60])} holds half of a surrogate pair, which no tokenizer can read; remove it."
        ) from error
