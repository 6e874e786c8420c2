"""What a SentencePiece model and the files beside it say about a tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as schema

from sft_jax.data.tokenizers.added_tokens import with_tokens
from sft_jax.data.tokenizers.sentencepiece_tokenizer import MODEL, Piece, SentencePieceTokenizer
from sft_jax.data.tokenizers.tokenizer_files import CONFIG, TEMPLATE, read_files
from sft_jax.errors import UserError

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_sentencepiece(path: Path, add_tokens: Sequence[str] = ()) -> SentencePieceTokenizer:
    """Loads a SentencePiece model file, with the tokenizer_config.json beside it where there is one.

    Tokens to add get the next ids, but those that are ordinary pieces of the model keep theirs.
    """
    try:
        data = path.read_bytes()
        proto = schema.ModelProto.FromString(data)
    except (OSError, DecodeError) as error:
        raise UserError(
            f"{path}: is not a SentencePiece model ({error}); copy the file again or use a tokenizer.json."
        ) from error
    if not proto.pieces:
        raise UserError(f"{path}: is not a SentencePiece model; copy the file again or use a tokenizer.json.")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(
            f"{path}: keeps spaces at the end of words (treat_whitespace_as_suffix), which is not supported."
        )
    files = {name: content for name, content in read_files(path.parent).items() if name != "tokenizer.json"}
    files[MODEL] = data
    config = _read_json(path.parent / CONFIG)
    pieces = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    # User-defined symbols for runs of spaces are ordinary pieces here: SentencePiece sees the spaces of a text as ▁.
    added = {
        piece.piece: index
        for index, piece in enumerate(proto.pieces)
        if piece.type == Piece.CONTROL or (piece.type == Piece.USER_DEFINED and "▁" not in piece.piece)
    }
    special = {piece.piece for piece in proto.pieces if piece.type == Piece.CONTROL}
    for text, token, is_special in _declared_tokens(path.parent, config):
        if token < len(proto.pieces) and pieces.get(text) != token:
            raise UserError(
                f"{path.parent}: '{text}' is declared as id {token}, which {path.name} calls "
                f"'{proto.pieces[token].piece}'; correct the declaration."
            )
        if token >= len(proto.pieces):
            added[text] = token
            special |= {text} if is_special else set()
    trainer = proto.trainer_spec
    ids = {
        "bos_token": trainer.bos_id,
        "eos_token": trainer.eos_id,
        "unk_token": trainer.unk_id,
        "pad_token": trainer.pad_id,
    }
    named = {name: proto.pieces[token].piece for name, token in ids.items() if 0 <= token < len(proto.pieces)}
    for name in NAMED:
        text = config.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str):
            if text not in added and text not in pieces:
                raise UserError(f"{path.parent / CONFIG}: {name} '{text}' is not in {path.name}; correct the name.")
            named[name] = text
            if text not in added:  # as transformers does with every special token that a config names
                added[text] = pieces[text]
                special.add(text)
    vocab_size = max(len(proto.pieces), max(added.values(), default=-1) + 1)
    new = {}
    for text in add_tokens:
        if text not in added:
            new[text] = added[text] = pieces.get(text, vocab_size)
            special.add(text)
            vocab_size = max(vocab_size, added[text] + 1)
    if new:
        files = with_tokens(files, new)
    lookup = {**pieces, **added}
    ids = {name: lookup[text] for name, text in named.items()}
    template = _template(path.parent, config)
    prefix = [ids["bos_token"]] if "bos_token" in ids and config.get("add_bos_token", True) else []
    values = {
        "vocab_size": vocab_size,
        "bos_id": ids.get("bos_token"),
        "eos_id": ids.get("eos_token"),
        "pad_id": ids.get("pad_token"),
        "chat_template": template,
        "original_template": template,
        "special_tokens": named,
        "added_tokens": added,
        "special_added_tokens": sorted(special),
        "plain_prefix": prefix,
        "aliases": {},  # text of an added token -> text that stands for it, in a tokenizer with aliases
    }
    return SentencePieceTokenizer(values, files)


def _declared_tokens(folder: Path, config: dict) -> list[tuple[str, int, bool]]:
    """Returns the added tokens of tokenizer_config.json and added_tokens.json."""
    declared = []
    for token, entry in (config.get("added_tokens_decoder") or {}).items():
        if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
            raise UserError(
                f"{folder / CONFIG}: '{entry['content']}' takes white space around it, which is not supported here."
            )
        declared.append((entry["content"], int(token), bool(entry.get("special"))))
    declared += [(text, int(token), False) for text, token in _read_json(folder / "added_tokens.json").items()]
    return declared


def _template(folder: Path, config: dict) -> str | None:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); copy the file again.") from error
    return content if isinstance(content, dict) else {}
