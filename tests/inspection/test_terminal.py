"""What the terminal shows: marks without colours, colours by weight, and content that never acts."""

import io
import re

import pytest
from inspected_rows import ROWS, everything

from sft_jax.inspection.packed import read_row
from sft_jax.inspection.terminal import TerminalView, weight_class

HOSTILE = "[bold]x[/bold] [red] :smile: [link=http://x]y[/link] \x1b[31m\x1b]0;title\x07 \u202e"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(inspected, written, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def go(rows, file=None, packed=False, **options):
        subject = inspected(written(rows))
        file = io.StringIO() if file is None else file
        view = TerminalView(subject.data.tokenizer, file=file, **options)
        if packed:
            view.row(read_row(subject.data.train, "train", 0))
        else:
            for detail in everything(subject):
                view.example(detail)
        return file.getvalue()

    return go


def hostile():
    return [{"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]}]


def test_without_colours_marks_stand_around_what_is_trained_on(shown):
    text = shown(ROWS[:1])
    assert "<|im_start|>assistant\n[[It says 9.<|im_end|>]]\n" in text
    assert "\x1b" not in text and text.count("[[") == 1


def test_another_weight_than_one_is_written_in_the_mark(shown):
    text = shown(ROWS[3:4])
    assert "[[0.1|<think>hm</think>\nfirst<|im_end|>]]" in text and "[[3|<think>so</think>" in text
    assert "assistant turn 0 · " in text and "per-turn" in text


def test_a_row_that_cannot_be_used_is_shown_with_its_problem(shown):
    assert "train.jsonl:2 · set train · row 2\nproblem: is not valid JSON (Expecting value at column 15)" in shown(
        [ROWS[0], ROWS[2]]
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_content_never_acts_on_a_terminal(shown, packed, ids):
    coloured, plain = shown(hostile(), Terminal(), packed, ids=ids), shown(hostile(), packed=packed, ids=ids)
    own = re.compile(r"\x1b\[[0-9;]*m")
    assert own.search(coloured)
    for text in (own.sub("", coloured), plain):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
        if not ids:
            assert r"[bold]x[/bold] [red] :smile: [link=http://x]y[/link] \x1b[31m\x1b]0;title\x07 \u202e" in text


def test_colours_are_those_of_the_weight(shown):
    text = shown(ROWS[:1] + ROWS[3:4], Terminal())
    for style, content in (("32", "It says 9."), ("33", "first"), ("35", "second"), ("2", "What says the fox?")):
        assert re.search(rf"\x1b\[{style}m[^\x1b]*{re.escape(content)}", text), (style, content)
    assert "[[" not in text
    assert [weight_class(weight) for weight in (0, 0.5, 1, 2)] == ["none", "less", "one", "more"]


def test_no_color_gives_marks_on_a_terminal_too(shown, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(ROWS[:1], Terminal())
    assert "[[It says 9." in text and not re.search(r"\x1b\[3\dm", text)


def test_white_space_can_be_seen(shown):
    assert "[[It·says·9.<|im_end|>]]↵\n" in shown(ROWS[:1], whitespace=True)


def test_ids_are_shown_with_what_is_predicted(shown, inspected, written):
    subject = inspected(written(ROWS[:1]))
    segment = read_row(subject.data.train, "train", 0).segments[0]
    lines = shown(ROWS[:1], packed=True, ids=True).splitlines()
    table = [line.split() for line in lines if re.match(r" +\d+ +\d+ +\d+ +[01] ", line)]
    assert [[int(value) for value in line[:3]] for line in table] == [
        [at, *pair] for at, pair in enumerate(zip(segment.tokens.tolist(), segment.targets.tolist(), strict=True))
    ]
    assert [line[-2:] == ["not", "trained"] for line in table] == (segment.weights == 0).tolist()
    example = shown(ROWS[:1], ids=True).splitlines()
    assert sum(bool(re.match(r" +\d+ +\d+ +[01]  ", line)) for line in example) == len(segment.ids)


def test_a_packed_row_names_its_documents_and_padding(shown):
    text = shown(ROWS[:1], packed=True)
    assert re.search(r"packed row 1 of 1 of train · 1 document\(s\) · (\d+) of 128 positions used", text)
    used = int(re.search(r"(\d+) of 128", text).group(1))
    assert f"── document 1 · positions 0 to {used - 1} · " in text and f"── padding · {128 - used} positions" in text
