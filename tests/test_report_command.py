"""The report command as a user runs it; what it finds is tested in tests/diagnosis."""

import json

import commands
import pytest
from planted_runs import write_rows
from tiny_run import ROOT, environment, metrics, tiny_config

from sft_jax.config import to_dict
from sft_jax.config_parsing import parse_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The files of a run that has just begun, as it writes them."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps(to_dict(parse_config(tiny_config(folder)))))
    record = {"split": "train", "learning_rate": 1e-3, "update_ratio": 1e-3}
    write_rows(folder / "run" / "metrics.jsonl", [{"step": step, "loss": 3 / step, **record} for step in (1, 2)])
    return folder / "run"


def report(run, *arguments, **options):
    return commands.run("report", *arguments, env=environment(1, run.parent / "cache"), cwd=ROOT, **options)


def test_json_is_one_object_and_nothing_else_and_a_page_is_written(run, tmp_path):
    result = report(run, run, "--quick", "--json", f"--html={tmp_path / 'page.html'}")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["run"] == str(run) and found["steps"] == metrics(run)[-1]["step"] and found["causes"] == []
    assert "is written" in result.stderr and (tmp_path / "page.html").is_file()


def test_what_takes_long_has_a_bar_on_a_terminal_and_none_in_a_file(run):
    """Of this run the rows of the data are looked at; its models are not there."""
    for terminal in (True, False):
        result = report(run, run, "--json", terminal=terminal)
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["not_looked_for"]["export_differs"] and "duplicates_or_leakage" in found["looked_for"]
        if terminal:
            commands.assert_bar(result)
            assert "rows" in result.stderr
        else:
            assert "\x1b" not in result.stdout + result.stderr and "\u2501" not in result.stderr


@pytest.mark.slow
def test_text_is_for_people(run):
    for folders in ([run], [run, run]):
        result = report(run, *folders, "--quick")
        assert result.returncode == 0, result.stderr
        assert "No cause was found" in result.stdout and "not finished" in result.stdout


BAD = [
    (["no/such/run"], "no/such/run: there is no such folder"),
    ([], "the folder of a run is missing"),
    (["models/nano"], "models/nano: is no run"),
    (["a", "b", "c"], "'c' is not a flag"),
    (["models/nano", "--quick", "--general=README.md"], "--general: is read with the models"),
    (["models/nano", "--html=no/such/page.html"], "--html: there is no folder no/such"),
]


@pytest.mark.parametrize(("arguments", "message"), [BAD[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in BAD[1:])])
def test_bad_input_is_one_message(run, arguments, message):
    result = report(run, *arguments)
    assert result.returncode == 2 and result.stdout == "", result.stderr
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
