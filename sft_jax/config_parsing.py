"""From what a recipe and flags say to the checked configuration.

An unknown key, a wrong type or two keys that contradict each other raise `UserError` before anything is loaded.
"""

import copy
import dataclasses
import types
import typing
from typing import Any, Literal

import ml_collections

from sft_jax.config import Config, DataConfig, DataSetConfig, data_set_key
from sft_jax.config_checks import check_columns, check_finite, check_supervise
from sft_jax.config_rules import check_rules
from sft_jax.errors import UserError, did_you_mean

_WHOLE_TEXTS = ("eval.stop",)  # keys of lists whose single text may hold commas and white space


def parse_config(raw: ml_collections.ConfigDict | dict[str, Any], needs_data: bool = True, needs_model: bool = True) -> Config:
    """Returns the checked configuration. Raises UserError naming the key that is unknown, mistyped or contradictory.

    Without `needs_data` there may be no training data, for what does not read them; without `needs_model` no model.path.
    """
    if isinstance(raw, ml_collections.ConfigDict):
        raw = raw.to_dict()
    raw = dict(raw)
    data = raw.get("data") or {}
    if not isinstance(data, dict):
        raise UserError(f"data: must be a section of keys, not {_show(data)}.")
    data = dict(data)
    sets = {split: data.pop(split, None) for split in ("train", "eval")}
    config = _build(Config, {**raw, "data": data}, "")
    sets = {split: _data_sets(value, split, config.data) for split, value in sets.items()}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **sets))
    check_rules(config, needs_data, needs_model)
    return config


def overridden(raw: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a configuration, as `parse_config` takes it, with some keys changed: dotted key -> value.

    >>> overridden({"seed": 1, "mesh": {"data": 2}}, {"mesh.fsdp": 4})
    {'seed': 1, 'mesh': {'data': 2, 'fsdp': 4}}
    """
    changed = copy.deepcopy(raw)
    for key, value in overrides.items():
        *sections, name = key.split(".")
        node = changed
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
        node[name] = value
    return changed


def without_inherited(recorded: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration of a run whose data sets leave out what they have as the `data` section has it.

    A run records it with each set, where a change of the section would not be seen.

    >>> without_inherited({"data": {"eval": [{"path": ["a"], "format": "text", "supervise": "all"}], "format": "text", "supervise": "last"}})
    {'data': {'eval': [{'path': ['a'], 'supervise': 'all'}], 'format': 'text', 'supervise': 'last'}}
    """
    data = recorded["data"]

    def own(values: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in values.items() if key not in section or value != section[key]}
        return {key: own(value, section[key]) if key == "columns" and key in section else value for key, value in kept.items()}

    sets = {split: [own(item, data) for item in data[split]] for split in ("train", "eval") if isinstance(data.get(split), list)}
    return {**recorded, "data": {**data, **sets}}


def _build(cls, raw: dict[str, Any], prefix: str):
    if not isinstance(raw, dict):
        raise UserError(f"{prefix.rstrip('.')}: must be a section of keys, not {_show(raw)}.")
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in hints:
            raise UserError(f"Unknown key '{prefix}{key}'; {did_you_mean(str(key), hints)}.")
    values = {}
    for key, value in raw.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            values[key] = _build(kind, value if value is not None else {}, f"{prefix}{key}.")
        elif value is not None:
            values[key] = _convert(kind, value, f"{prefix}{key}")
    return cls(**values)


def _convert(kind, value, key: str):
    """Returns `value` as the declared type, or raises UserError naming the key."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        if value not in typing.get_args(kind):
            known = [choice or "''" for choice in typing.get_args(kind)]
            raise UserError(f"{key}: '{value}' is not a choice; {did_you_mean(str(value), known)}.")
        return value
    if origin in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        fitting = [option for option in options if isinstance(option, type) and isinstance(value, option)]
        return _convert((fitting or options)[0], value, key)
    if origin is tuple:
        item_kind = typing.get_args(kind)[0]
        if isinstance(value, str) and key in _WHOLE_TEXTS:
            value = [value]
        elif isinstance(value, str) and item_kind in (str, int, int | str):
            value = [part.strip() for part in value.split(",") if part.strip()]
            if item_kind != str:  # of a flag, which has no other way to tell a number
                value = [int(part) if part.isdecimal() else part for part in value]
        if item_kind in (int, int | str) and isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{key}: must be a list, not {_show(value)}.")
        return tuple(_convert(item_kind, item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{key}: must be a dict, not {_show(value)}.")
        return dict(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return check_finite(key, value)
    if kind is int and isinstance(value, bool) or not isinstance(value, kind):
        raise UserError(f"{key}: must be {kind.__name__}, not {_show(value)}.")
    return value


def _show(value) -> str:
    return f"{value!r} ({type(value).__name__})"


def _data_sets(value, split: str, data: DataConfig) -> tuple[DataSetConfig, ...]:
    """Reads `data.train` or `data.eval`: a path or glob, a list of them, a list of sets, or a dict name -> set."""
    key = f"data.{split}"
    if value is None or value == "" or value == [] or value == ():
        return ()
    if isinstance(value, str):
        value = [{"path": value}]
    elif isinstance(value, dict) and "path" in value:
        value = [value]
    elif isinstance(value, dict):
        value = [{"name": str(name), **(item if isinstance(item, dict) else {"path": item})} for name, item in value.items()]
    elif isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        value = [{"path": list(value)}]
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{key}: must be a path, a list of paths, a list of data sets or a dict name -> data set, not {_show(value)}.")
    inherited = {"format": data.format, "columns": dataclasses.asdict(data.columns), "supervise": data.supervise, "overlength": data.overlength}
    sets = []
    for index, item in enumerate(value):
        item = {name: part for name, part in item.items() if part is not None}
        name = str(item.get("name") or (split if len(value) == 1 else f"{split}_{index}"))
        label = data_set_key(split, index, name, len(value))
        where = f"{label}."
        if not item.get("path"):
            raise UserError(f"{where}path: is missing; name a file or glob.")
        if isinstance(item["path"], str):
            item["path"] = [item["path"]]
        check_columns(f"{where}columns", item.get("columns") or {})
        if isinstance(item.get("columns"), dict):
            item["columns"] = {**inherited["columns"], **item["columns"]}
        if isinstance(item.get("supervise"), str):
            check_supervise(f"{where}supervise", item["supervise"])
        for only_trained in ("weight", "epochs"):
            if split == "eval" and only_trained in item:
                raise UserError(f"{where}{only_trained}: a held-out set has none, since its loss is over each of its rows once; leave it out.")
        merged = {**inherited, **item, "name": item.get("name") or name}
        sets.append(_build(DataSetConfig, merged, where))
    names = [item.name for item in sets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{key}: two data sets are named '{name}'; names must differ.")
    weighted = [item for item in sets if item.weight is not None]
    for index, item in enumerate(sets):
        label = data_set_key(split, index, item.name, len(sets))
        if weighted and item.epochs is not None:
            raise UserError(
                f"{label}.epochs: cannot stand beside a weight, which is a share of the whole; give every set a weight, or none and "
                "those that come up more or less often than once epochs."
            )
        if item.epochs is not None and not item.epochs > 0:
            raise UserError(f"{label}.epochs: must be above 0, not {item.epochs}; leave the set out to use nothing of it.")
        if item.cap is not None and item.cap < 1:
            raise UserError(f"{label}.cap: must be at least 1, not {item.cap}; leave it out to use every row.")
        if weighted and item.weight is None:
            raise UserError(f"{label}.weight: is missing although other sets have one; give all a weight, or none.")
        if weighted and not item.weight > 0:
            raise UserError(f"{label}.weight: must be above 0, not {item.weight}.")
    return tuple(sets)
