"""Every policy against a plain reading of what it promises, with its counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_data import Plain, examples, make_corpus, make_stream

from sft_jax.data.packing.overlength import OVERLENGTH, apply_overlength, supervised_targets, target_weights
from sft_jax.data.stores.store import ROLES
from sft_jax.errors import UserError

SYSTEM, USER, ASSISTANT, TOOL = (ROLES.index(name) for name in ("system", "user", "assistant", "tool"))


def tokens_of(corpus, documents, index) -> tuple[list[int], list[float]]:
    base = corpus.offsets[documents.example[index]]
    ids, weights = [], []
    for a, b in ((0, documents.head[index]), (documents.start[index], documents.stop[index])):
        if a < b:
            ids += corpus.read_ids(np.array([base + a]), np.array([base + b])).tolist()
            weights += corpus.read_weights(np.array([base + a]), np.array([base + b])).tolist()
    return ids, weights


def apply(plain, policy, max_length):
    corpus = make_corpus(plain)
    documents, counts = apply_overlength(corpus, 0, policy, max_length)
    pieces = {}
    for index in range(len(documents)):
        pieces.setdefault(int(documents.example[index]), []).append(tokens_of(corpus, documents, index))
    return pieces, counts


def all_pieces(example: Plain, policy: str, max_length: int) -> list[tuple[list[int], list[float]]]:
    """What a policy leaves of an example, before pieces without supervised tokens are left out."""
    n, limit = len(example.ids), max_length + 1
    whole = (example.ids, example.weights)
    if n <= limit:
        return [whole]
    return {
        "drop": [],
        "truncate_left": [tuple(part[n - limit :] for part in whole)],
        "truncate_right": [tuple(part[:limit] for part in whole)],
        "split": [tuple(part[i : i + limit] for part in whole) for i in range(0, n - 1, max_length)],
    }[policy]


@given(st.lists(examples(max_tokens=20), min_size=1, max_size=8), st.integers(2, 10))
@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("policy", ["drop", "truncate_left", "truncate_right", "split"])
def test_policies_against_slices(policy, plain, max_length):
    pieces, counts = apply(plain, policy, max_length)
    every = {index: all_pieces(example, policy, max_length) for index, example in enumerate(plain)}
    expected = {index: [piece for piece in parts if any(piece[1][1:])] for index, parts in every.items()}
    assert pieces == {index: parts for index, parts in expected.items() if parts}

    too_long = [index for index, example in enumerate(plain) if len(example.ids) - 1 > max_length]
    parts = {index: expected[index] for index in too_long}
    assert counts.over_length == len(too_long)
    assert counts.unsupervised_pieces == sum(len(every[index]) - len(expected[index]) for index in too_long)
    assert counts.dropped == sum(not part for part in parts.values())
    assert counts.split == sum(len(part) > 1 for part in parts.values())
    assert counts.cut == sum(len(part) == 1 for part in parts.values())
    targets = lambda piece: sum(w > 0 for w in piece[1][1:])  # noqa: E731
    before = sum(targets((plain[index].ids, plain[index].weights)) for index in too_long)
    assert counts.supervised_tokens_lost == before - sum(targets(p) for part in parts.values() for p in part)
    positions = sum(len(plain[index].ids) - 1 for index in too_long)
    assert counts.tokens_lost == positions - sum(len(p[0]) - 1 for part in parts.values() for p in part)


@given(st.lists(examples(max_tokens=20), min_size=1, max_size=8), st.integers(2, 10))
@settings(deadline=None, max_examples=40)
def test_split_keeps_every_supervised_target_exactly_once(plain, max_length):
    pieces, counts = apply(plain, "split", max_length)
    assert counts.supervised_tokens_lost == 0
    for index, example in enumerate(plain):
        wanted = [(i, w) for i, w in zip(example.ids[1:], example.weights[1:], strict=True) if w > 0]
        got = [(i, w) for ids, weights in pieces[index] for i, w in zip(ids[1:], weights[1:], strict=True) if w > 0]
        assert got == wanted


def chat(*messages: tuple[int, int], prefix: int = 1) -> Plain:
    """An example of (role, tokens) messages behind `prefix` tokens; assistant tokens are supervised. Ids count up."""
    weights, starts = [0.0] * prefix, []
    for role, count in messages:
        starts.append(len(weights))
        weights += [float(role == ASSISTANT)] * count
    return Plain(list(range(len(weights))), weights, -1, tuple(starts), tuple(role for role, _ in messages))


CONVERSATION = chat(
    (SYSTEM, 2), (USER, 3), (ASSISTANT, 3), (USER, 2), (TOOL, 1), (ASSISTANT, 2), (USER, 2), (ASSISTANT, 2)
)
# prefix 0; system 1-2; user 3-5; assistant 6-8; user 9-10; tool 11; assistant 12-13; user 14-15; assistant 16-17


@pytest.mark.parametrize(
    ("max_length", "kept"),
    [
        (17, list(range(18))),  # fits
        (16, [0, 1, 2, *range(9, 18)]),  # the first exchange goes, the system message stays
        (11, [0, 1, 2, *range(9, 18)]),
        (10, [0, 1, 2, *range(14, 18)]),  # the second goes whole, its tool result too
        (6, [0, 1, 2, *range(14, 18)]),
        (5, None),  # not even the last exchange fits
    ],
)
def test_keep_last_turns(max_length, kept):
    pieces, counts = apply([CONVERSATION], "keep_last_turns", max_length)
    if kept is None:
        assert pieces == {} and counts.dropped == 1 and counts.supervised_tokens_lost == 7
        return
    assert pieces[0] == [(kept, [CONVERSATION.weights[i] for i in kept])]
    assert counts.supervised_tokens_lost == 7 - sum(CONVERSATION.weights[i] > 0 for i in kept)


def test_keep_last_turns_without_a_system_message_keeps_what_stands_before_the_first_message():
    plain = chat((USER, 4), (ASSISTANT, 2), (USER, 2), (ASSISTANT, 2))
    assert apply([plain], "keep_last_turns", 5)[0][0][0][0] == [0, 7, 8, 9, 10]
    plain = chat((USER, 4), (ASSISTANT, 2), (USER, 2), (ASSISTANT, 2), prefix=0)
    assert apply([plain], "keep_last_turns", 5)[0][0][0][0] == [6, 7, 8, 9]


def test_keep_last_turns_never_begins_with_an_answer_and_drops_what_has_no_messages():
    answers = chat((USER, 4), (ASSISTANT, 2), (ASSISTANT, 2))
    text = Plain(list(range(9)), [1.0] * 9)
    pieces, counts = apply([answers, text], "keep_last_turns", 5)
    assert pieces == {} and counts.dropped == 2 and counts.supervised_tokens_lost == 4 + 8


def test_a_cut_row_gets_no_invented_end():
    end_of_sequence = 999
    plain = Plain([*range(10), end_of_sequence], [1.0] * 11)
    for policy, ends in (("truncate_right", False), ("truncate_left", True)):
        (ids, _), *_ = apply([plain], policy, 5)[0][0]
        assert (ids[-1] == end_of_sequence) == ends and ids.count(end_of_sequence) == int(ends)
    ends = [ids[-1] == end_of_sequence for ids, _ in apply([plain], "split", 5)[0][0]]
    assert ends == [False] * (len(ends) - 1) + [True]


def test_a_row_left_without_supervised_tokens_is_counted_and_left_out():
    question = Plain(list(range(8)), [0] * 6 + [1, 1])
    pieces, counts = apply([question], "truncate_right", 4)
    assert pieces == {}
    assert (counts.dropped, counts.unsupervised_pieces, counts.supervised_tokens_lost) == (1, 1, 2)


def test_error_names_rows_lengths_count_and_remedies():
    plain = [Plain([1, 2], [0, 1])] + [Plain([0] * n, [1] * n) for n in (7, 8, 9, 10, 11, 12, 13)]
    with pytest.raises(UserError) as caught:
        apply(plain, "error", 4)
    message = str(caught.value)
    assert "set_0" in message and "7 example(s)" in message and "data.max_length 4" in message
    assert "rows.jsonl:2 (7 tokens)" in message and "rows.jsonl:6 (11 tokens)" in message and "and 2 more" in message
    assert "rows.jsonl:7" not in message
    assert "set data.max_length to 12 or more" in message
    for policy in set(OVERLENGTH) - {"error"}:
        assert policy in message
    assert len(apply(plain, "error", 12)[0]) == 8  # the remedy is exact
    with pytest.raises(UserError):
        apply(plain, "error", 11)


@pytest.mark.parametrize("policy", OVERLENGTH)
def test_every_policy_leaves_fitting_examples_alone_and_overflows_nothing(policy):
    fitting = [CONVERSATION, chat((USER, 2), (ASSISTANT, 3))]
    pieces, counts = apply(fitting, policy, 17)
    assert pieces == {i: [(e.ids, e.weights)] for i, e in enumerate(fitting)} and counts.over_length == 0
    if policy != "error":
        pieces, counts = apply(fitting, policy, 8)
        assert counts.over_length == 1 and all(len(ids) - 1 <= 8 for parts in pieces.values() for ids, _ in parts)
        assert pieces[1] == [(fitting[1].ids, fitting[1].weights)]


@given(st.lists(examples(), min_size=1, max_size=6), st.integers(2, 6))
@settings(deadline=None, max_examples=30)
def test_target_totals_of_documents(plain, max_length):
    corpus = make_corpus(plain)
    documents, _ = apply_overlength(corpus, 0, "split", max_length)
    weights = [tokens_of(corpus, documents, i)[1][1:] for i in range(len(documents))]
    assert supervised_targets(corpus, documents).tolist() == [sum(w > 0 for w in part) for part in weights]
    assert np.allclose(target_weights(corpus, documents), [sum(part) for part in weights])


def test_totals_of_a_document_with_a_head():
    weights = list(CONVERSATION.weights)
    weights[1] = weights[14] = 1.0  # in the system message; the first token behind the gap, a target of the head's last
    corpus = make_corpus([CONVERSATION._replace(weights=weights)])
    documents, _ = apply_overlength(corpus, 0, "keep_last_turns", 8)
    assert supervised_targets(corpus, documents).tolist() == [4]
    stream = make_stream([CONVERSATION._replace(weights=weights)], max_length=8, overlength="keep_last_turns")
    assert stream.read(0, 1).weights[0].tolist() == [1, 0, 1, 0, 1, 1, 0, 0]
    assert stream.read(0, 1).targets[0].tolist() == [1, 2, 14, 15, 16, 17, 0, 0]
