"""Tokenizers: one protocol over Hugging Face fast tokenizers and bare SentencePiece models.

`load_tokenizer` is the only place that may import transformers. What it returns is plain data: it can be pickled, sent
to worker processes, stored beside prepared data and read again, all without transformers.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

from sft_jax.data.tokenizers.alignment import Encoding
from sft_jax.errors import UserError

__all__ = ["Encoding", "Tokenizer", "load_stored_tokenizer", "load_tokenizer", "store_tokenizer"]

STATE_FILE = "tokenizer_state.json"

# What a tokenizer may be made of; everything else of a hub repository stays there.
HUB_PATTERNS = (
    "tokenizer*", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template*",
    "additional_chat_templates/*", "config.json", "*.model",
)  # fmt: skip


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Objects are picklable and do not need transformers."""

    vocab_size: int  # highest id + 1, added tokens included
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None
    special_tokens: dict[str, str]  # bos_token, eos_token, ... as templates read them
    added_tokens: dict[str, int]  # text -> id of every token that is matched in text as a whole, special or not
    special_added_tokens: frozenset[str]  # those of `added_tokens` that `skip_special_tokens` leaves out
    plain_prefix: tuple[int, ...]  # ids put before plain text at inference (BOS, or nothing)
    fingerprint: str  # of everything that determines ids and the chat template

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`: no BOS or EOS added, added tokens recognised."""

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Encoding]:
        """Returns ids and character ranges of each text. Ids are those of `encode`."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of `ids`."""

    def with_chat_template(self, chat_template: str | None) -> Self:
        """Returns the tokenizer with another chat template, which `save` exports."""

    def aliased(self, aliases: dict[str, str]) -> Self:
        """Returns a tokenizer that matches each added token in `aliases` under its alias only, never under its text.

        Ids stay those of the original. Aliases must not occur in the texts that are encoded.
        """

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files from which transformers loads the same tokenizer."""

    def state(self) -> tuple[dict, dict[str, bytes]]:
        """Returns what rebuilds the object: JSON values and named files."""


def load_tokenizer(path: str | os.PathLike, add_tokens: Sequence[str] = ()) -> Tokenizer:
    """Loads a tokenizer from a model directory, a hub id, a `tokenizer.json` or a SentencePiece `.model` file.

    A directory with a `tokenizer.json` (or `vocab.json` and `merges.txt`) is read through transformers, whose ids are
    the truth because servers use them. One that has only a `tokenizer.model` is read by SentencePiece itself. Code of
    a model repository is never run. Raises UserError naming the directory and the remedy.

    `add_tokens` are made special tokens with ids of their own; one that is an added token already stays what it is, and
    one that is in the vocabulary otherwise keeps its id.
    """
    from sft_jax.data.tokenizers.hf_load import load_hf
    from sft_jax.data.tokenizers.sentencepiece_load import load_sentencepiece

    text = os.fspath(path)
    folder = Path(text).expanduser()
    if folder.is_file():
        if folder.suffix == ".model":
            return load_sentencepiece(folder, add_tokens)
        if folder.name == "tokenizer.json":
            return load_hf(folder.parent, add_tokens)
        raise UserError(
            f"{folder}: is not a tokenizer; name a directory, a tokenizer.json or a SentencePiece .model file."
        )
    if not folder.is_dir():
        folder = _download(text)
    if (folder / "tokenizer.json").is_file():
        return load_hf(folder, add_tokens)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return load_hf(folder, add_tokens)
    if (folder / "tokenizer.model").is_file():
        return load_sentencepiece(folder / "tokenizer.model", add_tokens)
    if (folder / "tekken.json").is_file():
        raise UserError(
            f"{folder}: has only a tekken.json, which is not read here; "
            "save it as tokenizer.json (transformers' AutoTokenizer, then save_pretrained) beside it."
        )
    raise UserError(
        f"{folder}: holds no tokenizer; it needs a tokenizer.json (a Hugging Face fast tokenizer) or a "
        "tokenizer.model (SentencePiece)."
    )


def store_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Writes `tokenizer` to `folder` so that `load_stored_tokenizer` gives it back without transformers."""
    values, files = tokenizer.state()
    folder = Path(folder)
    (folder / "files").mkdir(parents=True, exist_ok=True)
    names = sorted(files)
    for index, name in enumerate(names):
        (folder / "files" / str(index)).write_bytes(files[name])
    (folder / STATE_FILE).write_text(json.dumps({"values": values, "files": names}), encoding="utf-8")


def load_stored_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Reads what `store_tokenizer` wrote. Raises UserError if the folder does not hold it whole."""
    from sft_jax.data.tokenizers.hf_tokenizer import HFTokenizer
    from sft_jax.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    folder = Path(folder)
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        files = {name: (folder / "files" / str(index)).read_bytes() for index, name in enumerate(state["files"])}
        kind = {"hf": HFTokenizer, "sentencepiece": SentencePieceTokenizer}[state["values"]["kind"]]
        return kind.from_state(state["values"], files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: the stored tokenizer cannot be read ({error}); prepare the data again.") from error


def _download(name: str) -> Path:
    """Returns the local folder of a hub id's tokenizer files, downloading what is not in the cache."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or name.count("/") > 1:
        raise UserError(f"{name}: there is no such directory; name a model directory or a hub id such as org/model.")
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
    except GatedRepoError as error:
        raise UserError(
            f"{name}: access is gated; accept its licence on huggingface.co and log in (hf auth login)."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name}: is neither a directory here nor a model on the Hugging Face hub; check the spelling."
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: is not a directory here, and the Hugging Face hub cannot be reached ({_first_line(error)}); "
            "download it where there is a network and name the directory."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
