"""The configuration is strict: unknown keys, wrong types and contradictions name the key and the nearest valid one."""

import dataclasses
import typing

import ml_collections
import pytest

from sft_jax import config as config_lib
from sft_jax.config import Config, EvalConfig, default_config, is_key, to_dict
from sft_jax.config_parsing import parse_config
from sft_jax.data.formats.registry import FORMATS
from sft_jax.errors import UserError
from sft_jax.training.resume import flat_keys, rule_for


def minimal(**changes) -> dict:
    raw = default_config().to_dict()
    raw["model"]["path"] = "model"
    raw["data"]["train"] = "train.jsonl"
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        node = raw
        for part in filter(None, section.split("__")):
            node = node[part]
        node[name] = value
    return raw


def test_defaults_survive_the_round_trip():
    config = parse_config(minimal())
    assert parse_config(to_dict(config)) == config
    assert config.train == config_lib.TrainConfig() and config.data.train[0].path == ("train.jsonl",)


def test_every_field_can_be_overridden():
    """Each leaf of the dataclass tree is a leaf of the ConfigDict, of a kind that a flag can set."""

    def leaves(node, prefix=""):
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                yield from leaves(value, f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}"

    raw = default_config()
    for key in leaves(Config()):
        assert is_key(key)
        node = raw
        for part in key.split("."):
            assert part in node, key
            node = node[part] if isinstance(node[part], ml_collections.ConfigDict) else None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model__pth": "x"}, ["'model.pth'", "'path'"]),
        ({"trian": {}}, ["'trian'", "'train'"]),
        ({"optim__learning_rat": 1.0}, ["'optim.learning_rat'", "'learning_rate'"]),
        ({"model__dtype": "fp32"}, ["model.dtype", "'float32'"]),
        ({"train__batch_size": 8.5}, ["train.batch_size", "int"]),
        ({"train__batch_size": True}, ["train.batch_size", "int"]),
        ({"train__epochs": "two"}, ["train.epochs", "float"]),
        ({"data__packing": 1}, ["data.packing", "bool"]),
        ({"optim": 3}, ["optim", "section"]),
        ({"train__micro_batch_size": 3}, ["train.micro_batch_size", "train.batch_size", "try 2"]),
        ({"train__batch_size": 0}, ["train.batch_size"]),
        ({"eval__every": 5}, ["eval.every", "data.eval"]),
        ({"eval__max_new_tokens": 5}, ["eval.max_new_tokens", "data.eval"]),
        ({"eval__at": [3]}, ["eval.at", "data.eval"]),
        ({"eval__slices": ["topic"]}, ["eval.slices", "data.eval"]),
        ({"data__eval": "e", "eval__at": [0]}, ["eval.at: must be steps from 1 on, not 0"]),
        ({"data__eval": "e", "eval__at": "3,x"}, ["eval.at[1]: must be int"]),
        ({"data__eval": "e", "eval__at": [2.5]}, ["eval.at[0]: must be int"]),
        ({"data__eval": "e", "eval__slices": [""]}, ["eval.slices: must be a list of texts that are not empty"]),
        ({"data__eval": "e", "eval__generate": 1, "eval__stop": ["a", ""]}, ["eval.stop: must be a list of texts that are not empty"]),
        ({"data__eval": "e", "eval__stop": ["a"]}, ["eval.stop: changes nothing since eval.generate=0"]),
        ({"data__eval": "e", "eval__sampling": {"seed": 1}}, ["eval.sampling: changes nothing since eval.generate=0"]),
        ({"eval__sampling": {"temperatur": 1.0}}, ["'eval.sampling.temperatur'", "'temperature'"]),
        ({"eval__sampling": {"temperature": -1.0}}, ["eval.sampling.temperature: must be 0 (greedy)"]),
        ({"eval__sampling": {"temperature": float("inf")}}, ["eval.sampling.temperature: must be a finite number"]),
        ({"eval__sampling": {"top_k": -1}}, ["eval.sampling.top_k: must be 0"]),
        ({"eval__sampling": {"top_p": 0.0}}, ["eval.sampling.top_p: must be above 0"]),
        ({"eval__sampling": {"min_p": 1.1}}, ["eval.sampling.min_p: must be 0"]),
        ({"eval__sampling": {"repetition_penalty": 0.0}}, ["eval.sampling.repetition_penalty: must be a number above 0"]),
        ({"eval__sampling": {"seed": 0.5}}, ["eval.sampling.seed: must be int"]),
        ({"eval__batch_size": 8}, ["eval.batch_size", "data.eval"]),
        ({"data__packing": False, "data__max_segments": 7}, ["data.max_segments", "data.packing"]),
        ({"mesh__data": -1}, ["mesh.data", "mesh.fsdp"]),
        ({"mesh__data": 0}, ["mesh.data"]),
        ({"model__path": ""}, ["model.path"]),
        ({"data__train": None}, ["data.train"]),
        ({"data__train": [{"path": "a", "weight": 1.0}, {"path": "b"}]}, ["data.train[1].weight"]),
        (
            {"data__train": {"a": {"path": "x", "weight": 1.0}, "b": {"path": "y", "weight": 1.0, "epochs": 2}}},
            [
                "data.train.b.epochs: cannot stand beside a weight, which is a share of the whole; give every set a weight, or none and "
                "those that come up more or less often than once epochs."
            ],
        ),
        (
            {"data__train": {"a": {"path": "x", "weight": 1.0}, "b": {"path": "y", "epochs": 2}}},
            ["data.train.b.epochs: cannot stand beside a weight"],
        ),
        (
            {"data__train": {"a": {"path": "x", "epochs": 0}}},
            ["data.train.a.epochs: must be above 0, not 0.0; leave the set out to use nothing of it."],
        ),
        ({"data__train": {"a": {"path": "x", "epochs": -1.5}}}, ["data.train.a.epochs: must be above 0, not -1.5"]),
        ({"data__train": {"a": {"path": "x", "epochs": float("inf")}}}, ["data.train.a.epochs", "finite"]),
        ({"data__train": {"a": {"path": "x", "cap": 0}}}, ["data.train.a.cap: must be at least 1, not 0; leave it out to use every row."]),
        ({"data__eval": {"a": {"path": "x", "cap": -3}}}, ["data.eval.a.cap: must be at least 1, not -3"]),
        ({"data__train": {"a": {"path": "x", "cap": 1.5}}}, ["data.train.a.cap", "int"]),
        (
            {"data__eval": {"a": {"path": "x", "epochs": 2}}},
            ["data.eval.a.epochs: a held-out set has none, since its loss is over each of its rows once; leave it out."],
        ),
        ({"data__train": {"a": {"path": "x", "epochs": 2}}, "data__weight_by": "supervised_tokens"}, ["data.weight_by", "weight"]),
        ({"data__train": {"a": {"path": "x", "fromat": "text"}}}, ["data.train.a.fromat", "'format'"]),
        ({"data__train": {"a": {"format": "text"}}}, ["data.train.a.path"]),
        ({"data__train": 7}, ["data.train"]),
        ({"data__train": [{"path": "a", "name": "s"}, {"path": "b", "name": "s"}]}, ["'s'"]),
        ({"optim__groups": [{"pattern": "x", "lr": 1}]}, ["optim.groups[0]", "'lr'"]),
        ({"optim__groups": [{"freeze": True}]}, ["optim.groups[0].pattern"]),
        ({"checkpoint__allow_changes": ["optim.lr"]}, ["optim.lr"]),
        ({"data__overlength": "cut"}, ["data.overlength", "drop"]),
        ({"data__format": "alpacca"}, ["data.format", "'alpaca'"]),
        ({"data__train": {"a": {"path": "x", "format": "textt"}}}, ["data.train.a.format", "'text'"]),
        ({"data__train": [{"path": "x", "format": "textt"}]}, ["data.train.format", "'text'"]),
        ({"data__supervise": "asistant"}, ["data.supervise", "'assistant'"]),
        ({"data__supervise": "assistant,"}, ["data.supervise", "unknown role ''"]),
        ({"data__eval": {"a": "x", "b": {"path": "x", "supervise": "usr"}}}, ["data.eval.b.supervise", "'user'"]),
        ({"data__eval": {"a": {"path": "x", "weight": 2.0}}}, ["data.eval.a.weight", "held-out"]),
        ({"data__train": {"a": {"path": "x", "weight": float("inf")}}}, ["data.train.a.weight", "finite"]),
        ({"data__train": {"a": {"path": "x", "weight": 10**400}}}, ["data.train.a.weight", "finite"]),
        ({"data__weight_by": "supervised_tokens"}, ["data.weight_by", "weight"]),
        ({"data__cache_dir": "gs://bucket/cache"}, ["data.cache_dir: 'gs://bucket/cache'", "local disk"]),
        ({"data__chat_template_kwargs": {"messages": []}}, ["data.chat_template_kwargs", "'messages'"]),
        ({"data__chat_template_kwargs": {"add_generation_prompt": True}}, ["data.chat_template_kwargs", "'add_generation_prompt'"]),
        ({"data__chat_template_kwargs": {"d": {1, 2}}}, ["data.chat_template_kwargs.d", "set"]),
        ({"data__chat_template_kwargs": {"d": [0, {1: "a"}]}}, ["data.chat_template_kwargs.d[1]", "1 is a int"]),
        ({"data__chat_template_kwargs": {"d": float("nan")}}, ["data.chat_template_kwargs.d", "finite"]),
        ({"adapter__rank": 8}, ["adapter.rank", "adapter.name=none"]),
        ({"adapter__name": "lorra"}, ["adapter.name", "'lora'"]),
        ({"adapter__name": "lora", "adapter__rank": 0}, ["adapter.rank", "at least 1"]),
        ({"adapter__name": "lora", "adapter__alpha": 0.0}, ["adapter.alpha", "above 0"]),
        ({"adapter__name": "lora", "adapter__dropout": 1.0}, ["adapter.dropout", "1.0"]),
        ({"adapter__name": "lora", "adapter__lora_plus": 0.0}, ["adapter.lora_plus", "above 0"]),
        ({"adapter__name": "lora", "adapter__path": "x", "adapter__rank": 8}, ["adapter.rank", "adapter.path"]),
        ({"adapter__base_dtype": "nf4"}, ["adapter.base_dtype", "adapter.name to lora"]),
        ({"adapter__name": "lora", "adapter__base_dtype": "nf5"}, ["adapter.base_dtype", "'nf4'"]),
        ({"train__qat": "int3"}, ["train.qat", "Known: '', int4, int8"]),
        ({"train__qat": "int4", "adapter__name": "dora"}, ["train.qat", "adapter.name=dora", "adapter.base_dtype"]),
        ({"adapter__name": "lora", "adapter__tokens": True}, ["adapter.tokens", "must be a list, not True"]),
        ({"adapter__name": "lora", "adapter__tokens": [1.5]}, ["adapter.tokens[0]", "1.5"]),
        ({"data__add_tokens": ["<a>", ""]}, ["data.add_tokens[1]", "''", "empty"]),
        ({"data__add_tokens": ["<a>\n"]}, ["data.add_tokens[0]", "white space"]),
        ({"data__add_tokens": "<a>, <b>,<a>"}, ["data.add_tokens", "'<a>' is named twice"]),
        ({"data__date": "26.7.2024"}, ["data.date", "'26.7.2024' is no date; write it as 2026-01-31"]),
        ({"data__date": "20240726"}, ["data.date", "is no date"]),
        ({"data__add_tokens": [3]}, ["data.add_tokens[0]", "str"]),
        ({"data__add_tokens": ["<\ud83d>"]}, ["data.add_tokens[0]", "surrogate"]),
        ({"loss__z_loss": -1e-4}, ["loss.z_loss", "-0.0001"]),
        ({"loss__label_smoothing": 1.0}, ["loss.label_smoothing", "1.0"]),
        ({"loss__label_smooth": 0.1}, ["loss.label_smooth", "'label_smoothing'"]),
        ({"train__neftune": -5.0}, ["train.neftune", "-5.0"]),
        ({"optim__ema": 1.0}, ["optim.ema", "1.0"]),
        ({"optim__momentum": 1.0}, ["optim.momentum", "1.0"]),
        ({"optim__eps": 0.0}, ["optim.eps", "0.0"]),
        ({"optim__decay": 0.0}, ["optim.decay", "0.0"]),
        ({"optim__power": -1.0}, ["optim.power", "-1.0"]),
        ({"optim__b2": "high"}, ["optim.b2", "float"]),
        ({"optim__b2": float("nan")}, ["optim.b2", "finite"]),
        ({"train__epochs": float("inf")}, ["train.epochs", "finite"]),
        ({"optim__learning_rate": float("nan")}, ["optim.learning_rate", "finite"]),
        ({"optim__groups": [{"pattern": "x", "learning_rate": float("inf")}]}, ["optim.groups[0].learning_rate", "finite"]),
    ],
)
def test_wrong_input_names_the_key(changes, words):
    with pytest.raises(UserError) as error:
        parse_config(minimal(**changes))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_data_sets_inherit_and_override():
    raw = minimal(data__overlength="drop", data__columns={"prompt": "question"})
    raw["data"]["train"] = {"a": "a.jsonl", "b": {"path": ["b1.jsonl", "b2.jsonl"], "overlength": "error", "columns": {"completion": "answer"}}}
    first, second = parse_config(raw).data.train
    assert (first.name, first.path, first.overlength, first.columns.prompt) == ("a", ("a.jsonl",), "drop", "question")
    assert (second.overlength, second.columns.prompt, second.columns.completion) == ("error", "question", "answer")
    assert second.path == ("b1.jsonl", "b2.jsonl")


def test_tokens_are_ids_or_texts():
    values = ("<a>, <b>", [5, "<c>"], 5, "5,<b>", ["5"])  # as flags and in Python
    tokens = [parse_config(minimal(adapter__name="lora", adapter__tokens=value)).adapter.tokens for value in values]
    assert tokens == [("<a>", "<b>"), (5, "<c>"), (5,), (5, "<b>"), ("5",)]


def test_whole_numbers_are_floats_where_floats_are_wanted():
    assert parse_config(minimal(train__epochs=3)).train.epochs == 3.0


def test_every_key_has_a_rule_for_resume():
    for key in flat_keys(to_dict(parse_config(minimal()))):
        assert rule_for(key) in ("free", "longer", "override", "never")


def test_no_float_may_be_infinite():
    """Whatever key it is, also one that is added later."""
    for key in config_lib.leaf_keys():
        section, _, name = key.rpartition(".")
        kind = Config
        for part in filter(None, section.split(".")):
            kind = typing.get_type_hints(kind)[part]
        if typing.get_type_hints(kind)[name] is float:
            with pytest.raises(UserError, match=rf"{key}: must be a finite number"):
                parse_config(minimal(**{key.replace(".", "__"): float("inf")}))


def test_the_formats_that_can_be_named_are_those_that_there_are():
    assert set(typing.get_args(config_lib.FormatName)) == {"auto", *FORMATS}


def test_the_key_of_a_data_set_is_where_the_user_finds_it():
    def keys(value):
        sets = parse_config(minimal(data__train=value)).data.train
        return [config_lib.data_set_key("train", index, item.name, len(sets)) for index, item in enumerate(sets)]

    assert keys("x") == keys([{"path": "x"}]) == keys(["x", "y"]) == ["data.train"]
    assert keys({"gsm8k": "x", "b": "y"}) == ["data.train.gsm8k", "data.train.b"]
    assert keys([{"path": "x"}, {"path": "y", "name": "b"}]) == ["data.train[0]", "data.train.b"]
    assert keys(to_dict(parse_config(minimal()))["data"]["train"]) == ["data.train"]


def test_types_are_ones_that_the_converter_knows():
    """A new field of a kind that `_convert` would pass through unchecked fails here."""

    def visit(cls):
        for kind in typing.get_type_hints(cls).values():
            if dataclasses.is_dataclass(kind):
                visit(kind)
            else:
                origin = typing.get_origin(kind) or kind
                assert origin in (int, float, str, bool, tuple, dict, typing.Literal) or type(None) in typing.get_args(kind), kind

    visit(Config)


def test_lists_of_evaluation_are_read_from_flags_as_they_stand():
    """Steps from a number or a list of them; a text that ends answers is one, with its commas and line breaks."""
    raw = {"model": {"path": "m"}, "data": {"train": "t", "eval": "e"}}
    for at, stop, expected in (("3, 5", ",\n", ((3, 5), (",\n",))), (7, ["a", " b"], ((7,), ("a", " b"))), ([1, 2], (), ((1, 2), ()))):
        found = parse_config({**raw, "eval": {"generate": 1, "at": at, "stop": stop}}).eval
        assert (found.at, found.stop) == expected
        assert parse_config(to_dict(parse_config({**raw, "eval": {"generate": 1, "at": at, "stop": stop}}))).eval == found


@pytest.mark.parametrize(("every", "at", "due"), [(0, (), []), (3, (), [3, 6]), (0, (4, 5), [4, 5]), (3, (4, 6), [3, 4, 6])])
def test_steps_that_are_evaluated(every, at, due):
    assert [step for step in range(1, 8) if EvalConfig(every, at).due(step)] == due
