"""Filters: each against a comprehension over all examples; what names nothing is refused with the whole message."""

import pytest
from inspected_rows import PLAIN, ROWS, everything, write

from sft_jax.errors import UserError
from sft_jax.inspection.filters import Filters, Selection


@pytest.fixture(scope="module")
def subject(inspected, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    train = {"chats": write(folder / "chats.jsonl", ROWS), "pairs": {"path": write(folder / "pairs.jsonl", PLAIN)}}
    return inspected(train, max_length=40, overlength="truncate_right")


@pytest.fixture(scope="module")
def details(subject):
    return everything(subject)


CASES = [
    (Filters(), lambda d: True),
    (Filters(set="pairs"), lambda d: d.set == "pairs"),
    (Filters(row="4"), lambda d: d.row == 4),
    (Filters(set="chats", row="4"), lambda d: d.set == "chats" and d.row == 4),
    (Filters(row="pairs.jsonl:4"), lambda d: d.set == "pairs" and d.line == 4),
    (Filters(cut=True), lambda d: len(d.ids) > 41 or d.kind == "cut"),
    (Filters(zero_weight=True), lambda d: not d.trained),
    (Filters(problems=True), lambda d: bool(d.problem)),
    (Filters(search="FOX 1"), lambda d: "fox 1" in d.text.lower()),
    (Filters(search="not valid json"), lambda d: d.line == 3 and d.set == "chats"),
    (Filters(regex="fox 1[01]?[?]"), lambda d: any(f"fox {i}?" in d.text for i in (1, 10, 11))),
    (Filters(set="pairs", cut=True, search="fox 3"), lambda d: len(d.ids) > 41 and "fox 3" in d.text),
]


@pytest.mark.parametrize(("filters", "fits"), CASES, ids=[case[0].describe() or "none" for case in CASES])
def test_a_filter_lets_through_what_it_says(subject, details, filters, fits):
    def names(details):
        return [(d.set, d.line, d.turn) for d in details]

    selection = Selection(subject, filters)
    expected = names(d for d in details if fits(d))
    assert names(selection.take()) == expected and expected
    assert selection.matched == len(expected)
    if not (filters.set or filters.row):
        assert selection.of == len(details)


def test_the_longest_come_longest_first_after_the_other_filters(subject, details):
    selection = Selection(subject, Filters(set="pairs", longest=3))
    lengths = sorted((len(d.ids) for d in details if d.set == "pairs"), reverse=True)
    assert [len(d.ids) for d in selection.take()] == lengths[:3]
    assert (selection.matched, selection.of) == (12, 12)


@pytest.mark.parametrize("filters", [Filters(), Filters(set="pairs"), Filters(row="4"), Filters(cut=True), Filters(longest=9)])
def test_a_limit_changes_what_is_built_and_not_what_is_counted(subject, filters):
    whole = Selection(subject, filters)
    found = [d.where for d in whole.take()]
    for limit in (1, 3, 1000):
        part = Selection(subject, filters)
        assert [d.where for d in part.take(limit)] == found[:limit]
        assert (part.matched, part.of) == (whole.matched, whole.of)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"set": "pair"}, "--set: there is no data set 'pair'; did you mean 'pairs'? Known: chats, pairs."),
        ({"row": "x"}, "--row: 'x' is neither the number of a row nor file:line; write --row=17 or --row=train.jsonl:17."),
        ({"row": "13"}, "--row: there is no row 13; rows are numbered from 1 to 12."),
        ({"row": "0", "set": "chats"}, "--row: there is no row 0; rows are numbered from 1 to 5."),
        ({"row": "pairs.jsonl:99"}, "--row: no row begins at line 99 of pairs.jsonl."),
        (
            {"row": "parts.jsonl:1"},
            "--row: no data set has a file 'parts.jsonl'; did you mean 'pairs.jsonl'? Known: chats.jsonl, pairs.jsonl.",
        ),
        ({"search": "a", "regex": "b"}, "--search, --regex: only one of them; --regex 'one|two' finds either of two texts."),
        (
            {"regex": "("},
            "--regex: '(' is no regular expression (missing ), unterminated subpattern at position 0); --search finds plain "
            "text.",
        ),
    ],
)
def test_a_filter_that_names_nothing_is_refused(subject, filters, message):
    with pytest.raises(UserError) as error:
        Selection(subject, Filters(**filters))
    assert str(error.value) == message
