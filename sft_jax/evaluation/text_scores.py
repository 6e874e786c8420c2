"""Comparisons of two texts."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from sft_jax.errors import UserError
from sft_jax.evaluation.scoring import Answer, Scorer, mean_of

_ARTICLES = frozenset(("a", "an", "the"))
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d))?%?|[-+]?\.\d+%?")


def exact_match(generation: str, reference: str) -> bool:
    """Returns whether the texts are equal but for white space at their ends.

    >>> exact_match(" Paris", "Paris\\n"), exact_match("paris", "Paris")
    (True, False)
    """
    return generation.strip() == reference.strip()


def normalised(text: str) -> str:
    """Returns a text without case, punctuation, English articles and differences of white space, as SQuAD compares answers.

    Rajpurkar et al. 2016, arXiv:1606.05250. Punctuation is that of ASCII, in which SQuAD counts signs such as $ and +, and of Unicode;
    compatible characters are one (NFKC).

    >>> normalised("The  answer: Paris!"), normalised("$5 + tax")
    ('answer paris', '5 tax')
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(char for char in text if char not in string.punctuation and not unicodedata.category(char).startswith("P"))
    return " ".join(word for word in text.split() if word not in _ARTICLES)


def normalised_match(generation: str, reference: str) -> bool:
    """Returns whether the texts are equal once both are `normalised`."""
    return normalised(generation) == normalised(reference)


def contains(generation: str, reference: str) -> bool:
    """Returns whether the reference, without white space at its ends, is somewhere in the generation.

    >>> contains("It is Paris.", "Paris "), contains("It is paris.", "Paris")
    (True, False)
    """
    return reference.strip() in generation


def token_f1(generation: str, reference: str) -> float:
    """Returns the F1 of the words of the `normalised` texts as multisets (SQuAD); two texts without words are equal.

    >>> token_f1("the cat sat", "a cat sat down")
    0.8
    """
    return _f1(normalised(generation).split(), normalised(reference).split(), _common)


def rouge_l(generation: str, reference: str) -> float:
    """Returns ROUGE-L: the F1 of the longest common subsequence of words (Lin 2004), without case and punctuation.

    >>> round(rouge_l("the cat is on the mat", "the cat sat on a mat"), 3)
    0.667
    """
    words = lambda text: _WORD.findall(text.casefold())  # noqa: E731
    return _f1(words(generation), words(reference), longest_common_subsequence)


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    return (Counter(first) & Counter(second)).total()


def _f1(generated: Sequence[str], expected: Sequence[str], common: Callable[[Sequence[str], Sequence[str]], int]) -> float:
    if not generated or not expected:
        return float(not generated and not expected)
    return 2 * common(generated, expected) / (len(generated) + len(expected))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence, in time that grows with the product of the lengths."""
    lengths = [0] * (len(second) + 1)  # of the part of `first` so far and each beginning of `second`
    for item in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if item == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]


def last_number(text: str) -> Fraction | None:
    """Returns the last number in a text, exactly; None where there is none.

    Commas between thousands, a sign, an exponent and a percent sign are understood, units and what else is around it are
    left out; a hyphen behind a word or a number is no sign.

    >>> last_number("16 - 3 = 13, so she makes $1,234.50 a day."), last_number("none")
    (Fraction(2469, 2), None)
    """
    found = None
    for found in _NUMBER.finditer(text):
        pass
    if found is None:
        return None
    digits = found.group().rstrip("%").replace(",", "")
    if digits[0] in "+-" and found.start() and (text[found.start() - 1].isalnum() or text[found.start() - 1] == ")"):
        digits = digits[1:]
    return Fraction(digits) / (100 if found.group().endswith("%") else 1)


def numeric(argument: str | None) -> Scorer:
    """Returns the scorer that compares the last numbers of both texts; `argument` is a relative tolerance, 0 without.

    An answer whose reference has no number is not counted.
    """
    try:
        tolerance = Fraction(argument or 0)
    except (ValueError, ZeroDivisionError):
        tolerance = Fraction(-1)
    if tolerance < 0:
        raise UserError(f"numeric: its argument is a relative tolerance such as numeric:0.01, not {argument!r}.")

    def statistics(answer: Answer) -> tuple[float, float]:
        expected, given = last_number(answer.reference), last_number(answer.generation)
        if expected is None:
            return 0.0, 0.0
        return float(given is not None and abs(given - expected) <= tolerance * abs(expected)), 1.0

    return Scorer(statistics)


def regex(argument: str | None) -> Scorer:
    """Returns the scorer that looks for a pattern.

    With an argument it is the pattern: what it finds last in both texts must be equal, its first group where it has one; where
    the reference does not have it, the whole reference is meant. Without, the reference itself is a pattern that must be found
    in the generation.
    """
    if argument is None:
        return mean_of(lambda generation, reference: _pattern(reference.strip(), "the reference").search(generation) is not None)
    pattern = _pattern(argument, "its argument")

    def found(text: str) -> str | None:
        last = None
        for last in pattern.finditer(text):
            pass
        return None if last is None else (last.group(min(pattern.groups, 1)) or "").strip()

    def same(generation: str, reference: str) -> bool:
        given, expected = found(generation), found(reference)
        return given is not None and given == (reference.strip() if expected is None else expected)

    return mean_of(same)


def _pattern(text: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"regex: {what} {text!r:.200} is no regular expression ({error}).") from error
