"""Where the content of messages lies in a rendered conversation.

Private-use characters are put just inside the stripped content of every message, the conversation is rendered with
them, and they are removed again. Where the result equals the plain render they say where content is, whatever the
template did with it. Searching for the content itself would find the wrong place as soon as a text occurs twice.

Most rows need no render for this: what the template writes around the contents is remembered for each sequence of
roles, and a plain render that consists of just that and the row's own contents is taken apart directly.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sft_jax.data.examples import RowError
from sft_jax.data.formats.tool_calls import texts_in, value_at, value_paths, with_value_at

# Markup in which models write their reasoning, opening and closing.
REASONING_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>", "<channel|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
)

# Ranges that the marks may come from, two for each content; one that the row's own text does not use is taken.
_RANGES = (range(0xF0000, 0xFFFF0), range(0xE000, 0xF800), range(0x100000, 0x107F00))
MOST_CONTENTS = (len(_RANGES[0]) - 1) // 2
_REMEMBERED = 1 << 18  # contents of the sequences of roles that are remembered


class Slot(NamedTuple):
    """A stripped piece of a message: the characters [start, end) of the text at `path` in it."""

    message: int
    kind: str  # "content", "reasoning" or "call": a text in the arguments of a call
    path: tuple[str | int, ...]  # such as ("content",)
    start: int
    end: int
    text: str
    lead: str  # white space before it in the field, and after it
    trail: str


class Region(NamedTuple):
    """A slot's place in a rendered text."""

    slot: int  # its number
    message: int
    kind: str
    start: int
    end: int


class Located(NamedTuple):
    """Places of contents in a text, in order. `complete` says that no content lies outside of them: it is False where a

    template tore a content apart, or wrote a piece of one that the marks around it do not show.
    """

    regions: tuple[Region, ...]
    complete: bool


Render = Callable[[Sequence[dict[str, Any]], bool], str]
Doubtful = Callable[[Sequence[dict[str, Any]], Sequence[Slot]], bool]


class _Marked(NamedTuple):
    """A render with marks, taken apart."""

    text: str  # without the marks
    regions: tuple[Region, ...]  # between the two marks of a slot
    whole: bool  # no mark lacks the other one, and no region lies in another

    def literals(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Returns the slots in the order of their regions, and the text before, between and after the regions."""
        ends = [0, *(region.end for region in self.regions)]
        starts = [*(region.start for region in self.regions), len(self.text)]
        parts = tuple(self.text[a:b] for a, b in zip(ends, starts, strict=True))
        return tuple(region.slot for region in self.regions), parts


class Locator:
    """Finds contents in the renders of one template with one set of arguments."""

    def __init__(self, render: Render, doubtful: Doubtful = lambda messages, slots: False):
        """Takes the renders of `render`.

        Args:
            doubtful: tells contents of which even a piece outside of the regions would do harm, so that it has to be
                shown that there is none.
        """
        self._render, self._doubtful = render, doubtful
        self._skeletons: dict[tuple, tuple[tuple[int, ...], tuple[str, ...]]] = {}
        self._size = 0  # contents in them: chats may be long, and each turn's prompt is another sequence

    def locate(
        self, messages: Sequence[dict[str, Any]], slots: Sequence[Slot], prompt: bool, text: str
    ) -> Located | None:
        """Returns where `slots` of `messages` lie in `text`, the plain render of `messages`.

        Returns None where that cannot be told: the render with marks, less the marks, is another text.
        """
        key = (prompt, *((message["role"], "") for message in messages), *(slot[:3] for slot in slots))
        skeleton = self._skeletons.get(key)
        if skeleton is not None:
            regions = _take_apart(text, slots, *skeleton)
            if regions is not None:
                return Located(regions, True)
        marks = _unused_range(messages, len(slots))
        if marks is None:
            return None
        marked = self._render_marked(messages, slots, prompt, marks, "")
        if marked is None or marked.text != text:
            return None
        complete = marked.whole
        shown = {region.slot for region in marked.regions}
        if complete and (len(shown) < len(slots) or self._doubtful(messages, slots)):
            complete = self._nothing_outside(messages, slots, prompt, marks, marked)
        if complete and not any(slot.lead or slot.trail for slot in slots):  # they would be taken for the template's
            if self._size > _REMEMBERED:
                self._skeletons.clear()
                self._size = 0
            self._skeletons[key] = marked.literals()
            self._size += len(key)
        return Located(marked.regions, complete)

    def render_neutral(self, messages: Sequence[dict[str, Any]], slots: Sequence[Slot], prompt: bool) -> str | None:
        """Returns the render with one private-use character in place of each content; None where it is refused."""
        marks = _unused_range(messages, len(slots))
        if marks is None:
            return None
        marked = self._render_marked(messages, slots, prompt, marks, chr(marks[-1]))
        return None if marked is None else marked.text

    def _nothing_outside(self, messages, slots: Sequence[Slot], prompt: bool, marks: range, marked: _Marked) -> bool:
        """Returns whether no piece of a content stands outside of the regions.

        With another text in place of each content, what a template writes around contents stays the same. A piece that
        lost its marks does not; nor does a text that depends on a content in another way, so that it is not decided.
        """
        other = self._render_marked(messages, slots, prompt, marks, chr(marks[-1]))
        return other is not None and other.whole and other.literals() == marked.literals()

    def _render_marked(
        self, messages, slots: Sequence[Slot], prompt: bool, marks: range, instead: str
    ) -> _Marked | None:
        """Renders with a mark before and after each content; or before and after `instead`, which takes its place.

        Returns None where the template refuses that.
        """
        marked = list(messages)
        for number in range(len(slots) - 1, -1, -1):  # from the back, so that ranges in a field stay right
            slot = slots[number]
            before, after = chr(marks[2 * number]), chr(marks[2 * number + 1])
            paths = [("reasoning_content",), ("thinking",)] if slot.path == ("reasoning_content",) else [slot.path]
            for path in paths:
                value = value_at(marked[slot.message], path)
                inside = instead or value[slot.start : slot.end]
                value = value[: slot.start] + before + inside + after + value[slot.end :]
                marked[slot.message] = with_value_at(marked[slot.message], path, value)
        try:
            rendered = self._render(marked, prompt)
        except RowError:  # the template looks at what it renders
            return None
        parts, opened, regions, torn, length, last = [], {}, [], False, 0, 0
        for match in re.finditer(f"[{chr(marks[0])}-{chr(marks[2 * len(slots) - 1])}]" if slots else "(?!)", rendered):
            parts.append(rendered[last : match.start()])
            length += match.start() - last
            last = match.end()
            number, closing = divmod(ord(match.group()) - marks[0], 2)
            if not closing:
                torn |= number in opened
                opened[number] = length
            elif number in opened:
                regions.append(Region(number, slots[number].message, slots[number].kind, opened.pop(number), length))
            else:
                torn = True
        parts.append(rendered[last:])
        regions.sort(key=lambda region: region.start)
        overlap = any(a.end > b.start for a, b in zip(regions, regions[1:], strict=False))
        return _Marked("".join(parts), tuple(regions), not (torn or opened or overlap))


def slots_of(messages: Sequence[dict[str, Any]]) -> list[Slot]:
    """Returns the pieces of content of rendered messages, without those that are empty or white space.

    Reasoning that an assistant message carries in its content is a piece of its own, since templates treat it apart.
    """
    slots = []
    for number, message in enumerate(messages):
        reasoning, content = message.get("reasoning_content"), message["content"] or ""
        parts = None
        if reasoning is not None:
            _add(slots, number, "reasoning", ("reasoning_content",), reasoning, 0, len(reasoning))
        elif message["role"] == "assistant":
            parts = split_reasoning(content)
        if parts is None:
            _add(slots, number, "content", ("content",), content, 0, len(content))
        else:
            _add(slots, number, "reasoning", ("content",), content, *parts[0])
            _add(slots, number, "content", ("content",), content, *parts[1])
        for index, call in enumerate(message.get("tool_calls", ())):
            place = ("tool_calls", index, "function", "arguments")
            arguments = call["function"]["arguments"]
            for path in value_paths(arguments):
                value = value_at(arguments, path)
                _add(slots, number, "call", (*place, *path), value, 0, len(value))
    return slots


def split_reasoning(content: str) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Returns the ranges of reasoning and answer in an assistant's content, or None where it does not begin so.

    The opening tag may be missing: some templates write it into the prompt, and data made with them begins after it.

    >>> split_reasoning("<think>why</think>because")
    ((7, 10), (18, 25))
    >>> split_reasoning("because") is None
    True
    """
    if "<" not in content and "[" not in content:
        return None
    for opening, closing in REASONING_TAGS:
        end = content.find(closing)
        if end >= 0:
            start = content.find(opening, 0, end)
            if start < 0:
                return (0, end), (end + len(closing), len(content))
            if not content[:start].strip():
                return (start + len(opening), end), (end + len(closing), len(content))
    return None


def only_tags(text: str) -> bool:
    """Returns whether a text consists of the tags of a section of reasoning, of one of them, or of white space.

    >>> only_tags("<think>\\n\\n</think>\\n"), only_tags("</think>"), only_tags("<think>Sum.")
    (True, True, False)
    """
    text = "".join(text.split())
    return any(text in (opening, closing, opening + closing) for opening, closing in REASONING_TAGS)


def _add(slots: list[Slot], message: int, kind: str, path: tuple[str | int, ...], value: str, start: int, end: int) -> None:
    piece = value[start:end]
    text = piece.strip()
    if text:
        first = start + (0 if piece[0] == text[0] else len(piece) - len(piece.lstrip()))
        last = first + len(text)
        slots.append(Slot(message, kind, path, first, last, text, value[start:first], value[last:end]))


def _take_apart(
    text: str, slots: Sequence[Slot], order: tuple[int, ...], literals: tuple[str, ...]
) -> tuple[Region, ...] | None:
    """Returns the regions in a text made of `literals` and the contents `order` between them; None where it is not."""
    position = len(literals[0])
    if not text.startswith(literals[0]):
        return None
    regions = []
    for number, literal in zip(order, literals[1:], strict=True):
        slot = slots[number]
        if not text.startswith(slot.text, position):
            position += len(slot.lead)
            if not slot.lead or not text.startswith(slot.lead + slot.text, position - len(slot.lead)):
                return None
        end = position + len(slot.text)
        regions.append(Region(number, slot.message, slot.kind, position, end))
        if not text.startswith(literal, end):
            if not slot.trail or not text.startswith(slot.trail + literal, end):
                return None
            end += len(slot.trail)
        position = end + len(literal)
    return tuple(regions) if position == len(text) else None


def _unused_range(messages: Sequence[dict[str, Any]], count: int) -> range | None:
    """Returns the marks for `count` contents; the last one, which marks none, may stand for contents."""
    texts = "".join(text for message in messages for text in texts_in(message) if not text.isascii())
    for marks in _RANGES:
        if 2 * count < len(marks) and not re.search(f"[{chr(marks[0])}-{chr(marks[-1])}]", texts):
            return marks
    return None
