"""Bad input as a user meets it: the command ends with exit code 2 and one message that names what is wrong and the remedy.

Each case changes one thing of a tiny run that works. The parts have finer tests of their own; these show that no error
becomes a traceback, or a run that ends as a success, on its way through the command.
"""

import fcntl
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import commands
import numpy as np
import pytest
import safetensors.numpy
from slow_values import slow
from tiny_run import ROOT, environment, make_model, make_rows, run_command, tiny_config, train_command, train_flags

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad_input")
    make_model(folder / "model")
    make_rows(folder / "train.jsonl")
    return folder


@pytest.fixture
def case(folder, tmp_path) -> Path:
    """A folder of its own for a case, with rows and a model that it may damage."""
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copy(folder / "train.jsonl", tmp_path)
    return tmp_path


def change_row(case: Path, line: int, content: bytes) -> None:
    lines = (case / "train.jsonl").read_bytes().splitlines()
    lines[line - 1] = content
    (case / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def chat(*turns: tuple[str, str], **fields) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": text, **fields} for role, text in turns]}).encode()


def template(case: Path, text: str) -> dict:
    (case / "template.jinja").write_text(text)
    return {"data__chat_template": str(case / "template.jinja")}


def real_weights(case: Path) -> Path:
    """Gives the case the model of the quickstart, which has weights."""
    shutil.copytree(ROOT / "models/nano", case / "model", dirs_exist_ok=True)
    return case / "model"


def truncated(case: Path) -> dict:
    weights = real_weights(case) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    return {"model__init": "checkpoint"}


def wrong_shape(case: Path) -> dict:
    config = real_weights(case) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 96}))
    return {"model__init": "checkpoint"}


def pickle_weights(case: Path) -> dict:
    (real_weights(case) / WEIGHTS).rename(case / "model/pytorch_model.bin")
    return {"model__init": "checkpoint"}


def index_outside(case: Path) -> dict:
    model = real_weights(case)
    (model / WEIGHTS).rename(case / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return {"model__init": "checkpoint"}


def with_config(case: Path, **changes) -> dict:
    """Changes config.json of the model; None takes a field out."""
    path = case / "model/config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return {}


def with_tensors(case: Path, change: Callable[[dict], None]) -> dict:
    """Writes the weights again after `change` of their dict of arrays."""
    path = real_weights(case) / WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    return {"model__init": "checkpoint"}


def missing_shard(case: Path) -> dict:
    model = real_weights(case)
    names = list(safetensors.numpy.load_file(model / WEIGHTS))
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + (name == names[0])}-of-00002.safetensors" for name in names}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return {"model__init": "checkpoint"}


def remote_code(case: Path) -> dict:
    config = case / "model/config.json"
    auto_map = {"architectures": ["NovelForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling.NovelForCausalLM"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | auto_map))
    (case / "model/modeling.py").write_text(f"open({str(case / 'executed')!r}, 'w')")
    return {}


def masked(case: Path) -> dict:
    rows = [chat(("user", "a"), ("assistant", "b"), weight=0)] * 5
    (case / "train.jsonl").write_bytes(b"\n".join(rows))
    return {}


def adapter(case: Path, inputs: int, tied: bool = False, **changes) -> dict:
    """An adapter of PEFT on the queries of a model of two layers that has so many inputs, to go on with."""
    place = case / "adapter"
    place.mkdir()
    names = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    tensors = {f"{name}.lora_{side}.weight": np.ones(shape, np.float32) for name in names for side, shape in (("A", (2, inputs)), ("B", (32, 2)))}
    if tied:
        tensors |= {"base_model.model.lm_head.lora_A.weight": np.ones((2, 32), np.float32), "base_model.model.lm_head.lora_B.weight": np.ones((1024, 2), np.float32)}
    safetensors.numpy.save_file(tensors, place / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "some/base"}
    (place / "adapter_config.json").write_text(json.dumps(values | changes))
    return {"adapter__name": "lora", "adapter__path": str(place)}


def with_adapter(**changes) -> Callable[[Path], dict]:
    return lambda case: {"adapter__name": "lora", **{f"adapter__{key}": value for key, value in changes.items()}}


CHANGES: dict[str, tuple[Callable[[Path], dict | None], str]] = {
    "malformed line": (lambda case: change_row(case, 3, b'{"messages": ['), "train.jsonl:3: "),
    "invalid UTF-8": (lambda case: change_row(case, 4, b'{"messages": "\xff"}'), "train.jsonl:4: is not UTF-8"),
    "empty file": (lambda case: (case / "train.jsonl").write_bytes(b"") and None, "train.jsonl: is empty"),
    "missing field": (lambda case: change_row(case, 50, b'{"message": []}'), "train.jsonl:50: "),
    "unknown role": (lambda case: change_row(case, 5, chat(("user", "a"), ("asistant", "b"))), "train.jsonl:5: "),
    "no assistant turn": (lambda case: change_row(case, 6, chat(("user", "a"))), "train.jsonl:6: "),
    "no supervised token": (lambda case: change_row(case, 7, chat(("user", "a"), ("assistant", "b"), weight=0)), "train.jsonl:7: "),
    "no supervised token at all": (masked, "train.jsonl:1: "),
    "no such file": (lambda case: {"data__train": str(case / "trian.jsonl")}, "trian.jsonl: there is no such file"),
    "template syntax": (lambda case: template(case, "{% for %}"), "template.jinja"),
    "template error": (
        lambda case: template(case, "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}{{ raise_exception('only poems') }}"),
        "only poems",
    ),
    "template that loops for ever": (
        lambda case: template(case, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}") | {"data__row_timeout": 1.0},
        "data.row_timeout",
    ),
    "template that eats memory": (
        lambda case: template(case, "{% set s = namespace(x='ab') %}{% for a in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}{{ s.x }}") | {"data__row_memory_mb": 256},
        "data.row_memory_mb",
    ),
    "missing weights": (lambda case: {"model__init": "checkpoint"}, "safetensors"),
    "truncated weights": (truncated, WEIGHTS),
    "wrong tensor shape": (wrong_shape, "mlp"),
    "pickle": (pickle_weights, "pytorch_model.bin"),
    "path outside the model directory": (index_outside, "../outside.safetensors"),
    "missing shard": (missing_shard, "model-00002-of-00002.safetensors', which is missing"),
    "missing tensor": (lambda case: with_tensors(case, lambda t: t.pop("model.norm.weight")), "lacks 1 tensors"),
    "extra tensor": (
        lambda case: with_tensors(case, lambda t: t.update({"model.norm2.weight": t["model.norm.weight"]})),
        "'model.norm2.weight'",
    ),
    "tensor of integers": (
        lambda case: with_tensors(case, lambda t: t.update({"model.norm.weight": np.ones(t["model.norm.weight"].shape, np.int8)})),
        "'model.norm.weight' is int8",
    ),
    "config.json without a field": (lambda case: with_config(case, hidden_size=None), "'hidden_size' is missing"),
    "unknown rope type": (
        lambda case: with_config(case, rope_parameters=None, rope_scaling={"rope_type": "yarm", "factor": 2.0}),
        "'yarm' is not supported; did you mean 'yarn'?",
    ),
    "a field of other maths": (lambda case: with_config(case, attention_multiplier=0.5), "'attention_multiplier' is 0.5"),
    "router terms without experts": (lambda case: {"loss__router_z": 0.1}, "loss.router_z: does nothing"),
    "adapter pattern that matches nothing": (with_adapter(targets=["q_proj"]), "adapter.targets: 'q_proj' matches nothing"),
    "adapter of too large a rank": (with_adapter(rank=64), "adapter.rank: 64 is larger than"),
    "adapter on one side of a tied head": (
        lambda case: with_config(case, tie_word_embeddings=True) | with_adapter(targets=["lm_head"])(case),
        "adapter.targets: 'lm_head' names the head, which this model ties to its embedding",
    ),
    "adapter for another base": (lambda case: adapter(case, inputs=48), "has the shape [2, 48], but this model asks for [r, 32]; the adapter belongs to another base"),
    "adapter of one side of a tied head": (
        lambda case: with_config(case, tie_word_embeddings=True) | adapter(case, inputs=32, tied=True),
        "changes 'lm_head' and 'model.embed_tokens' differently, or one of them alone",
    ),
    "adapter of another method": (lambda case: adapter(case, inputs=32, peft_type="LOHA"), "peft_type is 'LOHA'"),
    "adapter that is not there": (lambda case: {"adapter__name": "lora", "adapter__path": str(case)}, "holds no adapter_config.json"),
    "remote code": (remote_code, "NovelForCausalLM"),
    "mesh that does not match": (lambda case: {"mesh__data": 3, "mesh__fsdp": 1}, "mesh.data"),
    "unknown choice": (lambda case: {"optim__name": "adam"}, "'adamw'"),
    "workdir that is a file": (lambda case: (case / "run").write_text("") and None, "run: "),
}  # fmt: skip


def ends_with_one_message(result: subprocess.CompletedProcess, words: str, workdir: Path) -> None:
    message = result.stderr
    assert result.returncode == 2, result.stdout + message
    assert message.startswith("error: ") and message.count("error:") == 1 and words in message
    assert "Traceback" not in message + result.stdout
    assert not (workdir / "summary.json").exists()


@pytest.mark.parametrize("name", CHANGES)
def test_one_message_and_exit_code_2(name, case, folder):
    change, words = CHANGES[name]
    changes = change(case) or {}
    config = tiny_config(case, **{"train__steps": 2, "mesh__fsdp": 1, "data__cache_dir": str(folder / "cache"), **changes})
    result = run_command(config, case / "run", folder / "xdg")
    ends_with_one_message(result, words, case / "run")
    assert not (case / "executed").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.optim.learnig_rate=1"], "Unknown key 'optim.learnig_rate'; did you mean 'optim.learning_rate'?"),
        (["--config.train.batch_size=many"], "train.batch_size"),
        (["--config.train.micro_batch_size=3"], "train.micro_batch_size"),
        (["--config.train.export=maybe"], "--config.train.export=maybe: must be True or False"),
        (["--workdirr=x"], "workdirr"),
        (["stray"], "'stray' is not a flag"),
    ],
)
def test_wrong_flags(flags, words, case, folder):
    result = commands.run("train", *train_flags(tiny_config(case), case / "run"), *flags, env=environment(1, folder / "xdg"))
    ends_with_one_message(result, words, case / "run")


def test_a_recipe_that_is_missing(case, folder):
    arguments = ["--config=configs/no_such.py", f"--workdir={case / 'run'}"]
    result = commands.run("train", *arguments, env=environment(1, folder / "xdg"), cwd=ROOT)
    ends_with_one_message(result, "configs/no_such.py cannot be read", case / "run")


def test_a_workdir_that_nobody_can_make(case, folder):
    result = run_command(tiny_config(case, mesh__fsdp=1), Path("/proc/foo/bar"), folder / "xdg")
    ends_with_one_message(result, "/proc/foo/bar: the folder of the run could not be written (no such file or directory)", case)


def test_a_locked_workdir(case, folder):
    (case / "run").mkdir()
    with open(case / "run/.lock", "w") as lock:
        lock.write("process 1 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_command(tiny_config(case, mesh__fsdp=1), case / "run", folder / "xdg")
    ends_with_one_message(result, "is in use by process 1 on elsewhere", case / "run")


@pytest.mark.parametrize("kilobytes", [400, *slow(64)])
def test_a_full_disk(kilobytes, case, folder):
    """The workdir is a file system of its own that is too small: for the first checkpoint, and for a later one that is saved in the background."""
    (case / "run").mkdir()
    config = tiny_config(case, train__steps=30, checkpoint__every=1, checkpoint__keep=9, mesh__fsdp=1, data__cache_dir=str(folder / "cache"))
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {case / 'run'} && exec \"$@\""
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *train_command(config, case / "run")]
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no process mount a file system of its own")
    result = subprocess.run(command, env=environment(1, folder / "xdg"), capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and "no space left on device" in result.stderr and "start the same command again" in result.stderr
    assert "Traceback" not in result.stderr and "Done:" not in result.stdout


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_named_by_the_export_of_the_one_before(case, folder):
    result = run_command(tiny_config(case, train__steps=2, checkpoint__every=1, mesh__fsdp=1), case / "run", folder / "xdg")
    assert result.returncode == 0, result.stderr
    (case / "run/checkpoints/2/manifest.json").write_text("{}")
    result = commands.run("export", "--model", "run", "--out", "out", env=environment(1, folder / "xdg"), cwd=case)
    assert result.returncode == 0 and "Wrote out" in result.stdout
    assert "checkpoints/2 is damaged, the one before it is taken" in result.stderr and "Traceback" not in result.stderr
    assert "| optimizer steps | 1 |" in (case / "out/README.md").read_text()


COMMANDS = sorted(path.stem for path in (ROOT / "sft_jax").glob("*.py") if '__name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_can_be_read_and_is_no_failure(command, folder):
    """It begins with what the command is for and how it is called, and says of every flag what it does."""
    result = commands.run(command, "--help", env=environment(1, folder / "xdg"), cwd=ROOT)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    about, _, flags = result.stdout.partition("\nflags:")
    assert f"python -m sft_jax.{command}" in about and "Exit codes: 0" in " ".join(about.split()), about
    told = dict(re.findall(r"^ +--(?:\[no\])?(\w+): *(.*)$", flags, re.MULTILINE))
    assert told and all(told.values()), flags
    source = (ROOT / f"sft_jax/{command}.py").read_text()
    shared = {"define_config_flag(": "config", "define_decoding_flags(": "temperature"}
    assert {*re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source), *(flag for call, flag in shared.items() if call in source)} <= told.keys()


def test_there_are_commands():
    assert {"train", "evaluate", "compare", "sweep", "learning_curve", "ledger", "report", "selfcheck"} <= {*COMMANDS}
