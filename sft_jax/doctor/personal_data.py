"""Personal data and secrets by their patterns, which are never shown in full.

Every pattern has bounded repetition and begins at a boundary, so that hostile text takes linear time.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from sft_jax.printable import printable


class Pattern(NamedTuple):
    """What a kind of data looks like, whether a match is one, and how it is shown."""

    regex: re.Pattern[str]
    needs: tuple[str, ...]  # one of these is in every text that holds a match; () = no such text is known
    valid: Callable[[str], bool]
    shown: Callable[[str], str]


def _always(match: str) -> bool:
    return True


def _mail(match: str) -> bool:
    return not match.startswith("git@") and bool(re.search(r"\.[A-Za-z]{2,}$", match))


def luhn(number: str) -> bool:
    """Returns whether the last digit of a number is the check digit of the others (ISO/IEC 7812-1)."""
    digits = [int(digit) for digit in reversed(number)]
    return sum(digits[::2] + [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]) % 10 == 0


_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35\d{14}"
)


def _card(match: str) -> bool:
    number = re.sub(r"[ -]", "", match)
    return bool(_ISSUERS.fullmatch(number)) and luhn(number)


def _iban(match: str) -> bool:
    number = match.replace(" ", "")
    return 15 <= len(number) <= 34 and int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1


def _first(match: str) -> str:
    return f"{match[:4]}... ({len(match)} characters)"


def _last(match: str) -> str:
    return f"...{match[-4:]}"


def _mail_shown(match: str) -> str:
    return f"{match[0]}***@***.{match.rpartition('.')[2]}"


PATTERNS: dict[str, Pattern] = {
    "private key": Pattern(
        re.compile(r"-----BEGIN (?:[A-Z]{2,10} ){0,2}PRIVATE KEY(?: BLOCK)?-----(?:[A-Za-z0-9+/=\s]{0,20000})"),
        ("-----BEGIN ",), _always, lambda match: "-----BEGIN ... PRIVATE KEY-----",
    ),
    "API key": Pattern(
        re.compile(
            r"(?<![A-Za-z0-9_-])(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,80}|github_pat_[A-Za-z0-9_]{22,100}"
            r"|sk-(?=[A-Za-z_-]{0,60}\d)[A-Za-z0-9_-]{20,200}|xox[abprs]-[A-Za-z0-9-]{10,80}|AIza[0-9A-Za-z_-]{35}"
            r"|hf_[A-Za-z0-9]{30,40}"
            r"|glpat-[A-Za-z0-9_-]{20,40}|[rs]k_live_[A-Za-z0-9]{16,100}"
            r"|eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,1000})(?![A-Za-z0-9_-])"
        ),
        ("AKIA", "ASIA", "gh", "sk-", "xox", "AIza", "hf_", "glpat-", "k_live_", "eyJ"), _always, _first,
    ),
    "e-mail address": Pattern(
        re.compile(r"(?<![\w.%+-])[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,4}(?![\w@])"), ("@",),
        _mail, _mail_shown,
    ),
    "card number": Pattern(re.compile(r"(?<![\w.+*/=-])(?<![*/+=] )\d(?:[ -]?\d){12,18}(?![\w*/=]|[.]\d)"), (), _card, _last),
    "IBAN": Pattern(re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"), (), _iban, _last),
}  # fmt: skip


def find_personal_data(text: str) -> list[tuple[str, str]]:
    """Returns (kind, masked text) of everything that looks like personal data or a secret, each once."""
    found = {}
    for kind, pattern in PATTERNS.items():
        if not pattern.needs or any(needed in text for needed in pattern.needs):
            for match in pattern.regex.finditer(text):
                if pattern.valid(match[0]):
                    found[kind, pattern.shown(match[0].strip())] = None
    return list(found)


def mask(text: str) -> str:
    """Returns a text in which personal data are masked: whatever is shown of a row goes through here."""
    for pattern in PATTERNS.values():
        if not pattern.needs or any(needed in text for needed in pattern.needs):
            text = pattern.regex.sub(
                lambda match, pattern=pattern: pattern.shown(match[0]) if pattern.valid(match[0]) else match[0], text
            )
    return text


def snippet(text: str, length: int = 60, end: bool = False) -> str:
    """Returns the beginning (or the end) of a text in one line of at most `length` characters and "...", masked."""
    near = text[-2000:] if end else text[:2000]
    if len(text) > 2000:  # no part of what stands at the edge
        near = near.partition(" ")[2] or near if end else near.rpartition(" ")[0] or near
    line = printable(" ".join(mask(near).split()))
    if len(line) <= length:
        return f'"{line}"'
    return f'"...{line[-length:]}"' if end else f'"{line[:length]}..."'
