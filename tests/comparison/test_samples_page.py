"""The page of a comparison in a browser: no errors, nothing of the answers runs, filters show who wins; and the tables of the terminal."""

import re
import subprocess

import numpy as np
import pytest

from sft_jax.comparison.asking import Answered, Latency
from sft_jax.comparison.contenders import Contender, Examples
from sft_jax.comparison.prompts import Asked
from sft_jax.comparison.questions import Question
from sft_jax.comparison.results import Comparison, Price
from sft_jax.comparison.samples_page import samples_page
from sft_jax.comparison.tables import contender_rows, pair_rows, print_tables
from sft_jax.data.formats.conversation import Conversation
from sft_jax.data.sources.registry import Where
from sft_jax.evaluation.samples import HeldOut
from sft_jax.evaluation.scorers import find_scorers
from sft_jax.evaluation.scoring import Answer, score
from sft_jax.evaluation.slots import Generation

HOSTILE = "</pre></script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">\x1b[31m\u202e"
REFERENCES = ["one", "two", HOSTILE, "four"]
ANSWERS = {"base & <b>": ["one", "x", HOSTILE, ""], "base & <b>, 2 examples": ["one", "two", "x", "x"], "tuned": ["x", "two", HOSTILE, "four"]}


def compared(answers=ANSWERS, prices=True):
    questions = [Question(Where("f.jsonl", n + 1), Conversation(prompt="p", completion="c"), {}, f"question {n} {HOSTILE}", n) for n in range(4)]
    answered = []
    for name, texts in answers.items():
        model, comma, _ = name.partition(",")
        said = [Answer(text, reference, f"{HOSTILE} prompt") for text, reference in zip(texts, REFERENCES, strict=True)]
        items = [HeldOut("f.jsonl", n + 1, -1, n, [1] * 10, [2]) for n in range(4)]
        fits = [True, True, True, bool(texts[3])]
        asked = Asked(items, [questions[:2] if comma else []] * 4, fits)
        scored = {scorer: score(found, said) for scorer, found in find_scorers(["exact_match", "token_f1"], "x").items()}
        made = [Generation([5], place != 1) for place in range(4)]
        contender = Contender(model, examples=Examples(2) if comma else None)
        answered.append(Answered(contender, asked, said, made, scored, [10] * 4, [2] * 4, 3, None if comma else Latency(0.5, 0.75, 4)))
    models = {each.contender.model for each in answered}
    by_model = {model: Price(1.0, 2.0) for model in models} if prices else {}
    return Comparison(answered, questions, "held", by_model, dict.fromkeys(models), ("a note <i>",), 0)


@pytest.fixture(scope="module")
def comparison():
    return compared()


@pytest.fixture(scope="module")
def browse(chromium, tmp_path_factory, comparison):
    """Opens the page with a hash and returns what it has become and what the console was told."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "samples.html").write_text(samples_page(comparison), encoding="utf-8")

    def go(asked=""):
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
            "--dump-dom", f"{(folder / 'samples.html').as_uri()}{asked}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return go


def visible(dom):
    articles = re.findall(r'<article class="example"([^>]*)>.*?<h3>f\.jsonl:(\d)</h3>', dom)
    return [int(line) for attributes, line in articles if "hidden" not in attributes]


@pytest.mark.browser
def test_the_page_has_no_errors_and_runs_nothing_of_its_content(browse):
    dom, console = browse()
    assert console == [] and "<title>Contenders compared</title>" in dom and "hacked'" in dom and "<img" not in dom
    assert visible(dom) == [1, 2, 3, 4] and '<span id="status" role="status">4 of 4 shown</span>' in dom
    assert dom.count('<div class="answers"><div>') == 4 and "\x1b" not in dom and "\u202e" not in dom
    told = ("a note &lt;i&gt;", "base &amp; &lt;b&gt;, 2 examples", "does not fit", "cut off", "after f.jsonl:1, f.jsonl:2", "Rule: the cheapest")
    for text in told:
        assert text in dom, text


@pytest.mark.browser
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("better-0-1", [3]), ("better-1-0", [2]), ("equal-0-1", [1, 4]), ("better-0-2", [1]), ("better-2-0", [2, 4]), ("equal-1-2", [2]),
        ("differ", [1, 2, 3, 4]), ("differ&search=question+2", [3]),
    ],
)  # fmt: skip
def test_filters_show_who_wins(browse, asked, expected):
    dom, console = browse(f"#only={asked}")
    assert (visible(dom), console) == (expected, [])


def test_tables_have_what_differs(comparison):
    head, rows = contender_rows(comparison)
    assert head[0] == "contender" and {"exact_match", "cost of 1,000", "seconds (p90)", "do not fit", "cut off"} <= set(head)
    (first, shown, tuned) = (dict(zip(head, row, strict=True)) for row in rows)
    assert (first["contender"], first["do not fit"], first["seconds (p90)"], shown["seconds (p90)"]) == ("base & <b>", "1", "0.500 (0.750)", "-")
    assert first["cost of 1,000"] == "0.0140" and tuned["do not fit"] == "0"  # 10 and 2 tokens at 1 and 2 a million, a thousand times
    assert tuned["exact_match"].startswith("0.7500 [") and first["cut off"] == "1"
    cells, left_out = pair_rows(comparison, "exact_match")
    assert cells[1][:2] == ["base & <b>", "tuned"] and cells[1][2].startswith("-0.2500 [") and cells[1][4:] == ["1", "2", "1"]
    assert left_out == 0


def test_of_many_pairs_those_with_the_best_are_shown():
    texts = [["one" if n > 1 else "x", "x", "x", "x"] for n in range(6)] + [REFERENCES]
    many = compared({f"model {n}": each for n, each in enumerate(texts)}, prices=False)
    cells, left_out = pair_rows(many, "exact_match")
    assert len(cells) == 6 and left_out == 15 and all("model 6" in row[:2] for row in cells)
    assert "cost of 1,000" not in contender_rows(many)[0] and many.to_dict()["contenders"][0]["cost_per_1000"] is None


def test_the_terminal_is_told_everything(comparison, capsys):
    print_tables(comparison)
    said = capsys.readouterr().out
    told = ("4 rows of held", "of 4 requests, one at a time, on this machine", "exact_match: contender", "token_f1: contender")
    for text in (*told, "Rule: the cheapest (price", "Not known from this:"):
        assert text in said
    nothing = compared(ANSWERS)
    for each in nothing.answered[1:]:
        each.scored["exact_match"].statistics[:] = 0
    print_tables(nothing)
    assert "No advice: two contenders have no answers that exact_match can compare." in capsys.readouterr().out
    assert nothing.to_dict()["advice"] is None and np.isnan(nothing.answered[1].scored["exact_match"].value)
