"""Fetching a model from the Hugging Face hub: what is read of it and nothing else, and never a pickle."""

import glob
from pathlib import Path

import huggingface_hub

from sft_jax.errors import UserError
from sft_jax.hf.files import INDEX_FILE, SINGLE_FILE, no_weights, read_json
from sft_jax.hf.peft.settings import WEIGHTS as ADAPTER_FILE
from sft_jax.hf.peft.settings import is_adapter_directory

_TEXTS = ("*.json", "*.model", "*.jinja", "merges.txt")  # configuration and tokenizer
_BELOW = "*/*"  # other forms of the same model, such as onnx/


def download(name: str, weights: bool = True) -> Path:
    """Returns the folder of a hub id in the cache, after fetching what is missing there; without `weights`, its texts alone.

    Repositories hold the same weights several times (consolidated.safetensors, onnx/, .bin), so the weights are
    `model.safetensors`, or exactly the shards that its index names; of an adapter `adapter_model.safetensors`. Raises UserError naming `name` and the remedy.
    """
    from huggingface_hub import errors  # here: it imports an HTTP client, and most runs name a directory

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_TEXTS), ignore_patterns=[_BELOW]))
        if weights:
            _fetch_weights(name, folder)
        return folder
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name}: access is gated; accept its licence on huggingface.co and log in (`hf auth login`)."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"{name}: is neither a directory here nor a model on the Hugging Face hub; check the spelling."
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: is not a directory here, and the Hugging Face hub cannot be reached ({reason}); "
            "download it where there is a network and name the directory."
        ) from error


def _fetch_weights(name: str, folder: Path) -> None:
    from huggingface_hub import errors

    # The folder is named after its commit: weights of a later one would not fit the files that are here.
    revision = folder.name
    fetch = lambda files: huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files)  # noqa: E731
    if is_adapter_directory(folder):
        fetch([ADAPTER_FILE])
        if (folder / ADAPTER_FILE).is_file():
            return
    if not (folder / SINGLE_FILE).is_file():
        fetch([SINGLE_FILE])
    if (folder / SINGLE_FILE).is_file():
        return
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        shards = set(weight_map.values()) if isinstance(weight_map, dict) else ()
        fetch(sorted(glob.escape(shard) for shard in shards if isinstance(shard, str) and shard.endswith(".safetensors")))
        return
    try:
        files = huggingface_hub.list_repo_files(name, revision=revision)
    except (errors.HfHubHTTPError, OSError):
        return  # without a network; whoever opens the weights says that there are none
    raise UserError(no_weights(name, files))
