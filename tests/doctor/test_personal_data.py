"""Personal data are found by their patterns and never shown in full."""

import pytest
from doctor_data import sentence
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.doctor.personal_data import find_personal_data, luhn, mask, snippet

KEY = "ghp_" + "a1B2c3D4e5F6g7H8i9J0" + "k1L2m3N4o5P6q7R8"
PLANTED = [
    ("e-mail address", "jane.doe+x@mail.example.org", "j***@***.org"),
    ("API key", "AKIA" + "IOSFODNN7EXAMPL1", "AKIA... (20 characters)"),
    ("API key", KEY, "ghp_... (40 characters)"),
    ("API key", "sk-proj-" + "Ab1" * 15, "sk-p... (53 characters)"),
    ("API key", "xoxb-" + "123456789012-abcdef", "xoxb... (24 characters)"),
    ("card number", "4111 1111 1111 1111", "...1111"),
    ("card number", "378282246310005", "...0005"),
    ("card number", "5555-5555-5555-4444", "...4444"),
    ("IBAN", "GB82 WEST 1234 5698 7654 32", "...4 32"),
    ("IBAN", "DE89370400440532013000", "...3000"),
    ("private key", "-----BEGIN RSA PRIVATE KEY-----\nMIIEabc/def+\n", "-----BEGIN ... PRIVATE KEY-----"),
]


@pytest.mark.parametrize(("kind", "text", "shown"), PLANTED)
def test_personal_data_are_found_and_masked(kind, text, shown):
    whole = f"Write to {text}, please."
    assert find_personal_data(whole) == [(kind, shown)]
    assert text.strip() not in mask(whole) and shown in mask(whole)
    assert text.strip() not in snippet(whole, 200)


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112", "1234567812345670", "0000 0000 0000 0000",
        "git clone git@github.com:someone/project.git", "@someone on the web",
        "a@b", "3.141592653589793238", "1 2 3 4 5 6 7 8 9 10 11 12 13", "GB82 WEST 1234 5698 7654 33",
        "sk-learn-like-package-names-are-fine",
        "The AKIA is a dog.", "5 * 4111111111111111 = x", "the -----BEGIN CERTIFICATE----- line", "phone 555 0100", "x = y@z.T",
    ],
)  # fmt: skip
def test_look_alikes_are_none(text):
    assert find_personal_data(text) == [] and mask(text) == text


def test_a_key_at_the_edge_of_what_is_shown_is_masked():
    text = "a " * 990 + KEY + " " + sentence(1)
    for end in (False, True):
        assert KEY[4:12] not in snippet(text, 3000, end=end) and KEY[4:12] not in snippet(
            text[: -len(sentence(1)) - 1], 3000, end=end
        )


@given(st.integers(0, 10**15 - 1), st.data())
def test_luhn_takes_one_check_digit_and_notices_a_wrong_digit(number, data):
    checked = [digit for digit in "0123456789" if luhn(f"{number}{digit}")]
    assert len(checked) == 1
    whole = f"{number}{checked[0]}"
    place = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.sampled_from([digit for digit in "0123456789" if digit != whole[place]]))
    assert not luhn(whole[:place] + other + whole[place + 1 :])
