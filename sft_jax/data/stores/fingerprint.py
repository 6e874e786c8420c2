"""Fingerprints: what prepared data depend on, as one hash, so that they are used again exactly when nothing changed."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sft_jax.config import ColumnsConfig
from sft_jax.data.stores.store import FORMAT

_SOURCE = Path(__file__).parents[1]
_LIBRARIES = ("tokenizers", "sentencepiece", "jinja2")  # they make ids and texts


def tokens_fingerprint(
    *,
    data: str,
    format: str,
    columns: ColumnsConfig,
    supervise: str,
    template: str | None,
    template_kwargs: dict[str, Any],
    allow_special_tokens: bool,
    tokenizer: str,
    add_tokens: Sequence[str],
) -> str:
    """Returns the fingerprint of the prepared examples of one data set.

    Args:
        data: hash of the bytes of its files, in order; where they lie and what they are called does not matter.
        format, columns, supervise, template_kwargs, allow_special_tokens: as configured.
        template: source of the chat template, None for none.
        tokenizer: fingerprint of the tokenizer.
        add_tokens: tokens whose occurrences are counted.

    The code of sft_jax.data and the versions of the libraries that make texts and ids enter too. What comes after the
    store (max_length, packing, mixture, seed) does not; see RowStream.plan_hash.
    """
    return _hash(
        {
            "store": FORMAT, "code": source_hash(), "libraries": {name: metadata.version(name) for name in _LIBRARIES},
            "data": data, "format": format, "columns": dataclasses.asdict(columns), "supervise": supervise,
            "template": template, "template_kwargs": template_kwargs, "allow_special_tokens": allow_special_tokens,
            "tokenizer": tokenizer, "add_tokens": list(add_tokens),
        }
    )  # fmt: skip


def tokenizer_files_fingerprint(folder: Path, add_tokens: Sequence[str]) -> str:
    """Returns the fingerprint of what a tokenizer may be made of: files, tokens to add, and the code that reads them."""
    patterns = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "additional_chat_templates/*")
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    digests = {
        path.relative_to(folder).as_posix(): _file_hash(path)
        for path in sorted(files)
        if not path.name.endswith((".index.json", "generation_config.json"))
    }
    versions = {name: metadata.version(name) for name in ("transformers", *_LIBRARIES)}
    return _hash({"code": source_hash(), "libraries": versions, "files": digests, "add_tokens": list(add_tokens)})


@functools.cache
def source_hash() -> str:
    """Returns the hash of the source of sft_jax.data."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(_SOURCE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_SOURCE).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def folder_hash(folder: Path, leave_out: str = "") -> str:
    """Returns the hash of all files in a folder, by name, but the one called `leave_out`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != leave_out)
    return _hash({path.relative_to(folder).as_posix(): _file_hash(path) for path in files})


def combine(fingerprints: dict[str, str]) -> str:
    """Returns one fingerprint of several named ones, in their order."""
    return _hash(list(fingerprints.items()))


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
