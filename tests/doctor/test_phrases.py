"""Refusals and stock phrases are found, what only sounds like them is not."""

import pytest
from doctor_data import pair

from sft_jax.doctor.phrases import boilerplate, refusal


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot assist with this request.",
        "I apologize, but I am unable to provide that information.",
        "Sorry, I can't comply with that.",
        "I cannot fulfill your request.",
        "I can't help with that.",
        "I'm sorry, but I'm unable to perform external tasks.",
        "I won't assist with this.",
        "I’m not able to help.",
        "I'm sorry, but as an AI, I don't have the capability to order a pizza.",
        "Unfortunately, I can't provide medical advice.",
        "很抱歉，我无法提供这样的信息。",
        "I can't do that.",
        "I cannot answer that.",
        "I'm unable to answer this.",
        "I must respectfully decline.",
        "I don't feel comfortable helping with something like this.",
    ],
)
def test_refusals_are_found(answer):
    assert refusal(pair(answer))


@pytest.mark.parametrize(
    "answer",
    [
        "I can't make it to the party, he said.",
        "I'm sorry to hear that. Try to restart the router first.",
        "Sorry for the delay! The parcel left yesterday.",
        'He answered: "I cannot help you with that", and left.',
        "I cannot recommend this book enough.",
        "Unfortunately, the train was late and I missed the meeting.",
        "I'm sorry that I forgot your birthday; I can give you the present today.",
        "You can't divide by zero.",
        "I can't do that trick yet, but I am learning it.",
        "I don't feel comfortable in this chair.",
        "I must say that I liked it.",
        "I apologize, but I could not book the restaurant. Could I assist you with anything else?",
    ],
)
def test_what_only_sounds_like_a_refusal_is_none(answer):
    assert refusal(pair(answer)) == []


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I have no feelings.",
        "Well, as an AI, I do not eat.",
        "I am an AI language model.",
        "作为一个AI语言模型，我没有感情。",
        "Stir it for ten minutes. I hope this helps!",
        "It is the second one.\n\nLet me know if you have any other questions!",
    ],
)
def test_boilerplate_is_found(answer):
    assert boilerplate(pair(answer))


@pytest.mark.parametrize(
    "answer",
    [
        "A language model predicts the next word.", "She works as an AI researcher.", "GPT-2 is used as a language model here.",
        "Dear Ann,\nlet me know if you need a lift.\nYours, Tom", "Let me know if it rains.", "I hope that it helps him.",
    ],
)  # fmt: skip
def test_talk_about_models_is_no_boilerplate(answer):
    assert boilerplate(pair(answer)) == []
