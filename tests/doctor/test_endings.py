"""Answers that end too early are found, whole ones are not."""

import pytest
from doctor_data import chat, pair

from sft_jax.doctor.endings import cut_answer, open_ending

LONG = "This is a first sentence that is long enough to be one. "


@pytest.mark.parametrize(
    "answer",
    [
        LONG + "And then the man went to the shop at the corner to buy some",
        LONG + "There are many kinds of these, for example apples, pears,",
        LONG + "It was in those days that he had met the",
        "The first line of this answer is a whole sentence of prose.\n\n"
        "The second one stops right in the middle because tokens",
        "这是第一句话，它说明了很多事情。然后第二句话还没有说完就在这里突然中断了因为长度",
        "The new museum has two large halls, of which it covered most of",
        "After such an operation a patient should go home and rest for at least two",
        "The cathedral in the old part of the town is visited every year by",
        "1. **Water**: it is taken up by the roots of the plant and brought into",
    ],
)
def test_cut_answers_are_found(answer):
    (detail,) = cut_answer(pair(answer))
    assert detail.startswith('ends with "')


@pytest.mark.parametrize(
    "answer",
    [
        LONG + "And this is the end of it.",
        LONG + "“That is what he said to all of them on that day.”",
        LONG + "Good luck with everything that you will do from now on 🎉",
        "Here is a list of all the things that you will need:\n\n"
        "- a large bowl that holds all of the flour you have\n- a spoon with a long handle for the hot soup",
        "1. Open the door with the key that you were given before\n2. Close the door with the key that you were given after",
        "Here is the code that you asked for, as a function in Python:\n\n```python\nreturn the value of all\n```",
        "function add(first, second, third, fourth, fifth) {\n  return first + second + third + fourth + fifth;\n}",
        LONG + "The answer is therefore option C",
        LONG + "You will find all about it at the address https://example.org/a/long/path",
        LONG + "\n\nYours sincerely,\nJohn Smith",
        "Shall I compare thee to a summer's day that was\nThou art more lovely and more temperate than all the\n"
        "rough winds do shake the darling buds of May",
        "Two roads diverged in a yellow wood and I was sorry\nThat I could not travel both and be one traveller long\n"
        "I stood and looked down one as far as I could",
        '"Friendship is born at that moment when one man says to another: What! You too?" - C. S. Lewis',
        LONG + "We love our dog more than anything else in the world #PuppyLove",
        "#### 72",
        "positive",
        "这是第一句话，它说明了很多事情。这是第二句话，它也已经说完了。",
        LONG + "So 3 * 4 + 5 * 6 is, as we said above, 42",
        '{"name": "a long value in JSON that is more than eight words long"}',
        "The city that most of its visitors come to see in summer is Portland, OR",
        "for (name of the first; of the second; of the third) print all of",
        "<think>Let me see.</think>It is blue.",
        "There are many of them, so what city are you looking for",
    ],
)
def test_whole_answers_are_not_cut(answer):
    assert cut_answer(pair(answer)) == []


def test_every_answer_of_a_chat_is_looked_at():
    user, whole = ("user", "Why is that?"), ("assistant", "Because it is so.")
    texts = chat(user, ("assistant", "There are many kinds of these, for example apples, pears,"), user, whole)
    assert cut_answer(texts) == ['answer 1 of 2 ends with "There are many kinds of these, for example apples, pears,"']
    spoken = LONG + "And it is near the shop at the corner"  # people leave out full stops in the middle of a talk
    assert cut_answer(chat(user, ("assistant", spoken), user, whole)) == [] != cut_answer(pair(spoken))


def test_thinking_that_does_not_end_is_cut():
    assert cut_answer(pair("<think>\nFirst I look at")) == ["begins to think and does not end it"]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Photosynthesis is the process by which green plants use sunlight to make", True),
        ("Photosynthesis is the process by which green plants use sunlight to make sugar.", False),
        ("Green plants do.", None),  # too short to tell
        ("- the process by which green plants use sunlight to make sugar", None),
        ("def f(a, b): return a * b + a * b + a * b if a else b", None),
        ("It was in those days that he had met all of the", None),  # is told as cut
    ],
)
def test_open_endings(answer, found):
    assert open_ending(pair(answer)) is found
