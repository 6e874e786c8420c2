"""What may change on resume, and what must not."""

import dataclasses

import pytest

from sft_jax.config import ColumnsConfig
from sft_jax.errors import UserError
from sft_jax.training.resume import check_changes

BEFORE = {
    "seed": 0,
    "mesh": {"fsdp": 8},
    "data": {"max_length": 512, "chat_template_kwargs": {"a": 1}},
    "optim": {"learning_rate": 1e-5, "name": "adamw"},
    "train": {"steps": 0, "epochs": 1.0, "batch_size": 8},
}


def changed(section, key, value):
    now = {name: dict(part) if isinstance(part, dict) else part for name, part in BEFORE.items()}
    now[section][key] = value
    return now


def test_free_keys_change_and_are_told():
    assert check_changes(BEFORE, BEFORE, ()) == []
    assert check_changes(BEFORE, changed("mesh", "fsdp", 4), ()) == ["mesh.fsdp: 8 -> 4"]


@pytest.mark.parametrize("section, key, value", [("data", "max_length", 256), ("optim", "name", "adafactor"), ("data", "chat_template_kwargs", {"a": 2})])
def test_keys_that_never_change(section, key, value):
    with pytest.raises(UserError, match=rf"{section}.{key}.*set it back, or start another run"):
        check_changes(BEFORE, changed(section, key, value), (f"{section}.{key}",))


def test_a_run_that_is_older_than_a_key():
    """It had what is now the default, without a word; another value is a change like any other."""
    now = {**BEFORE, "adapter": {"dropout": 0.0, "base_dtype": ""}}
    assert check_changes(BEFORE, now, ()) == []
    now["adapter"]["dropout"] = 0.5
    with pytest.raises(UserError, match="adapter.dropout: was 0.0 so far and is 0.5 now"):
        check_changes(BEFORE, now, ())


def test_a_run_that_is_older_than_a_key_of_data_sets():
    older, now = ({"data": {"train": [{"path": ["x"], "name": "a", **more}]}} for more in ({}, {"weight": None, "epochs": None, "cap": None}))
    assert check_changes(older, now, ()) == []
    now["data"]["train"][0]["cap"] = 5
    with pytest.raises(UserError, match="data.train: .*cannot change"):
        check_changes(older, now, ())


def test_a_run_that_is_older_than_a_key_of_columns():
    older, now = ({"data": {"train": [{"path": ["x"], "name": "a", "columns": columns}]}} for columns in ({"prompt": "q"}, {"prompt": "q", "tools": "", "roles": {}}))
    now["data"]["train"][0]["columns"] = dataclasses.asdict(ColumnsConfig(prompt="q"))
    now["data"]["train"][0] |= {"weight": None, "epochs": None, "cap": None}
    assert check_changes(older, now, ()) == []
    now["data"]["train"][0]["columns"]["tools"] = "functions"
    with pytest.raises(UserError, match="data.train: .*cannot change"):
        check_changes(older, now, ())


def test_a_model_may_be_named_in_another_way_and_moved_only_knowingly(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    before, same, moved = ({"model": {"path": path}} for path in ("model", str(tmp_path / "model"), "elsewhere"))
    assert check_changes(before, same, ()) == check_changes(same, before, ()) == []
    with pytest.raises(UserError, match="allow_changes=model.path"):
        check_changes(before, moved, ())
    assert check_changes(before, moved, ("model.path",)) == ["model.path: 'model' -> 'elsewhere'"]


def test_overrides_are_explicit():
    now = changed("optim", "learning_rate", 2e-5)
    with pytest.raises(UserError, match="allow_changes=optim.learning_rate"):
        check_changes(BEFORE, now, ())
    assert check_changes(BEFORE, now, ("optim.learning_rate",)) == ["optim.learning_rate: 1e-05 -> 2e-05"]


def test_a_run_may_become_longer_but_not_shorter_by_itself():
    assert check_changes(BEFORE, changed("train", "epochs", 3.0), ()) == ["train.epochs: 1.0 -> 3.0"]
    with pytest.raises(UserError, match="train.epochs"):
        check_changes(BEFORE, changed("train", "epochs", 0.5), ())
    with pytest.raises(UserError, match="train.steps"):  # steps in place of epochs: longer or shorter is unknown
        check_changes(BEFORE, changed("train", "steps", 10), ())
