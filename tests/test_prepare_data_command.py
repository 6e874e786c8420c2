"""The prepare_data command as a user runs it, and what it needs of a model."""

import json
import os
import re
import shutil

import commands
import pytest
from tiny_run import make_rows, tiny_config, train_flags

from sft_jax.config_parsing import parse_config
from sft_jax.errors import UserError
from sft_jax.training.resolved import data_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data of a tiny run, its model without weights, and a directory with the tokenizer alone."""
    folder = tmp_path_factory.mktemp("prepared")
    tiny_config(folder)
    shutil.copytree(folder / "model", folder / "tokenizer")
    (folder / "tokenizer" / "config.json").unlink()
    rows = (folder / "train.jsonl").read_text().splitlines()
    rows[6] = json.dumps({"messages": [{"role": "user", "content": "no answer"}]})
    (folder / "bad.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def command(folder, tmp_path):
    """Runs the command with a cache of its own -> (exit code, standard output, standard error)."""

    def go(*more, model="tokenizer", train="train.jsonl"):
        values = {"model.path": folder / model, "data.train": folder / train, "data.cache_dir": tmp_path / "cache", "data.max_length": 96}
        arguments = [f"--config.{key}={value}" for key, value in {**values, "data.workers": 1, "train.epochs": 2}.items()]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        done = commands.run("prepare_data", "--config=configs/sft.py", *arguments, *more, env=environment)
        return done.returncode, done.stdout, done.stderr

    return go


def test_it_prints_the_report_and_where_the_rows_lie(command, folder, tmp_path):
    sets = {"many": {"path": str(folder / "bad.jsonl"), "epochs": 0.5}, "few": {"path": str(folder / "held_out.jsonl"), "cap": 5}}
    more = [
        f"--config.data.train={json.dumps(sets)}", "--config.data.bad_rows=skip", "--config.data.overlength=drop",
        f"--config.data.eval={folder / 'held_out.jsonl'}", "--config.data.max_length=40",
    ]  # fmt: skip
    code, out, error = command(*more)
    assert code == 0, error
    for line in (
        r"data\.train 'many': 96 rows of format 'messages' read, 95 used, 1 left out",
        r"  left out: 1 \(.*bad\.jsonl:7\): .*",
        r"  over length \('drop'\): \d+ examples, \d+ dropped, 0 cut, 0 split; \d+ tokens lost, \d+ of them supervised",
        r"  beyond the cap: \d+ rows",
        r"  used: 5 documents, \d+ tokens, \d+ supervised \(\d+\.\d%\); an example has \d+ tokens on average, \d+ at most",
        r"  in the run: 10 documents, 2 of each on average, \d+\.\d% of the supervised tokens",
        r"Rows of 40: \d+( to \d+)? an epoch, \d+ in the run, \d+\.\d% filled with \d\.\d documents each, \d+\.\d% of the tokens supervised",
        r"Steps of 8 rows: \d+\.\d( to \d+\.\d)? an epoch, \d+ in the run",
        r"data\.eval 'eval': 12 rows of format 'messages' read, 12 used, 0 left out",
    ):
        assert re.search(rf"^{line}$", out, re.MULTILINE), f"{line}\n{out}"
    (rows,) = re.findall(r"(\d+) in the run, ", out)
    (steps,) = re.findall(r"an epoch, (\d+) in the run$", out, re.MULTILINE)
    assert int(steps) == -(-int(rows) // 8)
    folders = dict(re.findall(r"^(data\..*) is prepared in (.*)$", out, re.MULTILINE))
    assert list(folders) == ["data.train.many", "data.train.few", "data.eval"]
    assert all(os.path.exists(os.path.join(place, "manifest.json")) for place in folders.values())
    code, again, _ = command(*more)
    assert code == 0 and again.count("rows were prepared before") == 3 and "preparing" not in again
    assert [line for line in out.splitlines() if "prepar" not in line] == [line for line in again.splitlines() if "prepar" not in line]


def test_train_finds_what_was_prepared_for_it(command, folder, tmp_path, capsys):
    from sft_jax import fit

    assert command(model="model")[0] == 0
    (store,) = (tmp_path / "cache" / "tokens").iterdir()
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    config = tiny_config(folder, data__cache_dir=str(tmp_path / "cache"), train__steps=1)
    fit(config, tmp_path / "run")
    assert f"data.train: 96 rows were prepared before ({store})." in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert list((tmp_path / "cache" / "tokens").iterdir()) == [store]


def test_parts_are_prepared_by_several_processes(command):
    parts = [f"--process_index={index}" for index in (1, 0)]
    code, out, _ = command(parts[0], "--process_count=2")
    assert code == 0 and "data.train: part 1 of 2 is prepared; 1 of 1 shards are still missing" in out and "Rows of" not in out
    code, out, _ = command(parts[1], "--process_count=2")
    assert code == 0 and "Rows of 96: " in out and "Steps of 8 rows: " in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--process_index=2", "--process_count=2"], "--process_index: must be from 0 to 1, one below --process_count, not 2."),
        (["--process_index=1"], "--process_index: must be from 0 to 0, one below --process_count, not 1."),
        (["--process_count=0"], "--process_count: must be at least 1, not 0."),
        (["--config.data.train=nothing.jsonl"], "data.train: nothing.jsonl: there is no such file; check the path."),
    ],
)
def test_wrong_input_is_one_message(command, arguments, message):
    assert command(*arguments) == (2, "", f"error: {message}\n")


def test_bad_rows_end_the_command_with_2(command):
    code, _, error = command(train="bad.jsonl")
    assert code == 2 and "bad.jsonl:7: " in error and "Traceback" not in error


def test_a_model_without_weights_tells_its_vocabulary(folder, tmp_path):
    values = json.loads((folder / "model" / "config.json").read_text())
    found = data_model(parse_config(tiny_config(folder)), print)
    assert (found.tokenizer, found.vocab_size) == (str(folder / "model"), values["vocab_size"])
    alone = data_model(parse_config(tiny_config(folder, model__path=str(folder / "tokenizer"))), print)
    assert (alone.tokenizer, alone.vocab_size) == (str(folder / "tokenizer"), None)
    larger = parse_config(tiny_config(folder, data__add_tokens="<new>"))
    assert data_model(larger, lambda line: None).vocab_size == values["vocab_size"] + 1
    with pytest.raises(UserError, match="holds no config.json; name a Hugging Face directory"):
        data_model(parse_config(tiny_config(folder, model__path=str(make_rows(tmp_path / "rows.jsonl").parent))), print)


@pytest.mark.parametrize("told", [{"vocab_size": 7}, {"text_config": {"vocab_size": 7}}, {}])
def test_an_architecture_that_cannot_be_trained_is_no_reason_to_refuse_its_data(told, folder, tmp_path):
    """Its vocabulary is that of config.json, where that names one."""
    tokenizer = shutil.copytree(folder / "tokenizer", tmp_path / "unknown")
    (tokenizer / "config.json").write_text(json.dumps({"architectures": ["Llama4ForConditionalGeneration"], **told}))
    lines = []
    found = data_model(parse_config(tiny_config(folder, model__path=str(tokenizer))), lines.append)
    assert (found.tokenizer, found.vocab_size) == (str(tokenizer), 7 if told else None)
    (line,) = lines
    assert line.startswith(f"{tokenizer}: config.json: architecture 'Llama4ForConditionalGeneration' is not supported; did you mean ")
    assert line.endswith(" that are known. Only its tokenizer is needed here; train will refuse the model.") and "?." not in line


def test_data_of_an_architecture_that_cannot_be_trained(command, folder):
    values = json.loads((folder / "model" / "config.json").read_text()) | {"architectures": ["Llama4ForConditionalGeneration"]}
    shutil.copytree(folder / "tokenizer", folder / "unknown")
    (folder / "unknown" / "config.json").write_text(json.dumps(values))
    code, out, error = command("--config.data.add_tokens=<new>", model="unknown")
    assert (code, error) == (0, "") and out.count("architecture 'Llama4ForConditionalGeneration' is not supported") == 1
    assert f"The model goes from {values['vocab_size']:,} to {values['vocab_size'] + 1:,} tokens" in out and "Rows of 96: " in out
    arguments = train_flags(tiny_config(folder, model__path=str(folder / "unknown")), folder / "run")
    refused = commands.run("train", *arguments, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
    assert refused.returncode == 2 and "architecture 'Llama4ForConditionalGeneration' is not supported" in refused.stderr and "?." not in refused.stderr
