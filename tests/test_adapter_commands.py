"""Training, exporting and talking to an adapter, as a user runs it."""

import json
import re
import subprocess
from pathlib import Path

import commands
import numpy as np
import pytest
from tiny_run import environment, make_base, run_command, tiny_config

import sft_jax


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a base and a run that has trained an adapter on it."""
    folder = tmp_path_factory.mktemp("commands")
    config = tiny_config(
        folder, model__path=str(make_base(folder)), model__init="checkpoint", train__steps=3, train__export=True,
        adapter__name="lora", adapter__rank=4, adapter__targets=["attention", "embed"], adapter__init="default",
    )  # fmt: skip
    result = run_command(config, folder / "run", folder / "xdg")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "The adapter lies in" in result.stdout and not (folder / "run/export").exists()
    return folder


def command(folder: Path, name: str, *arguments) -> subprocess.CompletedProcess:
    return commands.run(name, *arguments, env=environment(1, folder / "xdg"))


def logits(path, **options) -> np.ndarray:
    model, _ = sft_jax.load(path, **options)
    return np.asarray(model(np.arange(24, dtype=np.int32).reshape(2, 12)))


@pytest.mark.slow
def test_the_merged_model_is_the_run(folder):
    result = command(folder, "export", "--model", folder / "run", "--merge")
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "run/export/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    np.testing.assert_allclose(logits(folder / "run/export"), logits(folder / "run"), atol=1e-5)
    assert np.abs(logits(folder / "run") - logits(folder / "base")).max() > 1e-2


def test_the_adapter_is_the_run(folder):
    """Written again from the checkpoint; on a base that has moved, which is named."""
    result = command(folder, "export", "--model", folder / "run", "--adapter", "--out", folder / "again")
    assert result.returncode == 0 and "changes of kernels within" in result.stdout, result.stderr
    np.testing.assert_allclose(logits(folder / "again", base=folder / "base"), logits(folder / "run"), atol=1e-5)
    config = json.loads((folder / "again/adapter_config.json").read_text())
    (folder / "again/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folder / "gone")}))
    result = command(folder, "export", "--model", folder / "again", "--merge", "--base", folder / "base", "--out", folder / "merged")
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(logits(folder / "merged"), logits(folder / "run"), atol=1e-5)


def test_it_answers(folder):
    """The run, and its adapter alone, say the same."""
    answers = [command(folder, "chat", "--model", folder / place, "--prompt", "lamp", "--max_new_tokens", 5) for place in ("run", "run/adapter")]
    assert [answer.returncode for answer in answers] == [0, 0], answers[0].stderr + answers[1].stderr
    assert answers[0].stdout == answers[1].stdout


@pytest.mark.parametrize("arguments, message", [
    (["--model", "run"], "run has an adapter; say --adapter .*, or --merge"),
    (["--model", "base", "--adapter", "--out", "x"], "--adapter: .*base has no adapter; leave --adapter out"),
    (["--model", "base", "--merge", "--out", "x"], "--merge: .*base has no adapter"),
    (["--model", "run", "--adapter", "--merge"], "--adapter: is written as it was trained, without --merge"),
    (["--model", "run", "--adapter", "--dtype", "bfloat16"], "without --dtype"),
    (["--model", "run/adapter", "--merge", "--base", "nowhere", "--out", "x"], "nowhere: .*(no such directory|cannot be reached)"),
])  # fmt: skip
def test_wrong_use_is_one_message(folder, arguments, message):
    places = [str(folder / argument) if argument in ("run", "base", "x", "run/adapter") else argument for argument in arguments]
    result = command(folder, "export", *places)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: "), result.stdout + result.stderr
    assert re.search(message, result.stderr.replace("\n", " ")) and "Traceback" not in result.stderr
