"""The tokenizer of a model, and where it is stored for workers and later starts, which then need no transformers."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sft_jax.data.stores.fingerprint import folder_hash, tokenizer_files_fingerprint
from sft_jax.data.stores.store_writer import disk_errors
from sft_jax.data.tokenizers.tokens import Tokenizer, load_stored_tokenizer, load_tokenizer, store_tokenizer

_CHECKSUM = "checksum"  # of the files of a stored tokenizer


def open_tokenizer(model_path: str, cache: Path, add_tokens: Sequence[str] = ()) -> tuple[Tokenizer, Path]:
    """Returns the tokenizer of a model, and the folder in `cache` where it is stored for workers and later starts.

    It is that of `load_tokenizer`, with `add_tokens`. The stored one is used while the files of a model directory and the
    library that reads them stay the same; then transformers, which takes seconds to import, is not needed. The tokenizer
    of a hub id is always loaded.
    """
    source = Path(model_path).expanduser()
    folder = cache / "tokenizers" / tokenizer_files_fingerprint(source, add_tokens) if source.is_dir() else None
    if folder is not None and _is_whole(folder):
        return load_stored_tokenizer(folder), folder
    tokenizer = load_tokenizer(model_path, add_tokens)
    if folder is None:
        folder = cache / "tokenizers" / tokenizer.fingerprint[:32]
        if _is_whole(folder):
            return tokenizer, folder
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp.", dir=folder.parent))
        try:
            store_tokenizer(tokenizer, temporary)
            (temporary / _CHECKSUM).write_text(folder_hash(temporary))
            if _is_whole(folder):  # another process was faster, and its workers may be reading it
                return tokenizer, folder
            shutil.rmtree(folder, ignore_errors=True)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not _is_whole(folder):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return tokenizer, folder


def _is_whole(folder: Path) -> bool:
    """Returns whether a stored tokenizer is there as it was written."""
    try:
        return (folder / _CHECKSUM).read_text() == folder_hash(folder, leave_out=_CHECKSUM)
    except (FileNotFoundError, NotADirectoryError):  # or another process is removing it
        return False
