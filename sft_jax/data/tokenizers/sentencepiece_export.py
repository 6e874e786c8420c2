"""A SentencePiece model as a Hugging Face tokenizer.json that gives the same ids.

transformers can read a `tokenizer.model` itself, but it drops the space before the first word, so that a server would
feed other ids than training did (transformers 5.23). An exported model therefore carries this file. Known to differ: a
Unigram model where two ways to cut a word score the same.
"""

import base64
import json
import math
from collections.abc import Sequence

from sentencepiece import sentencepiece_model_pb2 as schema

Piece = schema.ModelProto.SentencePiece
UNIGRAM, BPE = schema.TrainerSpec.UNIGRAM, schema.TrainerSpec.BPE


def to_tokenizer_json(
    proto: schema.ModelProto, added_tokens: dict[str, int], special: frozenset[str], prefix: Sequence[int]
) -> bytes:
    """Returns the tokenizer.json. `prefix` are ids that are put before plain text."""
    normalizer, spec = [], proto.normalizer_spec
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        normalizer.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    # Metaspace adds its mark only where the text does not begin with it already. A model that keeps extra spaces always
    # adds it: there spaces become marks first, and the first Metaspace, whose own mark is a plain space, cannot meet
    # one. A model that removes extra spaces adds none before the one that is left. The second Metaspace makes the real
    # marks.
    if spec.remove_extra_whitespaces:
        normalizer.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        normalizer.append({"type": "Replace", "pattern": {"Regex": "[ ▁]+\\z"}, "content": ""})
    else:
        normalizer.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    metaspace = [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}]
    if spec.add_dummy_prefix:
        metaspace.insert(0, {"type": "Metaspace", "replacement": " ", "prepend_scheme": "first", "split": False})
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spec.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    names = {token: text for text, token in added_tokens.items()}
    names |= {token: piece.piece for token, piece in enumerate(proto.pieces)}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token, "content": text, "special": text in special,
                "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            }
            for text, token in sorted(added_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": metaspace},
        "post_processor": _post_processor([(names[token], token) for token in prefix]),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model(proto),
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


def _post_processor(prefix: list[tuple[str, int]]) -> dict:
    before = [{"SpecialToken": {"id": text, "type_id": 0}} for text, _ in prefix]
    return {
        "type": "TemplateProcessing",
        "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*before, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in prefix},
    }


def _model(proto: schema.ModelProto) -> dict:
    trainer, pieces = proto.trainer_spec, proto.pieces
    if trainer.model_type == UNIGRAM:
        return {
            "type": "Unigram",
            "unk_id": trainer.unk_id,
            "vocab": [[piece.piece, piece.score] for piece in pieces],
            "byte_fallback": trainer.byte_fallback,
        }
    vocabulary = {piece.piece: token for token, piece in enumerate(pieces)}
    scores = {piece.piece: piece.score for piece in pieces if piece.type == Piece.NORMAL}
    # Symbols for runs of spaces are no added tokens, and go before all other pieces.
    scores |= {piece.piece: math.inf for piece in pieces if piece.type == Piece.USER_DEFINED and "▁" in piece.piece}
    merges = []
    for text, score in scores.items():
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        halves = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        merges += [(-score, vocabulary[left], vocabulary[right], left, right) for left, right in halves]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[trainer.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": trainer.byte_fallback,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [[left, right] for _, _, _, left, right in sorted(merges)],
    }
