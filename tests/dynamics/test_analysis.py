"""What is asked of a ledger that is not there or not whole, and what rows may hold that must not be shown."""

import io
import json
import shutil

import commands
import pytest
from planted_faults import write_rows
from rich.console import Console
from tiny_run import ROOT, environment, tiny_config

import sft_jax
from sft_jax.dynamics.analysis import CONFLICT, analyse, open_ledger
from sft_jax.dynamics.report import report
from sft_jax.errors import UserError

SECRET = "card 4111 1111 1111 1111"


def chat(question: str, answer: str, **fields) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on two sets: one with a row that cannot be used, and texts that must not be shown as they are."""
    folder = tmp_path_factory.mktemp("analysis")
    tiny_config(folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[3] = {"messages": "none"}
    rows[4] = chat(f"pay with {SECRET}", "noted \x1b[31mred", topic=f"bank {SECRET}")
    rows[5] = chat("lamp off", "done", topic=7)
    rows[6] = chat("lamp off", "never", topic=["a", {"b": 1}])
    write_rows(folder / "mixed.jsonl", rows)
    sets = {"mixed": str(folder / "mixed.jsonl"), "plain": str(folder / "held_out.jsonl")}
    sft_jax.fit(tiny_config(folder, data__train=sets, data__bad_rows="skip"), folder / "run")
    return folder


def test_rows_are_shown_masked_and_printable(folder):
    found = analyse(open_ledger(folder / "run", log=print), column="topic", limit=0)
    text = json.dumps(found.to_json(), ensure_ascii=False)
    assert "4111 1111" not in text and "\x1b" not in text and "...1111" in text and r"\x1b[31mred" in text.replace("\\\\", "\\")
    assert {group.name for group in found.slices} == {"(none)", "bank card ...1111", "7", '["a", {"b": 1}]'}
    assert sum(group.examples for group in found.slices) == found.examples == 95 + 12
    assert [(group.name, group.examples) for group in found.sets] == [("mixed", 95), ("plain", 12)]
    [conflict] = found.kinds[CONFLICT].examples
    assert {conflict.line, int(conflict.detail.partition("mixed.jsonl:")[2].partition(" ")[0])} == {6, 7}
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    console.print(report(found))
    shown = console.file.getvalue()
    assert "\x1b" not in shown and "4111 1111" not in shown and "mixed.jsonl:7" in shown


def test_one_set_is_listed_where_it_is_asked_for(folder):
    found = analyse(open_ledger(folder / "run", log=print), set_name="plain", limit=3)
    assert found.notes == ("plain came up 24 times in all, so its losses are compared over the whole run and not by time.",)
    assert len(found.worst) == 3 and {entry.set for entry in found.worst} == {"plain"} and not found.kinds[CONFLICT].count


def test_what_is_not_there_is_told_with_the_remedy(folder, tmp_path):
    ledger = open_ledger(folder / "run", log=print)
    with pytest.raises(UserError, match="--set: there is no training set 'plane'; did you mean 'plain'"):
        analyse(ledger, set_name="plane")
    with pytest.raises(UserError, match="--slice: no row has a column 'topics'; fields of rows are such as messages"):
        analyse(ledger, column="topics")
    with pytest.raises(UserError, match="holds no ledger; name the folder of a run"):
        open_ledger(folder, log=print)
    shutil.copytree(folder / "run", tmp_path / "run")
    for part in (tmp_path / "run/ledger").glob("steps_*"):
        part.unlink()
    with pytest.raises(UserError, match="has no exposures yet"):
        open_ledger(tmp_path / "run", log=print)


def test_rows_that_were_changed_are_refused(folder, tmp_path):
    """Numbers of rows would name others."""
    place = folder / "mixed.jsonl"
    before = place.read_bytes()
    place.write_bytes(before + b"\n" + before.splitlines()[0])
    try:
        with pytest.raises(UserError, match="data.train.mixed: its files are not those that this run was trained on"):
            open_ledger(folder / "run", log=print)
    finally:
        place.write_bytes(before)


def test_steps_without_a_ledger_are_counted(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    parts = sorted((tmp_path / "run/ledger").glob("steps_*"))
    parts[1].unlink()
    found = analyse(open_ledger(tmp_path / "run", log=print))
    assert "2 steps were trained with log.ledger=False, and what they saw is not known." in found.notes


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--limit=-1", "--workdir=RUN"], "--limit: must be 0"),
        (["--workdir=RUN", "--failing=4"], "--failing: is of --influence"),
    ],
)
def test_bad_flags_end_the_command_with_one_message(folder, flags, message):
    flags = [flag.replace("RUN", str(folder / "run")) for flag in flags]
    result = commands.run("ledger", *flags, env=environment(1, folder / "xdg"), cwd=ROOT)
    assert result.returncode == 2 and not result.stdout
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(f"error: {message}"), result.stderr
