"""Hugging Face data sets: saved to disk, in the cache of the `datasets` package, or on the hub as Parquet.

`hf:PATH`, `hf:PATH:split` and `hf:owner/name/config:split`. The package itself is not needed: its files are Arrow.
"""

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from sft_jax.data.sources.arrow_files import open_arrow, open_parquet
from sft_jax.data.sources.parts import File, Part, Shared
from sft_jax.errors import UserError, reason_of

PREFIX = "hf:"
_HUB = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+|[\w.-]+)(/(?P<config>[^/:]+))?:(?P<split>[\w.-]+)")
_PARQUET = "refs/convert/parquet"  # the branch to which the hub converts every data set that it can


def open_hugging_face(name: str, label: str, shared: Shared) -> list[Part]:
    """Opens a data set, a part for each of its files. Raises UserError where it cannot be found."""
    place = os.path.expanduser(name.removeprefix(PREFIX))
    folder, _, split = place.rpartition(":")
    if os.path.isdir(place):
        return open_saved(place, name, label, shared)
    if folder and os.path.isdir(folder):
        return open_saved(folder, name, label, shared, split)
    found = _HUB.fullmatch(name)
    if not found or place.startswith((".", "/")):
        raise UserError(
            f"{label}: there is no such folder, and it is no name on the hub, which is written hf:owner/name:split or "
            "hf:owner/name/config:split; check the spelling."
        )
    repository, config, split = found["repository"], found["config"], found["split"]
    if arrow := _prepared(repository, config, split, label):
        shared.log(f"{label}: is read from {arrow[0].parent}, where `datasets` has put it.")
        return [open_arrow(_file(name, label, path, shared)) for path in arrow]
    return [open_parquet(_file(name, label, path, shared)) for path in _from_hub(repository, config, split, label, shared)]


def is_saved(folder: str) -> bool:
    """Returns whether a folder is what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` makes."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def open_saved(folder: str, name: str, label: str, shared: Shared, split: str = "") -> list[Part]:
    """Opens a data set that was saved to disk, or a split of one that has several."""
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        splits = _read(Path(folder, "dataset_dict.json"), "splits", label)
        if split not in splits:
            which = f"has no split '{split}' but" if split else "has the splits"
            example = f"{PREFIX}{folder}:{splits[0] if splits else 'train'}"
            raise UserError(f"{label}: {which} {', '.join(map(str, splits))}; name one of them, such as {example}.")
        folder = os.path.join(folder, split)
    elif split:
        own = _state(folder, label).get("_split")
        if split != own:
            raise UserError(f"{label}: is one data set and has no split '{split}'; leave it out.")
    state = _state(folder, label)
    if any(key.startswith("_indices") and value for key, value in state.items()):
        raise UserError(
            f"{label}: was saved with a mapping of its rows, which is not read; load it with `datasets` and save "
            "flatten_indices() of it."
        )
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(each, dict) and "filename" in each for each in files):
        raise UserError(f"{label}: its state.json names no files; save it again.")
    paths = [Path(folder, os.path.basename(str(each["filename"]))) for each in files]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{label}: {path} is missing, which its state.json names; copy it again.")
    return [open_arrow(_file(name, label, path, shared)) for path in paths]


def _file(name: str, label: str, path: Path, shared: Shared) -> File:
    return File(f"{name}/{path.name}", f"{label}/{path.name}", str(path), shared)


def _state(folder: str, label: str) -> dict[str, Any]:
    path = Path(folder, "state.json")
    try:
        state = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{label}: {path} cannot be read ({reason_of(error)}); save the data set again.") from error
    return state if isinstance(state, dict) else {}


def _read(path: Path, key: str, label: str) -> list[str]:
    try:
        found = json.loads(path.read_text("utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{label}: {path} cannot be read ({reason_of(error)}); save the data set again.") from error
    return found if isinstance(found, list) else []


def _prepared(repository: str, config: str | None, split: str, label: str) -> list[Path]:
    """Returns the files that `datasets.load_dataset` has left in its cache, the newest of several versions, or none."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")).expanduser()
    owner, _, short = repository.rpartition("/")
    short = snake_case(short)
    folder = cache / (f"{owner}___{short}" if owner else short)
    configs = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not config and len(configs) > 1 and "default" not in configs:
        raise _several(configs, repository, split, label)
    config = config or ("default" if "default" in configs else configs[0] if configs else "default")
    versions = (folder / config).rglob("dataset_info.json")
    for info in sorted(versions, key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True):
        if info.parent.name.endswith(".incomplete"):
            continue
        whole = info.parent / f"{short}-{split}.arrow"
        if whole.is_file():
            return [whole]
        shards = sorted(info.parent.glob(f"{short}-{split}-[0-9]*-of-[0-9]*.arrow"))
        if shards and len(shards) == int(shards[0].stem.rpartition("-")[2]):
            return shards
    return []


def snake_case(name: str) -> str:
    """Returns the name of a data set as `datasets` writes it in file names.

    >>> snake_case("CodeAlpaca_20K")
    'code_alpaca_20_k'
    """
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z\d])([A-Z])", r"\1_\2", name).lower()


def _from_hub(repository: str, config: str | None, split: str, label: str, shared: Shared) -> list[Path]:
    """Returns the Parquet files of a split, which are fetched unless that was done before.

    What was fetched once stays what the name means, so that a run can go on without a network and with the same rows.
    """
    import huggingface_hub  # here: few runs need it

    names = "--".join((*repository.split("/"), config or "", split))
    listing = shared.cache / "hub" / f"{names}.json"
    try:
        known = json.loads(listing.read_text("utf-8"))
        cached = [
            huggingface_hub.try_to_load_from_cache(repository, file, revision=known["revision"], repo_type="dataset")
            for file in known["files"]
        ]
        if cached and all(isinstance(path, str) for path in cached):
            shared.log(f"{label}: is read from {Path(cached[0]).parent}; remove {listing} to ask the hub again.")
            return [Path(path) for path in cached]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # it was not fetched before, or its listing is of no use and is made again
    try:
        info = huggingface_hub.HfApi().dataset_info(repository, revision=_PARQUET)
        files = _files_of(config, split, [each.rfilename for each in info.siblings], repository, label)
        shared.log(f"{label}: fetching {len(files)} Parquet file(s) from the Hugging Face hub.")
        folder = huggingface_hub.snapshot_download(repository, repo_type="dataset", revision=info.sha, allow_patterns=files)
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(json.dumps({"revision": info.sha, "files": files}), "utf-8")
    except UserError:
        raise
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(
            f"{label}: is neither a folder here nor in the caches, and cannot be had as Parquet from the Hugging Face hub "
            f"({reason_of(error)}); check the name, the network and your access, or download it where there is a network, save "
            "it with save_to_disk and name that folder."
        ) from error
    return [Path(folder, file) for file in files]


def _several(configs: list[str], repository: str, split: str, label: str) -> UserError:
    example = f"{PREFIX}{repository}/{configs[0]}:{split}"
    return UserError(f"{label}: has several configurations, {', '.join(configs)}; name one, such as {example}.")


def _files_of(config: str | None, split: str, files: list[str], repository: str, label: str) -> list[str]:
    """Returns the Parquet files of a split. In the hub's branch they are CONFIG/SPLIT/NUMBER.parquet."""
    found: dict[str, dict[str, list[str]]] = {}
    for file in sorted(files):
        parts = PurePosixPath(file).parts
        if len(parts) == 3 and file.endswith(".parquet"):
            found.setdefault(parts[0], {}).setdefault(parts[1], []).append(file)
    if config is None and len(found) > 1 and "default" not in found:
        raise _several(list(found), repository, split, label)
    config = config or ("default" if "default" in found else next(iter(found), "default"))
    splits = found.get(config, {})
    if f"partial-{split}" in splits:
        raise UserError(
            f"{label}: is so large that the hub has only the first part of it as Parquet; download its own files and name them."
        )
    if split not in splits:
        known = [f"{PREFIX}{repository}/{name}:{each}" for name, inner in found.items() for each in inner]
        raise UserError(f"{label}: there is no such split; the hub has {', '.join(known) or 'no Parquet of this data set'}.")
    return splits[split]
