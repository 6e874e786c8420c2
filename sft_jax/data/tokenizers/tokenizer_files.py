"""The files of a tokenizer directory: read into memory, written back with the run's chat template."""

import json
import os
from pathlib import Path

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

# The model's config.json is not among them: it belongs to the model.
NAMES = (
    "tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "merges.txt", TEMPLATE, "chat_template.json",
)  # fmt: skip
TEMPLATE_FOLDER = "additional_chat_templates"


def read_files(folder: Path) -> dict[str, bytes]:
    """Returns the tokenizer's files of `folder`, name -> bytes."""
    files = {name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()}
    for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        files[f"{TEMPLATE_FOLDER}/{path.name}"] = path.read_bytes()
    return files


def write_files(files: dict[str, bytes], chat_template: str | None, changed: bool, folder: str | os.PathLike) -> None:
    """Writes `files` to `folder`; where the template was `changed`, it replaces every template among them.

    The template goes into `chat_template.jinja`, which newer servers read, and into the config for older ones.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(files)
    if changed:
        files = {name: data for name, data in files.items() if not name.startswith((TEMPLATE_FOLDER, "chat_template"))}
        config = json.loads(files.get(CONFIG, b"{}"))
        config.pop("chat_template", None)
        if chat_template is not None:
            config["chat_template"] = chat_template
            files[TEMPLATE] = chat_template.encode()
        files[CONFIG] = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
