"""inspect_data --check as a command: findings, exit codes, the page, the cleaned copy, flags that do not go together."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import commands
import pytest

ROOT = Path(__file__).parents[2]
CLEAN = [{"prompt": f"What is {n} plus {n + 1}, and why is that so?", "completion": f"It is {2 * n + 1}, since {n} and one more than {n} add up."} for n in range(3, 30)]
DIRTY = [*CLEAN, CLEAN[0], {"prompt": "And nothing?", "completion": " "}]


@pytest.fixture
def check(model, cache, written, tmp_path):
    """Runs the command on rows."""

    def go(rows, *flags):
        keys = [f"--config.model.path={model}", f"--config.data.train={written(rows)}", "--config.data.chat_template=none", f"--config.data.cache_dir={cache}"]
        return commands.run("inspect_data", "--config", ROOT / "configs/sft.py", *keys, *flags, env=os.environ, cwd=tmp_path)

    return go


def test_exit_codes_and_findings(check, tmp_path):
    done = check(CLEAN, "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    done = check(DIRTY, "--check", "--json")
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert found["limits_exceeded"] == ["empty_answer", "duplicate"] or set(found["limits_exceeded"]) == {"empty_answer", "duplicate"}
    assert [each["line"] for each in found["kinds"]["duplicate"]["findings"]] == [len(CLEAN) + 1]
    assert check(DIRTY, "--check", "--allow=1").returncode == 0
    done = check(DIRTY, "--check", "--fix=cleaned")
    assert done.returncode == 3
    (copy,) = (tmp_path / "cleaned" / "train").glob("*.jsonl")
    assert [json.loads(line) for line in copy.read_text().splitlines()] == CLEAN


def test_faults_are_a_part_of_the_page(check, tmp_path):
    done = check(DIRTY, "--check", "--html=page.html")
    assert done.returncode == 3 and "More than allowed: " in done.stderr, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "Faults" in page and f"train.jsonl:{len(CLEAN) + 1}" in page
    done = check(DIRTY, "--html=page.html")
    assert done.returncode == 0 and "Faults" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fix=x"], "--fix: is of --check; give that too, or leave --fix out."),
        (["--allow=1"], "--allow: is of --check"),
        (["--check", "--html=p", "--fix=x"], "--fix: a page changes nothing; leave out --html, or --fix."),
        (["--check", "--longest=3"], "--longest: is of examples that are shown, and --check looks at all data"),
        (["--check", "--allow=refusals=1"], "--allow: unknown kind 'refusals'; did you mean 'refusal'"),
    ],
)
def test_flags_that_do_not_go_together(check, flags, message):
    done = check(CLEAN, *flags)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr


def test_the_line_of_the_readme_runs_as_it_stands(tmp_path):
    text = (ROOT / "README.md").read_text().partition("## Judge the data")[2]
    words = shlex.split(re.search(r"python -m sft_jax\.inspect_data(?:.*\\\n)*.*", text)[0].replace("\\\n", " "))
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs/sft.py", tmp_path / "configs")
    (tmp_path / "benchmarks").mkdir()
    for name, rows in (("train", DIRTY), ("held_out", DIRTY[3:5]), ("benchmarks/a", DIRTY[5:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = commands.run("inspect_data", *words[3:], env=os.environ, cwd=tmp_path)
    assert done.returncode == 3 and "More than allowed: empty_answer, duplicate, overlap." in done.stdout, done.stderr
    copy = (tmp_path / "cleaned/train/train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in copy] == [*CLEAN[:3], *CLEAN[6:]]
