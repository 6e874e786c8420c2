"""Weights of parts of messages, of segments of texts and of tokens, against characters that are looked up one by one."""

import numpy as np
import pytest
from chat_cases import shared_tokenizer, template_classes_script
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.data.chats.chat import RowBuilder
from sft_jax.data.chats.templates import TEMPLATES, ChatTemplate
from sft_jax.data.examples import BadRow
from sft_jax.data.formats.conversation import Conversation, Message, Piece


@pytest.fixture(scope="module")
def chatml(qwen):
    return RowBuilder(qwen, ChatTemplate(TEMPLATES["chatml"], qwen.special_tokens))


def message(role, *parts, **fields):
    """Parts are texts, or (text, weight)."""
    text, pieces = "", []
    for part in parts:
        part, weight = part if isinstance(part, tuple) else (part, None)
        if weight is not None:
            pieces.append(Piece(len(text), len(text) + len(part), weight))
        text += part
    return Message(role, text, pieces=tuple(pieces), **fields)


def expected_weights(tokenizer, ids, weights_of_characters):
    """Each token has the weight of the character at which it begins."""
    lengths = [len(tokenizer.decode(ids[:count].tolist())) for count in range(len(ids) + 1)]
    return [weights_of_characters[start] for start in lengths[:-1]]


def by_hand(qwen, messages, base):
    """The render of ChatML by hand with a weight for each character."""
    text, weights = "", []
    for each, usual in zip(messages, base, strict=True):
        header, ends = f"<|im_start|>{each.role}\n", "<|im_end|>"
        own = [usual] * len(each.content)
        for start, end, weight in each.pieces:
            own[start:end] = [weight] * (end - start)
        answers = each.role == "assistant"
        weights += [0] * len(header) + own + [usual if answers or any(own) else 0] * len(ends) + [0]
        text += header + each.content + ends + "\n"
    return text, weights


@pytest.mark.parametrize(
    ("messages", "base"),
    [
        ((Message("user", "Say 12."), message("assistant", "The answer", (" is twelve", 0.0), (", sir", 0.25), ".")), (0, 1)),
        ((Message("user", "Say 12."), message("assistant", ("Well, ", 0.0), "twelve.", weight=0.5)), (0, 0.5)),
        ((message("user", "Say ", ("twelve", 2.0), "."), Message("assistant", "Twelve.")), (0, 1)),
        ((Message("user", "a"), message("assistant", ("no. ", 0.0), ("yes.", 1.0), weight=0.0), Message("user", "b"), Message("assistant", "c")), (0, 0, 0, 1)),
    ],
)
def test_parts_of_messages(qwen, chatml, messages, base):
    (row,) = chatml.build([Conversation(messages=messages)])
    (example,) = row.examples
    text, weights = by_hand(qwen, messages, base)
    assert qwen.decode(example.ids.tolist()) == text
    assert example.weights.tolist() == pytest.approx(expected_weights(qwen, example.ids, weights))
    assert row.counts["weighted_parts"] == sum(len(each.pieces) for each in messages)


words = st.lists(st.tuples(st.sampled_from(["one ", "two", " <b>", "\n", "é", "12", "."]), st.sampled_from([None, 0.0, 0.5, 1.0])), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(parts=words, weight=st.sampled_from([None, 0.25]))
def test_any_parts(qwen, chatml, parts, weight):
    answer = message("assistant", "So: ", *parts, "end", weight=weight)
    usual = 1.0 if weight is None else weight
    messages = (Message("user", "Go."), answer)
    (row,) = chatml.build([Conversation(messages=messages)])
    text, weights = by_hand(qwen, messages, (0, usual))
    (example,) = row.examples
    assert qwen.decode(example.ids.tolist()) == text
    assert example.weights.tolist() == pytest.approx(expected_weights(qwen, example.ids, weights))


def test_white_space_that_the_template_takes_away_weighs_nothing(qwen):
    """A newline at the beginning of the content is not the newline at the end of the header."""
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    builder = RowBuilder(qwen, ChatTemplate(source, qwen.special_tokens))
    (row,) = builder.build([Conversation(messages=(Message("user", "a"), message("assistant", ("\nb", 0.5), "c\n")))])
    (example,) = row.examples
    assert qwen.decode(example.ids[example.weights > 0].tolist()) == "bc<|im_end|>"


def test_parts_where_the_turn_is_an_example_of_its_own(assets):
    """Under Qwen 3's template an earlier thought is dropped, so its turn is apart; the thought is a part."""
    script = template_classes_script()
    tokenizer = shared_tokenizer(assets / "tokenizers" / "qwen3")
    template = ChatTemplate(script.stock_templates(assets)["Qwen-Qwen3-0.6B"], tokenizer.special_tokens)
    answer = message("assistant", ("<think>\nHm.\n</think>\n\n", 0.0), "Yes", (" no", 0.5))
    messages = (Message("user", "a"), answer, Message("user", "b"), Message("assistant", "<think>\nSo.\n</think>\n\nc"))
    (row,) = RowBuilder(tokenizer, template).build([Conversation(messages=messages)])
    assert row.kind == "per_turn"
    first = row.examples[0]
    for weight, text in ((1.0, "Yes<|im_end|>"), (0.5, " no")):
        assert tokenizer.decode(first.ids[first.weights == weight].tolist()) == text


def test_control_tokens_in_a_weighted_part(qwen, chatml):
    answer = message("assistant", ("x<|im_end|>y", 0.0), " z", (" w", 0.5))
    (row,) = chatml.build([Conversation(messages=(Message("user", "a"), answer))])
    (example,) = row.examples
    assert row.counts["guarded"] == 1
    assert qwen.decode(example.ids[example.weights == 1].tolist()) == " z<|im_end|>"
    assert qwen.decode(example.ids[example.weights == 0.5].tolist()) == " w"


def test_parts_that_the_template_changes_are_refused(qwen):
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    builder = RowBuilder(qwen, ChatTemplate(source, qwen.special_tokens), supervise="all")
    (row,) = builder.build([Conversation(messages=(Message("user", "a"), message("assistant", "b", ("c", 0.0))))])
    assert isinstance(row, BadRow) and "so its parts cannot have weights" in row.reason


def test_segments(qwen):
    text = "2+2=4\n3+3=6"
    pieces = (Piece(0, 4, 0.0), Piece(4, 6, 1.0), Piece(6, 10, 0.0), Piece(10, 11, 0.5))
    (row,) = RowBuilder(qwen, None).build([Conversation(text=text, pieces=pieces)])
    (example,) = row.examples
    characters = [0] * 4 + [1] * 2 + [0] * 4 + [0.5]
    assert example.ids[-1] == qwen.eos_id and example.weights[-1] == 0.5
    assert example.weights[:-1].tolist() == expected_weights(qwen, example.ids[:-1], characters)


def test_tokens_are_taken_as_they_are(qwen):
    ids, weights = np.array([5, 0, 7, qwen.eos_id], np.int32), np.array([1, 0.5, 0, 2], np.float32)
    given, large, none = RowBuilder(qwen, None).build([
        Conversation(ids=ids, weights=weights), Conversation(ids=ids + qwen.vocab_size, weights=weights), Conversation(ids=ids, weights=0 * weights),
    ])  # fmt: skip
    (example,) = given.examples
    assert example.ids.tolist() == ids.tolist() and example.weights.tolist() == [0, 0.5, 0, 2]
    assert weights[0] == 1, "the row is not changed"
    assert large.reason.startswith(f"token id {int(ids.max()) + qwen.vocab_size} is none of the tokenizer's")
    assert none.reason.startswith("no token of it is supervised")
