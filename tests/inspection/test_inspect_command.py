"""The command as a user runs it: what is on standard output, exit codes, and every refusal whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from inspected_rows import PLAIN, ROWS

from sft_jax.config import to_dict
from sft_jax.config_parsing import parse_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def inspect(model, cache, written, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    data = written(
        [
            *ROWS,
            *({"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "x"}]} for i in range(20)),
        ]
    )

    def go(*arguments, keys=(), popen=False):
        flags = [
            "--config", str(ROOT / "configs" / "sft.py"),
            f"--config.model.path={model}", f"--config.data.train={data}", f"--config.data.cache_dir={cache}",
            f"--config.data.chat_template={model / 'template.jinja'}",
            "--config.data.add_tokens=<|im_start|>,<|im_end|>", "--config.data.workers=1", *keys, *arguments,
        ]  # fmt: skip
        if popen:
            command = [sys.executable, "-m", "sft_jax.inspect_data", *flags]
            return subprocess.Popen(
                command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        return commands.run("inspect_data", *flags, env=environment, cwd=tmp_path)

    return go


def test_json_is_all_there_is_on_standard_output(inspect):
    done = inspect("--json")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert [record["line"] for record in records] == [1, 2, 3, 4, 4, *range(5, 26)]
    assert [record["line"] for record in records if record["problem"]] == [3, 5]
    assert done.stderr.endswith("Written: 26 of 26 examples that match, of 26.\n")


def test_json_is_filtered_too(inspect):
    done = inspect("--json", "--problems", "--limit=1")
    assert [json.loads(line)["line"] for line in done.stdout.splitlines()] == [3]
    assert done.stderr.endswith("Written: 1 of 2 examples that match, of 26.\n")


def test_a_reader_that_goes_away_is_no_traceback(inspect):
    process = inspect("--json", popen=True)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 1 and "Traceback" not in error and "BrokenPipe" not in error


def test_examples_and_rows_in_a_pipe(inspect):
    done = inspect("--row=1")
    assert done.returncode == 0 and "[[It says 9.<|im_end|>]]" in done.stdout
    assert done.stdout.endswith("Shown: 1 of 1 examples that match, of 1.\n")
    done = inspect("--rows", "--limit=1", keys=["--config.data.max_length=100"])
    assert done.returncode == 0 and "packed row 1 of " in done.stdout and done.stdout.endswith(" Show more with --limit.\n")


def test_the_page_is_written(inspect, tmp_path):
    done = inspect("--html=page.html", "--search=says")
    assert done.returncode == 0 and done.stdout == ""
    assert done.stderr.endswith("page.html: The page holds all 1 examples that match --search=says.\n")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "--rows"], "--json, --rows: only one of them; a page has the packed rows too, and --json is of examples."),
        (["--json", "--ids"], "--ids: is of what is shown in the terminal; leave out --ids or --json."),
        (["--limit=-1"], "--limit: must be 0 (all) or more, not -1."),
        (["--set=other"], "--set: there is no data set 'other'; Known: train."),
    ],
)
def test_wrong_flags_are_one_message(inspect, arguments, message):
    done = inspect(*arguments)
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (2, "", f"error: {message}")


def test_a_set_without_a_usable_row_is_refused_with_its_reasons(inspect, written):
    path = written([{"prompt": "q"}] * 2, "none.jsonl")
    done = inspect(keys=[f"--config.data.train={path}", "--config.data.format=prompt_completion"])
    assert done.returncode == 2 and f"{path}:1: field 'completion' is missing" in done.stderr and "Traceback" not in done.stderr


def test_a_run_is_looked_at_with_its_own_tokenizer_and_template(inspect, tmp_path):
    """As the next run that begins with it would train: its export has the tokenizer, its configuration the template."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "export").symlink_to(ROOT / "models" / "nano")
    config = parse_config({"model": {"path": str(ROOT / "models" / "nano")}, "data": {"train": "x.jsonl"}})
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    keys = [f"--config.model.path={workdir}", "--config.data.chat_template=auto", "--config.data.add_tokens="]
    done = inspect("--row=1", keys=keys)
    assert done.returncode == 0, done.stderr
    assert "<s><|user|>What says the fox?<|end|><|assistant|>[[It says 9.<|end|>]]" in done.stdout


def test_jax_is_not_imported(inspect, model, cache, written):
    data = {"train": written(PLAIN), "chat_template": "none", "cache_dir": str(cache)}
    config = {"model": {"path": str(model)}, "data": data}
    code = (
        "import sys; from sft_jax.config_parsing import parse_config; from sft_jax.inspection.subject import open_subject\n"
        "import sft_jax.inspection.page, sft_jax.inspection.terminal, sft_jax.inspect_data\n"
        f"config = parse_config({config!r})\n"
        "open_subject(config, config.model.path, None, log=lambda line: None)\n"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
