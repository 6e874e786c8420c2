"""Finding a model's directory, and what of it is carried along."""

import json
import types

import huggingface_hub
import pytest
from huggingface_hub import errors

from sft_jax.errors import UserError
from sft_jax.hf.source import Source, find_model, has_tokenizer, read_source


def source(config: dict, generation: dict | None = None) -> Source:
    return Source("base", json.dumps(config), None if generation is None else json.dumps(generation))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": 0}, None, (0,)),
        ({"eos_token_id": [2, 3]}, None, (2, 3)),
        ({"eos_token_id": 2}, {"eos_token_id": [4, 5]}, (4, 5)),
        ({"eos_token_id": 2}, {"top_p": 0.5}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,)),
        ({"eos_token_id": None}, None, ()),
        ({}, None, ()),
    ],
)
def test_stop_ids(config, generation, expected):
    assert source(config, generation).stop_ids() == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({"torch_dtype": "auto"}, None),
        ({"torch_dtype": None}, None),
        ({}, None),
    ],
)
def test_dtype(config, expected):
    assert source(config).dtype == expected


def test_a_source_is_a_value():
    assert source({"a": 1}) == source({"a": 1}) and hash(source({"a": 1})) == hash(source({"a": 1}))
    assert source({"a": 1}) != source({"a": 2})


def test_read_source(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "name": "naïve"}', encoding="utf-8")
    assert read_source(tmp_path, "x") == Source("x", '{"model_type": "llama", "name": "naïve"}', None)
    (tmp_path / "generation_config.json").write_text('{"top_k": 1}')
    assert read_source(tmp_path, "x").generation_dict() == {"top_k": 1}
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"generation_config.json: is no JSON object"):
        read_source(tmp_path, "x")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_has_tokenizer(name, tmp_path):
    assert not has_tokenizer(tmp_path)
    (tmp_path / name).write_text("")
    assert has_tokenizer(tmp_path)


# ---- the hub


def test_a_hub_id_is_downloaded_without_pickle(tmp_path, monkeypatch):
    def download(name, allow_patterns):
        assert name == "org/model-1.5"
        assert {"*.safetensors", "*.json", "*.jinja", "*.model"} <= set(allow_patterns)
        assert not any(".bin" in pattern or pattern in ("*", "*.py") for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("org/model-1.5") == tmp_path


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
    def fail(name, allow_patterns):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"org/model: .*{message}"):
        find_model("org/model")


@pytest.mark.parametrize("path", ["/no/such/folder", "a/b/c", "gs://bucket/model", "../model", ""])
def test_what_is_neither_a_directory_nor_a_hub_id(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError):
        find_model(path)
