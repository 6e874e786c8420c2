"""The texts of a row as checks see them, and hashes of their words and runs of words."""

import hashlib
import json
import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_jax.data.formats.conversation import Conversation, Message

# Scripts written without spaces, of which every character counts as a word: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_MARKS = "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c))[0] == "M")  # `\w` has no vowel signs
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}](?:[^\W{_UNSPACED}]|[{_MARKS}])*")
_ASCII_WORD = re.compile(r"[a-z0-9_]+")  # the same for ASCII, three times as fast
_QUANTITY = re.compile(r"\d+|[+*/=<>^%]|(?<!\w)-")  # numbers and operators: texts that differ in them say something else
ASKED = ("question", "prompt", "problem", "query", "instruction", "input")  # fields of benchmarks that hold what is asked
_PRIME = 0x9E3779B97F4A7C15
_ANYTHING = np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True, slots=True)
class Texts:
    """What a row says: a prompt with answers, or a plain text.

    `prompt` is everything before the last answer but system prompts, `questions` what a user said last before each answer.
    Where there are no answers, all text is in `body`.
    """

    conversation: Conversation | None
    system: str = ""
    apart: str = ""  # what else makes rows different: system prompts, what the assistant thought, tools
    prompt: str = ""
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    body: str = ""

    @property
    def question(self) -> str:
        """Returns what the last answer answers."""
        return self.questions[-1] if self.questions else ""

    @property
    def answer(self) -> str:
        """Returns the last answer."""
        return self.answers[-1] if self.answers else ""

    @property
    def all(self) -> str:
        """Returns everything but system prompts."""
        return f"{self.prompt}\n{self.answer}" if self.answers else self.body


def texts_of(conversation: Conversation) -> Texts:
    """Returns the texts of a conversation."""
    if conversation.kind in ("text", "tokens"):
        return Texts(conversation, body=conversation.text or "")
    if conversation.kind == "completion":
        prompt, answer = conversation.prompt, conversation.completion
        return Texts(conversation, conversation.system or "", _apart(conversation, conversation.system), prompt, (prompt,), (answer,))
    messages = conversation.messages
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    spoken = [message for message in messages[:last] if message.role not in ("system", "developer")]
    system = "\n".join(message.content for message in messages if message.role in ("system", "developer"))
    questions, answers, asked = [], [], ""
    for message in messages[: last + 1]:
        if message.role == "user":
            asked = message.content
        elif message.role == "assistant" and not message.given:
            questions.append(asked)
            answers.append(said(message))
    return Texts(
        conversation,
        system,
        _apart(conversation, system, *(message.reasoning for message in messages)),
        "\n".join(said(message) for message in spoken),
        tuple(questions),
        tuple(answers),
    )


def _apart(conversation: Conversation, *texts: str | None) -> str:
    tools = json.dumps(conversation.tools) if conversation.tools else ""
    return "\n".join(filter(None, [*texts, tools]))


def said(message: Message) -> str:
    """Returns what a message says: its content and its calls of tools."""
    return "\n".join([*([message.content] if message.content or not message.calls else []), *(f"{call.name} {call.text}" for call in message.calls)])


def contents(texts: Texts) -> list[str]:
    """Returns everything that the row says: a text for what each turn says, its calls too, and what the assistant thought."""
    conversation = texts.conversation
    if conversation is None or conversation.kind == "text":
        return [texts.body]
    if conversation.kind == "chat":
        return [text for message in conversation.messages for text in (said(message), message.reasoning) if text]
    return [text for text in (conversation.system, conversation.prompt, conversation.completion) if text]


def texts_of_fields(row: Mapping[str, Any]) -> Texts:
    """Returns all text that is anywhere in a row, in the order of its fields: of a benchmark whose fields nobody named."""
    found: list[str] = []
    layer: list[Any] = [row]
    while layer:
        value = layer.pop()
        if isinstance(value, str):
            found.append(_encodable(value))
        elif isinstance(value, (dict, list)):
            layer.extend(reversed(list(value.values()) if isinstance(value, dict) else value))
    asked = next((_encodable(row[name]) for name in ASKED if isinstance(row.get(name), str)), "")
    return Texts(None, prompt=asked, questions=(asked,), body="\n".join(found))


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair becomes a question mark


def words(text: str) -> list[str]:
    """Returns the words of a text: case folded, compatibility characters resolved, without punctuation.

    >>> words("It's 2 o’clock: 再见!")
    ['it', 's', '2', 'o', 'clock', '再', '见']
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def quantities(text: str) -> list[str]:
    """Returns the numbers and operators of a text, sorted.

    >>> quantities("3 - 4 = -1, a well-known e-mail")
    ['-', '-', '1', '3', '4', '=']
    """
    return sorted(_QUANTITY.findall(text))


def hash_words(found: Sequence[str]) -> np.ndarray:
    """Returns a hash of each word, uint32 [n], the same in every process. Those of numbers are odd, all others even."""
    return np.fromiter((zlib.crc32(word.encode()) & 0xFFFFFFFE | word.isdecimal() for word in found), np.uint32, len(found))


def hash_runs(hashes: np.ndarray, size: int) -> np.ndarray:
    """Returns a hash of each run of `size` words, uint64 [max(0, n - size + 1)], from the hashes of words, uint32 [n]."""
    count = max(0, len(hashes) - size + 1)
    result = np.zeros(count, np.uint64)
    for place in range(size):
        result = result * np.uint64(_PRIME) + hashes[place : place + count] + np.uint64(1)  # wraps modulo 2**64
    result = (result ^ (result >> np.uint64(29))) * _ANYTHING
    return result ^ (result >> np.uint64(32))


def key_of(*parts: str) -> int:
    """Returns 64 bits that stand for some texts. Among a million keys two collide with a chance of 3 in 100 million."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")
