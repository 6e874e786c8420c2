"""What workers find out about rows, one by one: the faults of a row, and what checks of whole sets need to know of it."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from datasketch import MinHash

from sft_jax.config import ColumnsConfig
from sft_jax.data.examples import RowError
from sft_jax.doctor import endings, phrases, row_checks, template_marks
from sft_jax.doctor.collection import Split, read_texts
from sft_jax.doctor.json_forms import json_forms
from sft_jax.doctor.language import asks_for_language, identifier, language_of
from sft_jax.doctor.texts import Texts, hash_runs, hash_words, key_of, quantities, said, words

TARGET = "sft_jax.doctor.facts:FactFinder"  # what workers run
CHUNK = 64  # rows that go to a worker at once
PERMUTATIONS = 80  # of a signature
SHINGLE = 3  # words in a row whose set is compared
LEAST_WORDS = 20  # of a row that has a signature: in a shorter one a single word changes too much

# kind -> texts -> details: what a row shows on its own
ROW_CHECKS: dict[str, Callable[[Texts], list[str]]] = {
    "role_order": row_checks.role_order,
    "empty_answer": row_checks.empty_answer,
    "one_word_answer": row_checks.one_word_answer,
    "cut_answer": endings.cut_answer,
    "refusal": phrases.refusal,
    "boilerplate": phrases.boilerplate,
    "mojibake": row_checks.mojibake,
    "unbalanced_fences": row_checks.unbalanced_fences,
    "repeats_prompt": row_checks.repeats_prompt,
    "template_markup": template_marks.template_markup,
    "personal_data": row_checks.personal_data,
}


class Facts(NamedTuple):
    """What is known of a row without looking at others."""

    faults: list[tuple[str, str]]  # kind, detail
    whole: int = 0  # a key of all of it, but white space around turns
    short: int = 0  # a key of its words and quantities, of a row without a signature; else 0
    prompt: int = 0  # a key of everything before the last answer, but case and white space; 0 where there is nothing
    asked: int = 0  # a key of the words of the prompt without system prompts, or of a plain text
    answer: int = 0  # a key of the words and quantities of the last answer
    prompt_words: np.ndarray = np.zeros(0, np.uint32)  # hashes
    answer_words: np.ndarray = np.zeros(0, np.uint32)  # of a plain text: of all of it
    signature: np.ndarray | None = None  # MinHash, uint32 [PERMUTATIONS]
    characters: int = 0  # of everything but system prompts
    json: tuple[str, str] = ("", "")  # what the last answer is, and the worst of those before it: one of json_form
    open_ending: bool | None = None  # see endings.open_ending
    language: str = ""  # "" where it is not sure
    language_words: int = 0  # in which it was told
    any_language: bool = False  # whether the prompt speaks of a language


class Setup(NamedTuple):
    """What a worker needs to know."""

    sets: tuple[tuple[str, ColumnsConfig, Split], ...]  # format, columns, split
    control: frozenset[str] = frozenset()  # special tokens of the model


class FactFinder:
    """Run by workers: rows in, facts out."""

    def __init__(self, setup: Setup):
        self._sets, self._control = setup.sets, setup.control
        identifier()  # a second and tens of megabytes, which are none of the first row's
        self._empty = MinHash(PERMUTATIONS, seed=1, hashfunc=int)

    def __call__(self, rows: list[tuple[int, int, dict[str, Any] | RowError]]) -> list[Facts]:
        return [self._facts(set_number, row) for _, set_number, row in rows]

    def _facts(self, set_number: int, row: dict[str, Any] | RowError) -> Facts:
        format_, columns, split = self._sets[set_number]
        try:
            texts = read_texts(row, format_, columns, split)
        except RowError as error:
            return Facts([("unreadable", str(error))])
        if texts.conversation is not None and texts.conversation.kind == "tokens":  # no text: only equal rows can be told
            return Facts([], whole=key_of(texts.conversation.ids.tobytes().hex()))
        faults = []
        if split != "benchmark":
            faults = [(kind, detail) for kind, check in ROW_CHECKS.items() for detail in check(texts)]
            if not any(kind == "template_markup" for kind, _ in faults):
                faults += [("template_markup", detail) for detail in template_marks.control_tokens(texts, self._control)]
        prompt, answer = words(texts.prompt), words(texts.answer if texts.answers else texts.body)
        prompt_words, answer_words = hash_words(prompt), hash_words(answer)
        signature = self._signature(np.concatenate([prompt_words, answer_words]))
        has_answer = bool(texts.answers) and bool(texts.answer.strip())
        language, language_words = language_of(texts) if split != "benchmark" else ("", 0)
        return Facts(
            faults,
            whole=_whole_key(texts),
            short=0
            if signature is not None
            else key_of(f"{_content_key(texts.apart)} {_content_key(texts.prompt)} {_content_key(texts.answer or texts.body)}"),
            prompt=key_of(_plain(texts.system), _plain(texts.prompt)) if has_answer and texts.prompt.strip() else 0,
            asked=_content_key(texts.prompt or texts.body),
            answer=_content_key(texts.answer),
            prompt_words=prompt_words,
            answer_words=answer_words,
            signature=signature,
            characters=len(texts.all),
            json=json_forms(texts),
            open_ending=endings.open_ending(texts),
            language=language,
            language_words=language_words,
            any_language=asks_for_language(texts),
        )

    def _signature(self, hashes: np.ndarray) -> np.ndarray | None:
        if len(hashes) < LEAST_WORDS:
            return None
        sketch = self._empty.copy()
        sketch.update_batch((hash_runs(hashes, SHINGLE) & np.uint64(0xFFFFFFFF)).tolist())
        return sketch.hashvalues


def _whole_key(texts: Texts) -> int:
    conversation = texts.conversation
    if conversation is None or conversation.kind == "text":
        return key_of(texts.body.strip())
    parts = ((message.role, said(message).strip(), message.reasoning or "") for message in conversation.as_messages())
    return key_of(json.dumps(conversation.tools), *(text for part in parts for text in part))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _content_key(text: str) -> int:
    """Returns a key of the words and quantities of a text; of the text itself where it has neither."""
    found = words(text), quantities(text)
    return key_of(" ".join(found[0]), " ".join(found[1])) if any(found) else key_of(text.strip())
