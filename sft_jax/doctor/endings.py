"""Where answers end: in the middle of a sentence, or without the mark with which the others of their set end.

Without a mark at the end, some words tell that more was to come; any other word tells nothing by itself, and much beside answers
that all end with a mark (`set_checks.OpenEndings`).
"""

import re

from sft_jax.doctor.personal_data import snippet
from sft_jax.doctor.texts import Texts, words

_WINDOW = 100_000  # characters at the end of an answer that are looked at
_LEAST = 8  # words of an answer, and of a line that is a sentence
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$", re.MULTILINE)
# Words that no sentence ends with: articles, conjunctions, possessives.
_NEVER_LAST = frozenset("a an the and or but nor because although whereas than my your our their its every such very".split())
# Prepositions, relatives and auxiliaries, which end one in "what I am used to": only in a sentence without a mark.
_HARDLY_LAST = frozenset(
    "of to by with from into onto for at in on as is are was were be been being has have had having will would can could should "
    "may might must that which who whose whom when where while if until unless since though between among during against toward "
    "towards through upon within without via per".split()
)
_ASKING = re.compile(r"\b(?:what|who|whom|where)\b", re.IGNORECASE)  # a question may end with "for"
_NUMBER = "one|two|three|four|five|six|seven|eight|nine|ten|twelve|fifteen|twenty|thirty|forty|fifty|sixty|a hundred|a thousand"
_COUNTED = re.compile(rf"\b(?:at least|at most|more than|less than|fewer than|up to|every|about|nearly|almost) (?:{_NUMBER})\Z", re.IGNORECASE)
_ITEM = re.compile(r"\s*(?:[-*•+|#>]|\(?[0-9a-zA-Z]{1,3}[.)]\s|\*\*)")
_ATTRIBUTION = re.compile(r"[-–—~] ?(?:[A-Z][\w.'’]{0,20}(?: |$)){1,4}$")  # "... - C. S. Lewis"
_CODE = re.compile(r"[=<>{}();\\]|->|\b[a-z]+_[a-z]|`")
_STOP = tuple(".!?。！？…।؟۔\"'”’»)]}`>*:;|~_")
_SENTENCE_END = tuple(".!?。！？…।؟۔\"'”’»)")


def cut_answer(texts: Texts) -> list[str]:
    """Finds answers that end in the middle of a sentence, by the last line of each.

    Of answers before the last only the last word counts: in the middle of a talk people leave out full stops.
    """
    total = len(texts.answers)
    return [
        f"{f'answer {number} of {total} ' if total > 1 else ''}{reason}"
        for number, answer in enumerate(texts.answers, 1)
        if (reason := _cut(answer.rstrip(), by_word=number < total))
    ]


def open_ending(texts: Texts) -> bool | None:
    """Returns whether the last answer ends with a sentence that has no mark at its end; None where it ends with no sentence.

    Items of lists, headings, signatures, numbers and code are no sentences. An answer that is known to be cut is told as that.
    """
    answer = texts.answer.rstrip()
    last = _last_line(answer)
    if len(words(last[:2000])) < _LEAST or FENCE.search(last) or _ITEM.match(last) or _ATTRIBUTION.search(last[-80:]):
        return None
    if last.endswith(_SENTENCE_END):
        return False
    return True if _may_be_open(last) and not _CODE.search(last) and not _cut(answer) else None


def _last_line(answer: str) -> str:
    return answer[-_WINDOW:].rpartition("\n")[2]


def _cut(answer: str, by_word: bool = False) -> str:
    """Returns how an answer without white space at its end is cut, or "" where it is not known to be, `by_word` by its last word.

    A comma or a word such as "the" ends no answer. Else the last line must be a sentence, and other sentences must end with full
    stops: lists, headings, verse, signatures and code end without one.
    """
    head = answer[:_WINDOW].lstrip()
    if head.startswith("<think>") and "</think>" not in answer:
        return "begins to think and does not end it"
    last = _last_line(answer)
    if len(words(answer[:2000])) < _LEAST or FENCE.search(last):
        return ""
    token = last.split()[-1]
    reason = f"ends with {snippet(answer, end=True)}"
    if len(last.split()) >= 4 and (token.casefold() in _NEVER_LAST and not token.isupper() or token[-1] in ",，、"):
        return reason
    if not _may_be_open(last):
        return ""
    if len(words(last[:2000])) < _LEAST:
        return ""
    others = [line.rstrip() for line in answer[-_WINDOW:].split("\n") if len(words(line[:2000])) >= _LEAST][:-1]
    if sum(line.endswith(_STOP) for line in others) < 0.7 * len(others):
        return ""
    if (token in _HARDLY_LAST and not _ASKING.search(last[-200:]) or _COUNTED.search(last[-60:])) and not _CODE.search(last):
        return reason
    if by_word or _ITEM.match(last) or _ATTRIBUTION.search(last[-80:]):
        return ""
    return reason if others or ". " in last or "。" in last else ""


def _may_be_open(last: str) -> bool:
    """Returns whether a line ends with a word, which is no address, label or option ("... option C")."""
    token = last.split()[-1]
    named = "." in token or "/" in token or "@" in token or token[0] in "#_"
    return token[-1].isalpha() and not named and not (token.isupper() and len(token) <= 3)
