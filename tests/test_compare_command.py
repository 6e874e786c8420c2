"""The compare command as a user runs it, on the model of the quickstart."""

import json

import commands
import pytest
from tiny_run import ROOT, environment, make_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    for name, count in (("train", 60), ("held_out", 12)):
        lines = (ROOT / f"data/quickstart/{name}.jsonl").read_text().splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "systems.txt").write_text("--- terse\nAnswer with one JSON object.\n")
    return folder


def compare(folder, *arguments, **options):
    return commands.run("compare", *arguments, env=environment(1, folder / "cache"), cwd=ROOT, **options)


RECIPE = ["--model=models/nano", "--config=configs/sft.py"]


def data(folder):
    return [f"--config.data.{key}={folder / name}.jsonl" for key, name in (("train", "train"), ("eval", "held_out"))]


def test_json_is_one_object_and_nothing_else_and_the_folder_has_every_answer(folder):
    out = folder / "new" / "out"
    result = compare(
        folder, *RECIPE, *data(folder), "--config.model.compute_dtype=float32", "--json", f"--out={out}", "--shots=1", "--generate=4",
        "--max_new_tokens=8", "--batch_size=4", "--scorer=token_f1", "--latency=1", "--price_in=1", "--price_out=2", "--price_cached=0.1",
        terminal=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    commands.assert_bar(result)
    found = json.loads(result.stdout)
    names = [each["name"] for each in found["contenders"]]
    assert names == ["models/nano", "models/nano, 1 example"] and (found["rows"], found["scorers"], found["set"]) == (4, ["token_f1"], "eval")
    assert found["contenders"][1]["cost_per_1000"] > 0 and found["advice"]["choice"] in names and len(found["pairs"]) == 1
    assert json.loads((out / "results.json").read_text()) == found
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [record["contender"] for record in records] == names * 4
    assert records[1]["examples"][0].startswith(f"{folder / 'train.jsonl'}:") and records[0]["examples"] == []
    assert (out / "samples.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_a_table_is_for_people(folder):
    base = make_base(folder)
    result = compare(
        folder, *RECIPE, f"--model={base}", *data(folder), "--retrieve=2", f"--system={folder / 'systems.txt'}", "--generate=4",
        "--max_new_tokens=4", "--shots=auto", "--validation=4", "--pool=2", "--latency=0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for word in ("4 rows of eval", "models/nano, system terse, 2 nearest examples", f"  {base} ", "p (Holm)", "Rule: the cheapest"):
        assert word in result.stdout
    assert "auto examples: 0 chosen by exact_match on 4 training rows" in result.stderr


BAD = [
    ([*RECIPE, "--shots=4", "--config.data.eval=x", "--scorer=exakt"], "--scorer: unknown scorer 'exakt'; did you mean 'exact_match'"),
    ([], "--model: is missing"),
    (RECIPE, "nothing to compare"),
    ([*RECIPE, "--shots=four"], "--shots: must be a number of examples above 0, or auto, not 'four'"),
    (["--model=models/nano", "--shots=4"], "--config: is missing"),
    ([*RECIPE, "--shots=4"], "data.eval: is empty, so there is nothing to compare on"),
    ([*RECIPE, "--shots=4", "--config.data.eval=data/quickstart/held_out.jsonl"], "data.train: is empty"),
    ([*RECIPE, "--system=none.txt"], "--system: none.txt: cannot be read"),
    ([*RECIPE, "--model=no/such/model", "--config.data.eval=x"], "no/such/model: there is no such directory"),
    ([*RECIPE, "--shots=4", "--generate=1"], "--generate: must be at least 2"),
    ([*RECIPE, "--shots=4", "--validation=9"], "--validation: is for choosing"),
    ([*RECIPE, "--prompt_each", "--model=x"], "--prompt_each: is of examples"),
    ([*RECIPE, "--shots=4", "--price_in=1"], "only one of them is there"),
    ([*RECIPE, "--shots=4", "--price_in=1", "--price_in=2", "--price_out=1"], "--price_in: is there 2 times for 1 models"),
    ([*RECIPE, "--shots=4", "--price_in=-1", "--price_out=1"], "--price_in: must be 0 or more"),
    ([*RECIPE, "--shots=4", "--base=models/nano"], "--base: names the base of an adapter"),
    ([*RECIPE, "--shots=4", "--config.data.eval=x", "--out=README.md/x"], "--out: README.md/x cannot be written to"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), [BAD[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in BAD[1:])])
def test_bad_input_is_one_message(folder, arguments, message):
    result = compare(folder, *arguments)
    assert result.returncode == 2 and result.stdout == "", result.stderr
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
