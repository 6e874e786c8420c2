"""Finding a model's directory, and what of it is carried along."""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import pytest
from tiny_models import ALL_CONFIGS

from sft_jax.errors import UserError
from sft_jax.hf.source import Provenance, Source, find_model, has_tokenizer, read_source
from sft_jax.model.families import spec_from_config


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


@pytest.mark.parametrize("stops", ["2", [None], [2, "3"], -1, True, 2.0, [[2]], {}])
def test_stop_ids_that_are_none(stops, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    with pytest.raises(UserError, match="x: eos_token_id of generation_config.json"):
        read_source(tmp_path, "x")


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


def test_where_an_export_came_from(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert read_source(tmp_path, "x").provenance is None
    for text in ('{"steps": 5}', '{"base_model": "b", "steps": "5"}', '{"base_model": "b", "data_fingerprint": 1}'):
        (tmp_path / "sft_jax.json").write_text(text)
        with pytest.raises(UserError, match="sft_jax.json: does not name base_model"):
            read_source(tmp_path, "x")
    (tmp_path / "sft_jax.json").write_text('{"base_model": "b", "data_fingerprint": null, "steps": 5}')
    assert read_source(tmp_path, "x").provenance == Provenance("b", None, 5)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def denied(_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(UserError, match="config.json: cannot be read: Permission denied"):
        read_source(tmp_path, "x")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_has_tokenizer(name, tmp_path):
    assert not has_tokenizer(tmp_path)
    (tmp_path / name).write_text("")
    assert has_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gemma3_multimodal"])
def test_another_number_of_tokens(name):
    """Where config.json names it, of a model that is more than its language model too; all else stays, as does the text."""
    source = Source("x", json.dumps(ALL_CONFIGS[name]), None)
    larger = source.with_vocab_size(131)
    assert spec_from_config(larger.config_dict()) == dataclasses.replace(spec_from_config(source.config_dict()), vocab_size=131)
    assert larger.with_vocab_size(96).config_dict() == source.config_dict()
    assert source.with_vocab_size(96) is source


IMPOSSIBLE = ["", "x" * 300, "a\0b", "~nobody-here/x", "\ud800"]


@pytest.mark.parametrize("path", ["/no/such/folder", "a/b/c", "gs://bucket/model", "../model", *IMPOSSIBLE])
def test_what_is_neither_a_directory_nor_a_hub_id(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError):
        find_model(path)
