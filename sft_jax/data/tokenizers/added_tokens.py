"""Special tokens that a run adds to a tokenizer, written into its files: what it trains with is what a server will load."""

import json
from collections.abc import Mapping
from typing import Any

from sft_jax.data.tokenizers.tokenizer_files import CONFIG
from sft_jax.errors import UserError

TOKENIZER = "tokenizer.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_LISTS = ("extra_special_tokens", "additional_special_tokens")  # names of the same list: of transformers 5, and earlier


def with_tokens(files: Mapping[str, bytes], tokens: Mapping[str, int]) -> dict[str, bytes]:
    """Returns the files of a tokenizer with special tokens, text -> id, added in each place where such tokens are listed.

    Raises UserError for a file that is no JSON object.
    """
    files = dict(files)
    config = _read(files, CONFIG) if CONFIG in files else {}
    if TOKENIZER not in files or "added_tokens_decoder" in config:
        entries = {str(token): _entry(text) for text, token in tokens.items()}
        config["added_tokens_decoder"] = {**config.get("added_tokens_decoder", {}), **entries}
    _extend_list(config, tokens, _LISTS[1])
    files[CONFIG] = _to_json(config)
    if _SPECIAL_TOKENS in files:
        special = _read(files, _SPECIAL_TOKENS)
        _extend_list(special, tokens, None)
        files[_SPECIAL_TOKENS] = _to_json(special)
    if TOKENIZER in files:
        state = _read(files, TOKENIZER)
        state["added_tokens"] += [{"id": token, **_entry(text)} for text, token in tokens.items()]
        files[TOKENIZER] = _to_json(state)
    return files


def _read(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files[name])
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"data.add_tokens: {name} of the tokenizer is no JSON object, so nothing can be added; copy it again.")
    return value


def _entry(text: str) -> dict[str, Any]:
    return {
        "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True,
    }  # fmt: skip


def _extend_list(values: dict[str, Any], tokens: Mapping[str, int], new: str | None) -> None:
    """Adds tokens to the list of special tokens in `values`; where there is none, under the name `new`."""
    name = next((name for name in _LISTS if isinstance(values.get(name), list)), new)
    if name is not None:
        values[name] = [*values.get(name, ()), *tokens]


def _to_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
