"""What transformers makes of a directory, and of the tokens that a run adds to it, as a tokenizer of ours."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from sft_jax.data.tokenizers.added_tokens import TOKENIZER, with_tokens
from sft_jax.data.tokenizers.hf_tokenizer import HFTokenizer
from sft_jax.data.tokenizers.tokenizer_files import read_files, write_files
from sft_jax.errors import UserError

# Loading compares ids with transformers' on these, so that a tokenizer that works on the text in Python is noticed.
PROBES = ("Hello  world,\n it's 12345.67!", " \t leading", "naïve ½ 漢字 🤗🇩🇪", "def f(x):\n    return x\n", "▁a <s>")


def load_hf(folder: Path, add_tokens: Sequence[str] = ()) -> HFTokenizer:
    """Loads a directory through transformers and keeps the backend. Raises UserError naming the directory.

    Tokens to add that it has not are written into a copy of its files, which is loaded in their place.
    """
    loaded = _load(folder, folder)
    tokenizer = _tokenizer(loaded, folder, folder)
    missing = [text for text in add_tokens if text not in tokenizer.added_tokens]
    if not missing:
        return tokenizer
    vocabulary = loaded.get_vocab()
    new_ids = itertools.count(tokenizer.vocab_size)
    tokens = {text: vocabulary[text] if text in vocabulary else next(new_ids) for text in missing}
    files = {TOKENIZER: loaded.backend_tokenizer.to_str().encode(), **read_files(folder)}
    with tempfile.TemporaryDirectory() as copy:
        write_files(with_tokens(files, tokens), None, False, copy)
        if (folder / "config.json").is_file():  # names the class of the tokenizer, where its own files do not
            shutil.copy(folder / "config.json", copy)
        larger = _tokenizer(_load(Path(copy), folder), Path(copy), folder)
    _check_added(tokens, larger, tokenizer, folder)
    return larger


def _check_added(tokens: dict[str, int], larger: HFTokenizer, tokenizer: HFTokenizer, folder: Path) -> None:
    """Raises UserError unless a tokenizer has new tokens as they were meant, and is the same beside them."""
    for text, token in tokens.items():
        if larger.added_tokens.get(text) != token or larger.encode(text) != [token]:
            raise UserError(
                f"data.add_tokens: the tokenizer in {folder} reads '{text}' as the ids {larger.encode(text)} and not as its "
                f"own, {token}; choose another text, or add it with transformers and name the result."
            )
    for probe in PROBES:
        if not any(text in probe for text in tokens) and larger.encode(probe) != tokenizer.encode(probe):
            raise UserError(
                f"data.add_tokens: the tokenizer in {folder} reads {probe!r} otherwise once its files list further tokens; "
                "add them with transformers and name the result."
            )


def _load(folder: Path, name: Path):
    """Returns the tokenizer of transformers, a fast one. Raises UserError beginning with `name`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell everybody without torch that torch is missing
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises bare Exceptions for files it cannot parse
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "copy the tokenizer's files again"
        if "trust_remote_code" in str(error):
            remedy = "code of a model repository is never run; use a tokenizer.json without auto_map"
        raise UserError(f"{name}: transformers cannot load the tokenizer ({reason}); {remedy}.") from error
    if not getattr(loaded, "is_fast", False):
        raise UserError(f"{name}: {type(loaded).__name__} is not a fast tokenizer; convert it to a tokenizer.json.")
    return loaded


def _tokenizer(loaded, folder: Path, name: Path) -> HFTokenizer:
    """Returns ours from that of transformers and the files in `folder`. Raises UserError beginning with `name`."""
    backend = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    prefix = _plain_prefix(loaded)
    # Not needed for ids without special tokens, and ByteLevel's would cut white space out of the offsets.
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    added = {token_id: token for token_id, token in backend.get_added_tokens_decoder().items()}
    template = loaded.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise UserError(f"{name}: the tokenizer has no vocabulary; copy the tokenizer's files again.")
    is_bpe = isinstance(backend.model, tokenizers.models.BPE)
    forced = getattr(loaded, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    values = {
        "vocab_size": max(vocabulary.values()) + 1,
        "bos_id": loaded.bos_token_id,
        "eos_id": loaded.eos_token_id,
        "pad_id": loaded.pad_token_id,
        "chat_template": template,
        "original_template": template,
        "special_tokens": {
            name: str(text) for name, text in loaded.special_tokens_map.items() if isinstance(text, str)
        },
        "added_tokens": {token.content: token_id for token_id, token in sorted(added.items())},
        "special_added_tokens": sorted(token.content for token in added.values() if token.special),
        "plain_prefix": prefix,
        "encode_special_tokens": bool(loaded.split_special_tokens),
        "clean_up": bool(loaded.clean_up_tokenization_spaces and (not is_bpe or forced)),
        "remap": None,  # id of the backend -> id, in a tokenizer with aliases
    }
    tokenizer = HFTokenizer(values, read_files(folder), backend.to_str())
    for probe in PROBES:
        if tokenizer.encode(probe) != loaded(probe, add_special_tokens=False)["input_ids"]:
            raise UserError(
                f"{name}: {type(loaded).__name__} changes text in Python code, so its ids are not those of its "
                "tokenizer.json; save it as a plain PreTrainedTokenizerFast."
            )
    return tokenizer


def _plain_prefix(loaded) -> list[int]:
    """Returns the ids that the post-processor puts before plain text."""
    plain = loaded("a", add_special_tokens=False)["input_ids"]
    whole = loaded("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []
