"""SCORERS: how a generated answer is compared with the reference answer. A further scorer is one function and one line."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sft_jax.errors import UserError, did_you_mean
from sft_jax.evaluation import corpus_scores, json_scores, text_scores
from sft_jax.evaluation.choices import choice
from sft_jax.evaluation.scoring import Scorer, mean_of
from sft_jax.evaluation.user_scores import is_user_scorer, user_scorer


class Entry(NamedTuple):
    """A scorer of the table."""

    about: str
    make: Callable[[str | None], Scorer]  # of the argument behind a colon, None without
    argument: str = ""  # what it is; "" = it takes none


def _plain(about: str, scorer: Scorer) -> Entry:
    return Entry(about, lambda argument: scorer)


SCORERS: dict[str, Entry] = {
    "exact_match": _plain("equal but for white space at the ends", mean_of(text_scores.exact_match)),
    "normalised_match": _plain("equal without case, punctuation, articles and white space", mean_of(text_scores.normalised_match)),
    "contains": _plain("the reference is somewhere in the answer", mean_of(text_scores.contains)),
    "regex": Entry("what the pattern finds is equal; without one the reference is the pattern", text_scores.regex, "PATTERN"),
    "numeric": Entry("the last numbers are equal", text_scores.numeric, "RELATIVE_TOLERANCE"),
    "json_valid": _plain("the answer is JSON, the whole of it", json_scores.JSON_VALID),
    "json_schema": Entry("and valid under the schema of a file, or of the column schema", json_scores.schema, "FILE.json"),
    "json_fields": _plain("F1 of the fields of the JSON, each with its value", json_scores.JSON_FIELDS),
    "token_f1": _plain("F1 of words, as in SQuAD", mean_of(text_scores.token_f1)),
    "rouge_l": _plain("F1 of the longest common subsequence of words", mean_of(text_scores.rouge_l)),
    "choice": Entry("the reference is the likeliest of the texts in a column, choices without one", choice, "COLUMN"),
    "choice_by_byte": Entry("the same by log-likelihood a byte", functools.partial(choice, by_byte=True), "COLUMN"),
    "bleu": Entry("BLEU of all answers, 0 to 100, by sacrebleu", corpus_scores.bleu, "TOKENIZER"),
    "chrf": Entry("chrF of all answers, 0 to 100, by sacrebleu; chrf:2 is chrF++", corpus_scores.chrf, "WORD_ORDER"),
}


def find_scorers(specs: Sequence[str], key: str) -> dict[str, Scorer]:
    """Returns the scorers by name: NAME, NAME:ARGUMENT, or path/to/file.py:function.

    Raises UserError, naming `key`, for a name that is unknown or twice there, an argument that is none, and a package
    that is missing.
    """
    found: dict[str, Scorer] = {}
    for spec in specs:
        if spec in found:
            raise UserError(f"{key}: '{spec}' is named twice; leave one of them out.")
        try:
            found[spec] = user_scorer(spec) if _is_users(spec) else _of_table(spec)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    return found


def _is_users(spec: str) -> bool:
    """Returns whether a scorer is a function of a file; an argument of one of the table, such as a pattern, may look like that."""
    return spec.partition(":")[0] not in SCORERS and is_user_scorer(spec)


def _of_table(spec: str) -> Scorer:
    name, colon, argument = spec.partition(":")
    if name not in SCORERS:
        raise UserError(f"unknown scorer '{name}'; {did_you_mean(name, SCORERS)}. A function of yours is path/to/file.py:function.")
    if colon and not SCORERS[name].argument:
        raise UserError(f"'{name}' takes no argument; leave out ':{argument}'.")
    return SCORERS[name].make(argument if colon else None)
