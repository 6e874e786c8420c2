"""The evaluate command as a user runs it, on the model of the quickstart."""

import json
import subprocess
import sys

import commands
import pytest
from benchmark_task import write_task
from tiny_run import ROOT, environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    lines = (ROOT / "data/quickstart/held_out.jsonl").read_text().splitlines()[:24]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["kind"] = json.loads(row["messages"][-1]["content"])["action"]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(folder, *arguments, **options):
    return commands.run("evaluate", *arguments, env=environment(1, folder / "cache"), cwd=ROOT, **options)


RECIPE = ["--model=models/nano", "--config=configs/sft.py"]


def data(folder):
    return [f"--config.data.eval={{'asked': {str(folder / 'held_out.jsonl')!r}}}", "--config.model.compute_dtype=float32"]


def test_json_is_one_object_and_nothing_else_and_samples_are_lines(folder):
    samples = folder / "samples.jsonl"
    result = evaluate(
        folder, *RECIPE, *data(folder), "--json", "--generate=4", "--max_new_tokens=8", "--scorer=contains", "--scorer=token_f1",
        "--slice=kind", f"--samples={samples}", terminal=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    commands.assert_bar(result)
    found = json.loads(result.stdout)
    asked = found["sets"]["asked"]
    assert found["model"] == "models/nano" and asked["examples"] == 24 and asked["scores"].keys() == {"contains", "token_f1"}
    assert sum(part["examples"] for part in asked["slices"]["kind"].values()) == 24
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(records) == 4 and [record["set"] for record in records] == ["asked"] * 4
    assert [record["example"]["line"] for record in records] == sorted(record["example"]["line"] for record in records)


@pytest.fixture(scope="module")
def task(folder):
    """A benchmark in a file, with its data beside it."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sft_jax[lm-eval]'")
    rows = [{"text": "The train to", "choices": [" Oslo", " zqx"], "label": 0}, {"text": "Every", "choices": [" ##", " morning"], "label": 1}]
    return write_task(folder, "actions", rows)


def test_a_benchmark_of_a_file_is_run_by_the_command(folder, task):
    result = evaluate(folder, "--model=models/nano", f"--tasks={task}", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["sets"] == {} and found["benchmarks"]["actions"]["acc,none"] == 1.0 and found["benchmarks"]["actions"]["examples"] == 2
    assert "\x1b" not in result.stderr and "\u2501" not in result.stderr


@pytest.mark.slow
def test_no_bar_of_the_harness_reaches_a_file(folder, task):
    """The harness and the reader of its data draw bars of their own. Python is started, since it is at an import that they are turned off."""
    command = [sys.executable, "-m", "sft_jax.evaluate", "--model=models/nano", f"--tasks={task}"]
    result = subprocess.run(command, cwd=ROOT, env=environment(1, folder / "cache"), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and "it/s" not in result.stderr and "|" not in result.stderr, result.stderr
    assert "actions" in result.stdout and "sample_len" not in result.stdout


@pytest.mark.slow
def test_a_table_is_for_people(folder):
    result = evaluate(folder, *RECIPE, *data(folder), "--generate=2", "--max_new_tokens=4")
    assert result.returncode == 0, result.stderr
    for word in ("loss", "perplexity", "bits/byte", "accuracy", "asked", "exact_match", "["):
        assert word in result.stdout


BAD = [
    (["--model=no/such/model", "--config=configs/sft.py", "--config.data.eval=x"], "no/such/model: there is no such directory"),
    (["--model=models/nano"], "--config: is missing"),
    (RECIPE, "data.eval: is empty"),
    ([*RECIPE, "--config.data.eval=x", "--scorer=bleu"], "--scorer: changes nothing, since no prompts are answered"),
    ([*RECIPE, "--config.data.eval=x", "--generate=4", "--scorer=blue"], "did you mean 'bleu'?"),
    ([*RECIPE, "--config.data.eval=x", "--generate=-2"], "--generate: must be"),
    ([*RECIPE, "--config.data.eval=x", "--generate=1", "--min_p=2"], "min_p: must be"),
    ([*RECIPE, "--config.data.eval=x", "--limit=3"], "--limit: is of benchmarks"),
    ([*RECIPE, "--config.data.eval=nofile.jsonl"], "data.eval: nofile.jsonl: there is no such file"),
    ([*RECIPE, "--slice=kind", "--tasks=x.yaml"], "--slice: is of held-out rows"),
    ([*RECIPE, "--config.data.eval=x", "--generate=1", "--samples=no/such/folder"], "--samples: there is no folder no/such"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), [BAD[4], *(pytest.param(*case, marks=pytest.mark.slow) for case in BAD if case is not BAD[4])])
def test_bad_input_is_one_message(folder, arguments, message):
    result = evaluate(folder, *arguments)
    assert result.returncode == 2 and result.stdout == "", result.stderr
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
