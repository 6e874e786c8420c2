"""CHECKS: what the doctor looks for. A further check of a row is a function and a line in `facts.ROW_CHECKS`, one of whole
sets a class and a line in SET_CHECKS; each kind of fault has a line here."""

from typing import NamedTuple

from sft_jax.doctor.findings import Severity
from sft_jax.doctor.near_duplicates import NearDuplicates
from sft_jax.doctor.overlap import Overlap
from sft_jax.doctor.set_checks import Conflicts, Duplicates, InvalidJson, LengthOutliers, OpenEndings, SetCheck, WrongLanguage


class Check(NamedTuple):
    """A kind of fault."""

    severity: Severity  # error: a fact that spoils training or what is measured; warning: to be looked at; note: to be known
    about: str
    removed: bool = False  # by --fix, unless kinds are named
    usual: float = 1.0  # a set in which more rows than this share have it is like this, and that is no fault of a row
    usual_where_rendered: bool = True  # also in a set whose rows go through a chat template


CHECKS: dict[str, Check] = {
    "unreadable": Check("error", "rows that cannot be read", removed=True),
    "role_order": Check("error", "turns in an order that is no chat"),
    "empty_answer": Check("error", "answers with nothing in them", removed=True),
    "duplicate": Check("error", "rows that are the same as an earlier one", removed=True),
    "overlap": Check("error", "training rows that hold what a held-out set or benchmark asks", removed=True),
    "invalid_json": Check("error", "answers that are no JSON in a set of JSON"),
    "template_markup": Check("error", "marks of a chat template in the content", usual=0.5, usual_where_rendered=False),
    "near_duplicate": Check("warning", "rows that are nearly an earlier one", removed=True),
    "conflicting_answers": Check("warning", "the same prompt with another answer"),
    "mojibake": Check("warning", "text that was decoded with the wrong encoding"),
    "wrong_language": Check("warning", "answers in another language than the set"),
    "cut_answer": Check("warning", "answers that end in the middle of a sentence"),
    "one_word_answer": Check("warning", "answers of one word", usual=0.1),
    "refusal": Check("warning", "answers that decline"),
    "boilerplate": Check("warning", "stock phrases of chat models"),
    "unbalanced_fences": Check("warning", "code blocks that are not closed"),
    "repeats_prompt": Check("warning", "answers that repeat the question"),
    "personal_data": Check("warning", "e-mail addresses, keys, card and account numbers"),
    "length_outlier": Check("note", "rows far longer than the others of their set"),
}

SET_CHECKS: tuple[type[SetCheck], ...] = (
    Duplicates,
    Overlap,
    NearDuplicates,
    Conflicts,
    InvalidJson,
    OpenEndings,
    WrongLanguage,
    LengthOutliers,
)
