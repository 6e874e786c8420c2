"""What is fetched from the hub, against a repository in memory."""

import fnmatch
import json
import types

import huggingface_hub
import pytest
from huggingface_hub import errors

from sft_jax.config_parsing import parse_config
from sft_jax.errors import UserError
from sft_jax.hf.source import find_model, is_adapter, place_of, tokenizer_folder
from sft_jax.training.resolved import data_model

COMMIT = "0123abc"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", SHARDS))})}
TEXTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
OTHERS = [
    "consolidated.safetensors", "onnx/model.safetensors", "onnx/config.json", "original/params.json", "model.gguf",
    "pytorch_model.bin", "modeling_custom.py", "README.md", "adapter.safetensors",
]  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Returns a function that puts files into the repository; `hub.fetched` are those that were downloaded."""
    files, folder = {}, tmp_path / "snapshots" / COMMIT
    folder.mkdir(parents=True)

    def snapshot_download(name, revision=None, allow_patterns=None, ignore_patterns=None):
        assert name == "org/model-1.5" and revision in (None, COMMIT)
        assert allow_patterns is not None  # otherwise everything
        for file, text in files.items():
            allowed = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
            if allowed and not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns or ()):
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_text(text)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: sorted(files))
    fetched = lambda: {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}  # noqa: E731
    return types.SimpleNamespace(files=files, folder=folder, fetched=fetched)


@pytest.mark.parametrize("weights", [["model.safetensors"], SHARDS, ["model.safetensors", *SHARDS]])
def test_one_copy_of_the_weights_is_fetched(hub, weights):
    index = INDEX if SHARDS[0] in weights else {}
    hub.files.update(dict.fromkeys([*TEXTS, *OTHERS, *weights], "{}"), **index)
    assert find_model("org/model-1.5") == hub.folder
    needed = weights if "model.safetensors" not in weights else ["model.safetensors"]
    assert hub.fetched() == {*TEXTS, *needed, *index}


def test_data_are_prepared_without_the_weights(hub):
    config = json.dumps({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"})
    hub.files.update(dict.fromkeys([*TEXTS, *OTHERS, "model.safetensors"], "{}"))
    hub.files.pop("config.json")
    found = data_model(parse_config({"model": {"path": "org/model-1.5"}, "data": {"train": "x.jsonl"}}), print)
    assert (found.tokenizer, found.vocab_size) == (str(hub.folder), None)
    hub.files["config.json"] = config
    lines = []  # it is read, and says too little of a model that could be trained
    found = data_model(parse_config({"model": {"path": "org/model-1.5"}, "data": {"train": "x.jsonl"}}), lines.append)
    assert (found.tokenizer, found.vocab_size) == (str(hub.folder), None)
    assert "config.json" in lines[0] and "train will refuse the model" in lines[0]
    assert hub.fetched() == set(TEXTS)


def test_an_index_cannot_ask_for_everything(hub):
    index = json.dumps({"weight_map": {"a": "*", "b": "*.safetensors", "c": 3, "d": "pytorch_model.bin"}})
    hub.files.update(dict.fromkeys([*TEXTS, *OTHERS], "{}"), **{"model.safetensors.index.json": index})
    find_model("org/model-1.5")
    assert hub.fetched() == {*TEXTS, "model.safetensors.index.json"}


def test_a_repository_with_pickle_only(hub):
    hub.files.update(dict.fromkeys([*TEXTS, "pytorch_model.bin", "README.md"], "{}"))
    with pytest.raises(UserError, match=r"org/model-1.5: holds its weights as pickle \(pytorch_model.bin\).*Convert it"):
        find_model("org/model-1.5")


RESPONSE = types.SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("no", response=RESPONSE), "access is gated; accept its licence"),
        (
            errors.RepositoryNotFoundError("no", response=RESPONSE),
            "neither a directory here nor a model on the Hugging",
        ),
        (errors.HfHubHTTPError("too many requests\nmore", response=RESPONSE), r"cannot be reached \(too many requests"),
        (errors.LocalEntryNotFoundError("not cached"), r"cannot be reached \(not cached\); download it where"),
        (errors.HFValidationError("bad"), "neither a directory here nor"),
        (ConnectionError("no route"), r"cannot be reached \(no route\)"),
    ],
)
def test_what_the_hub_may_answer(error, message, monkeypatch):
    def fail(name, **_):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"org/model: .*{message}"):
        find_model("org/model")


def test_of_an_adapter_its_one_file_is_fetched(hub, tmp_path):
    """And its base is where it says."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    adapter = {"adapter_config.json": json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(base)})}
    hub.files.update({"adapter_model.safetensors": "{}", "adapter_model.bin": "{}", "tokenizer.json": "{}", "checkpoint-3/x.json": "{}"}, **adapter)
    assert find_model("org/model-1.5") == base and place_of("org/model-1.5") == hub.folder
    assert hub.fetched() == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert is_adapter(hub.folder) and tokenizer_folder("org/model-1.5") == hub.folder
