"""The doctor's visit as the command makes it: exit codes, limits, output."""

import html
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from doctor_data import MAIL, configure, faulty, row, rows, sentence, visit
from row_files import lines, write

from sft_jax.doctor import check
from sft_jax.doctor.check import diagnose
from sft_jax.doctor.checks import CHECKS
from sft_jax.doctor.facts import ROW_CHECKS
from sft_jax.doctor.findings import LISTED, Limits, parse_limits
from sft_jax.errors import UserError
from sft_jax.inspection.page_faults import fault_section


def test_exit_codes_and_table(tmp_path):
    assert visit(configure(tmp_path, rows(20)))[0] == 0
    code, text = visit(configure(tmp_path, faulty()))
    assert code == 3
    assert "More than allowed: empty_answer, duplicate, template_markup." in text
    assert "unbalanced_fences" in text and "train.jsonl:31" in "".join(text.split()).replace("│", "") and MAIL not in text


def test_warnings_fail_only_where_a_limit_names_them(tmp_path):
    config = configure(tmp_path, [*rows(20), row(40, completion="I'm sorry, but I can't help with that.")])
    assert visit(config)[0] == 0 and visit(config, limit="refusal=0")[0] == 3
    diagnosis = diagnose(config.data)
    for limit, exceeded in (
        ("", []),
        ("0", []),
        ("refusal=0", ["refusal"]),
        ("refusal=1", []),
        ("refusal=5%", []),
        ("refusal=4%", ["refusal"]),
    ):
        assert parse_limits(limit, tuple(CHECKS)).exceeded(diagnosis) == exceeded, limit


def test_errors_may_be_allowed(tmp_path):
    diagnosis = diagnose(configure(tmp_path, [*rows(20), row(1), row(2)]).data)
    for limit, fails in (
        ("1", True),
        ("2", False),
        ("9%", True),
        ("10%", False),
        ("0,duplicate=2", False),
        ("5,duplicate=0", True),
    ):
        assert parse_limits(limit, tuple(CHECKS)).exceeded(diagnosis) == ["duplicate"] * fails, limit


def test_limits_are_read_strictly():
    known = tuple(CHECKS)
    assert parse_limits("", known) == Limits()
    assert parse_limits(" 1% , refusal = 20 ", known) == Limits(
        parse_limits("1%", known).errors, {"refusal": parse_limits("20", known).errors}
    )
    messages = {
        "x": "--allow: 'x' is no limit; give rows or a share of them, such as 10, 0.5% or refusal=1%.",
        "-1": "--allow: '-1' is no limit; give rows or a share of them, such as 10, 0.5% or refusal=1%.",
        "refusal=101%": "--allow: 'refusal=101%' is no limit; give rows or a share of them, such as 10, 0.5% or refusal=1%.",
        "1,2": "--allow: '1,2' gives two limits without a name; write one, and others as KIND=LIMIT.",
        "refusal=1,refusal=2": "--allow: names 'refusal' twice; keep one of them.",
        "refusals=1": f"--allow: unknown kind 'refusals'; did you mean 'refusal'? Known: {', '.join(sorted(CHECKS))}.",
    }
    for text, message in messages.items():
        with pytest.raises(UserError) as error:
            parse_limits(text, known)
        assert str(error.value) == message


def test_json_output_is_the_diagnosis(tmp_path):
    config = configure(tmp_path, faulty(), rows(5, 200))
    code, text = visit(config, as_json=True)
    report = json.loads(text)
    assert code == 3 and report.pop("limits_exceeded") == ["empty_answer", "duplicate", "template_markup"]
    assert report == json.loads(json.dumps(diagnose(config.data).to_json())) and MAIL not in text
    assert report["kinds"]["empty_answer"]["findings"] == [
        {"file": str(tmp_path / "train.jsonl"), "line": 32, "set": "data.train", "detail": "the answer is empty"}
    ]
    assert set(report["kinds"]) == set(CHECKS) >= set(ROW_CHECKS)


def test_more_findings_than_are_listed_are_counted(tmp_path):
    count = LISTED + 30
    diagnosis = diagnose(configure(tmp_path, [*rows(300), *(row(1) for _ in range(count))]).data)
    assert diagnosis.kinds["duplicate"].rows == count and len(diagnosis.findings["duplicate"]) == LISTED


def test_what_most_rows_of_a_set_have_is_told_and_not_counted(tmp_path):
    diagnosis = diagnose(
        configure(tmp_path, [{"text": f"<|im_start|>user\n{sentence(seed)}<|im_end|>"} for seed in range(20)]).data
    )
    assert diagnosis.kinds["template_markup"].rows == 0 and diagnosis.kinds["template_markup"].usual == ("data.train",)
    line = "template_markup: so many rows of data.train are like this that it is no fault of theirs, and none is counted."
    assert line in html.unescape(fault_section(diagnosis))


def rendered_before(seed):
    """Returns a chat whose answer has gone through a template before."""
    answer = {"role": "assistant", "content": f"{sentence(seed)}<|im_end|>"}
    return {"messages": [{"role": "user", "content": row(seed)["prompt"]}, answer]}


def test_chats_that_were_rendered_before_are_faults_however_many(tmp_path):
    code, text = visit(configure(tmp_path, [rendered_before(seed) for seed in range(40)]), as_json=True)
    assert code == 3 and json.loads(text)["kinds"]["template_markup"]["rows"] == 40
    plain = configure(tmp_path, [row(seed, completion=f"{sentence(seed)}<|im_end|>") for seed in range(40)], chat_template="none")
    assert diagnose(plain.data).kinds["template_markup"].usual == ("data.train",)


MOST_ROWS = {
    "cut_answer": {"completion": "There are many kinds of these, for example {0} apples, pears,"},
    "refusal": {"completion": "I'm sorry, but I can't help with that {0}."},
    "boilerplate": {"completion": "As an AI language model, I have no {0}."},
    "repeats_prompt": {"prompt": "Is it {0} that you say?", "completion": "Is it {0} that you say?"},
    "conflicting_answers": {"prompt": "Is it so?", "completion": "It is {0}."},
}


def test_faults_of_most_rows_are_counted(tmp_path):
    sets = {}
    for kind, fields in MOST_ROWS.items():
        train = [
            {name: text.format(sentence(f"{kind}{seed}", 9)[:-1]) for name, text in {**row(f"{kind}{seed}"), **fields}.items()}
            for seed in range(20)
        ]
        sets[kind] = {"path": write(tmp_path, f"{kind}.jsonl", lines(*train))}
    kinds = diagnose(configure(tmp_path, rows(1), train=sets).data).kinds
    assert {kind: kinds[kind].rows for kind in MOST_ROWS} == {kind: 20 - (kind == "conflicting_answers") for kind in MOST_ROWS}


def test_what_a_limit_names_is_counted_however_usual(tmp_path):
    config = configure(tmp_path, [row(seed, completion=("positive", "negative")[seed % 2]) for seed in range(30)])
    assert visit(config)[0] == 0 and visit(config, limit="one_word_answer=0")[0] == 3


def test_json_lists_all_and_tells_how_many_it_does_not(tmp_path, monkeypatch):
    config = configure(tmp_path, [*rows(30), *(row(1) for _ in range(LISTED + 30))])
    found = json.loads(visit(config, as_json=True)[1])["kinds"]["duplicate"]
    assert [each["line"] for each in found["findings"]] == list(range(31, 31 + LISTED + 30)) and found["not_listed"] == 0
    monkeypatch.setattr(check, "LISTED_IN_JSON", 120)
    found = json.loads(visit(config, as_json=True)[1])["kinds"]["duplicate"]
    assert (found["rows"], len(found["findings"]), found["not_listed"]) == (130, 120, 10)


def test_the_page_is_escaped(tmp_path):
    evil = '<script>alert(1)</script> & "quotes"'
    train = [*rows(20), row(40, completion=f"I'm sorry, but I can't help with {evil}"), row(41, prompt=f"{evil} {sentence(1)}")]
    text = fault_section(diagnose(configure(tmp_path, [*train, {"prompt": evil, "completion": ""}], rows(3, 90)).data))
    assert "<script" not in text and "&lt;script&gt;" in text
    opened, closed = [], []
    parser = HTMLParser()
    parser.handle_starttag, parser.handle_endtag = lambda tag, _: opened.append(tag), closed.append
    parser.feed(text)
    assert sorted(opened) == sorted(closed)


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path):
    train = faulty(200)
    results = [diagnose(configure(tmp_path, train, rows(20, 150), workers=workers).data).to_json() for workers in (1, 3)]
    assert results[0] == results[1]


def test_a_row_that_ends_its_worker_is_a_finding(tmp_path):
    config = configure(tmp_path, [*rows(5), row(40, completion="apple " * 3_000_000)], row_memory_mb=100)
    diagnosis = diagnose(config.data)
    (finding,) = diagnosis.findings["unreadable"]
    assert finding.line == 6 and finding.detail == "checking it needed more than 100 MB of memory; see data.row_memory_mb."


def test_diversity_of_same_and_of_different_rows(tmp_path):
    plain = diagnose(configure(tmp_path, rows(100)).data).diversity
    same = diagnose(configure(tmp_path, [row(seed % 4, completion=sentence(seed % 4)) for seed in range(100)]).data).diversity
    assert same["distinct_ngrams"]["answers"]["3"] < 0.1 < 0.9 < plain["distinct_ngrams"]["answers"]["3"]
    assert same["self_similarity"] == pytest.approx(24 / 99, abs=0.03) and plain["self_similarity"] < 0.03  # "Tell me about"
    assert same["prompt_clusters"]["clusters"][0]["share"] == same["prompt_clusters"]["largest_share"] >= 0.25
    assert sum(each["share"] for each in plain["prompt_clusters"]["clusters"]) == pytest.approx(1, abs=0.01)
    assert plain["sets"] == [{"set": "data.train", "rows": 100, "share_of_rows": 1.0, "share_of_words": 1.0}]


def test_clusters_are_groups_of_prompts(tmp_path):
    groups = ("Translate this word please number", "Sum both values quickly now", "Write a poem that mentions")
    train = [row(seed, prompt=f"{groups[seed % 3 if seed < 90 else 0]} {seed}") for seed in range(120)]
    clusters = diagnose(configure(tmp_path, train).data).diversity["prompt_clusters"]["clusters"]
    shares = {group: sum(each["share"] for each in clusters if each["example"].startswith(f'"{group}')) for group in groups}
    assert shares == {
        groups[0]: pytest.approx(0.5, abs=0.001),
        groups[1]: pytest.approx(0.25, abs=0.001),
        groups[2]: pytest.approx(0.25, abs=0.001),
    }


def test_shares_of_sets(tmp_path):
    paths = [
        write(tmp_path, f"{name}.jsonl", lines(*rows(count, first))) for name, count, first in (("a", 30, 0), ("b", 10, 50))
    ]
    config = configure(tmp_path, rows(1), train={"first": {"path": paths[0]}, "second": {"path": paths[1]}})
    assert [(each["set"], each["share_of_rows"]) for each in diagnose(config.data).diversity["sets"]] == [
        ("data.train.first", 0.75), ("data.train.second", 0.25),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fix": "full"}, "--fix: full: is not empty; name a new folder."),
        ({"fix": "full/file"}, "--fix: full/file: is a file; name a new folder."),
        (
            {"fix_kinds": ["refusal"]},
            "--fix_kinds: changes nothing without --fix; name a folder for the cleaned copy, or leave it out.",
        ),
        ({"fix": "new", "fix_kinds": ["x"]}, f"--fix_kinds: unknown kind 'x'; Known: {', '.join(sorted(CHECKS))}."),
        ({"benchmark": ["none.jsonl"]}, "--benchmark: none.jsonl: there is no such file; check the path."),
    ],
)
def test_bad_options_are_told_before_anything_is_done(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").touch()
    with pytest.raises(UserError) as error:
        visit(configure(tmp_path, faulty()), **options)
    assert str(error.value) == message
    assert not Path("new").exists() and [each.name for each in Path("full").iterdir()] == ["file"]


def test_content_never_acts_on_a_terminal_or_a_page(tmp_path):
    evil = "\x1b[31mred\x9b\u202e"
    config = configure(tmp_path, [*rows(20), row(40, completion=f"I'm sorry, but I can't help with that {evil}.", **{f"f{evil}": 1})])
    for text in (visit(config)[1], visit(config, as_json=True)[1], fault_section(diagnose(config.data))):
        assert "can't help" in html.unescape(text) and not set("\x1b\x9b\u202e") & set(text)
