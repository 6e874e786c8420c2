"""Faults that one row shows on its own. Each check takes the texts of a row and returns what is wrong, mostly nothing.

Patterns have bounded repetition: a hostile row of megabytes takes linear time.
"""

import ftfy.badness

from sft_jax.doctor.endings import FENCE
from sft_jax.doctor.personal_data import find_personal_data, snippet
from sft_jax.doctor.texts import Texts, contents, quantities, words

_WINDOW = 100_000  # characters at either end of an answer that patterns are looked for in


def role_order(texts: Texts) -> list[str]:
    """Finds turns that follow each other as in no chat."""
    if texts.conversation is None or texts.conversation.kind != "chat":
        return []
    messages = texts.conversation.messages
    found, before = [], ""
    for index, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        place = f"messages[{index}]"
        if role == "system":
            if index and before != "system":
                found.append(f"{place}: a {message.role} message after others")
            before = before or role
            continue
        if role == "assistant" and before in ("", "system"):
            found.append(f"{place}: begins with the assistant")
        elif role in ("assistant", "user") and role == before:
            found.append(f"{place}: two turns of the {role} in a row")
        elif role == "tool" and before not in ("assistant", "tool"):
            found.append(f"{place}: a tool result without a turn of the assistant before it")
        elif role == "user" and before == "assistant" and messages[index - 1].calls:
            found.append(f"{place}: a turn of the user after a call of a tool, which has no result")
        elif role == "user" and before == "tool":
            found.append(f"{place}: a turn of the user after a tool result, which the assistant has not answered")
        before = role
    if before in ("user", "tool"):
        found.append(f"messages[{len(messages) - 1}]: ends with the {before}, so that nothing answers it")
    return found


def empty_answer(texts: Texts) -> list[str]:
    """Finds answers without a visible character."""
    total = len(texts.answers)
    return [
        f"answer {number} of {total} is empty" if total > 1 else "the answer is empty"
        for number, answer in enumerate(texts.answers, 1)
        if not any(character.isprintable() and not character.isspace() for character in answer)
    ]


def one_word_answer(texts: Texts) -> list[str]:
    """Finds rows all of whose answers are one word or number."""
    if not texts.answers:
        return []
    short = all(len(answer) <= 100 and len(answer.split()) == 1 and len(words(answer)) <= 1 for answer in texts.answers)
    return [f"the answer is {snippet(texts.answer)}"] if short else []


def mojibake(texts: Texts) -> list[str]:
    """Finds text that was decoded with the wrong encoding, and characters that stand for bytes that were lost."""
    for text in contents(texts):
        if "\ufffd" in text:
            place = text.index("\ufffd")
            return [f"a replacement character (U+FFFD) in {snippet(text[max(0, place - 30) :])}"]
        if not text.isascii():
            found = ftfy.badness.BADNESS_RE.search(text[:_WINDOW])
            if found:
                return [snippet(text[max(0, found.start() - 30) :])]
    return []


def unbalanced_fences(texts: Texts) -> list[str]:
    """Finds answers with a code block that is opened and not closed, by the rules of CommonMark."""
    for answer in texts.answers:
        opened = None
        for fence in FENCE.finditer(answer):
            marks, rest = fence[1], fence[2]
            if opened is None:
                opened = None if marks[0] == "`" and "`" in rest else (marks, fence.start())
            elif marks[0] == opened[0][0] and len(marks) >= len(opened[0]) and not rest.strip():
                opened = None
        if opened is not None:
            return [f"a code block is not closed: {snippet(answer[opened[1] :])}"]
    return []


def repeats_prompt(texts: Texts) -> list[str]:
    """Finds answers that are the question again, or begin with all of it."""
    found, total = [], len(texts.answers)
    for number, (question, answer) in enumerate(zip(texts.questions, texts.answers, strict=True), 1):
        asked, answered = words(question[:_WINDOW]), words(answer[:_WINDOW])
        if len(asked) < 5 or answered[: len(asked)] != asked:
            continue
        alone = len(answered) == len(asked)
        if alone and quantities(question) != quantities(answer[: len(question) + 20]):
            continue
        which = f"answer {number} of {total}" if total > 1 else "the answer"
        found.append(f"{which} {'is the question again' if alone else 'begins with the whole question'}")
    return found


def personal_data(texts: Texts) -> list[str]:
    """Finds e-mail addresses, keys, card and account numbers, which are shown masked."""
    found = {}
    for text in contents(texts):
        found.update(dict.fromkeys(find_personal_data(text)))
    return [f"{kind} {shown}" for kind, shown in found]
