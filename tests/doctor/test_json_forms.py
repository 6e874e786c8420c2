"""Which answers are JSON, and in which form."""

import pytest
from doctor_data import chat, pair

from sft_jax.doctor.json_forms import json_form, json_forms


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (' {"a": [1, null]}\n', "object"), ("[]", "object"), ('```json\n{"a": 1}\n```', "fenced"), ("```\n[1]\n```", "fenced"),
        ("~~~JSON\n{}\n~~~", "fenced"), ('"yes"', "value"), ("42", "value"), ("true", "value"), ("null", "value"), ("", ""), (" \n", ""),
        ("yes", "none"), ('{"a": NaN}', "none"), ("[-Infinity]", "none"), ('{"a": 1', "none"), ('{"a": 1} and more', "none"),
        ('```json\n{"a": \n```', "none"), ('```json\n{"a": 1}', "none"), ("{'a': 1}", "none"), ("[" * 100_000, "none"),
    ],
)  # fmt: skip
def test_forms(answer, form):
    assert json_form(answer) == form and json_forms(pair(answer)) == (form, "")


def test_the_worst_of_earlier_answers_counts():
    user, bad, good = ("user", "And?"), ("assistant", "Well,"), ("assistant", "{}")
    assert json_forms(chat(user, good, user, bad, user, good, user, good)) == ("object", "none")
    assert json_forms(chat(user, good, user, bad)) == ("none", "object")
