"""What the model has to write after a prompt, so that the conversation gets the turn that the data has."""

import json
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from sft_jax.data.chats.locate import REASONING_TAGS, Located, Region, Slot, only_tags
from sft_jax.data.chats.rendering import Messages, Rendering
from sft_jax.data.examples import RowError, excerpt
from sft_jax.data.formats.tool_calls import value_at, value_paths

_MARKER = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*")


class Answer(NamedTuple):
    """`text[:start]` is the prompt of a turn, `text[start:end]` what follows it, with the end of the turn."""

    text: str
    start: int
    end: int
    shown: bool  # `text` is the template's own render, not put together here
    located: Located | None  # contents in `text`


def find_answer(
    rendering: Rendering, messages: Messages, slots: Sequence[Slot], shown: str, counts: dict[str, int]
) -> Answer:
    """Returns the prompt of the last of `messages` with the answer that leads to it.

    Args:
        slots: contents of the conversation; it may go on after `messages`.
        shown: the plain render of `messages`.
        counts: gets what a report should tell about the turn.

    Raises RowError where the template refuses the prompt, or where it cannot be decided what the answer is.
    """
    turn = len(messages) - 1
    prompt = rendering.render(messages[:-1], True)
    render = rendering.close(shown, bool(messages[turn].get("tool_calls")))
    mine = {slot.kind: slot for slot in slots if slot.message == turn}
    answer = _shown(prompt, render, mine)
    if answer is None:
        answer = _put_together(rendering, messages, slots, prompt, (*render, shown), mine)
    else:
        answer = answer._replace(located=rendering.locate(messages, slots, False, shown))
    _check(rendering, messages, turn, mine, prompt, (render[0], shown), answer, counts)
    if messages[turn].get("tool_calls") and _asks_again(rendering, messages, slots, prompt, answer.text[answer.start : answer.end]):
        raise _undecided(rendering, turn, prompt, render[0])
    return answer


def find_shown_answer(
    rendering: Rendering, messages: Messages, turn: int, slots: Sequence[Slot], prompt: str, shown: str, counts: dict[str, int]
) -> Answer | None:
    """Returns the answer in the render of a conversation of which only the end is looked at; None where that does not do.

    Args:
        messages: the conversation.
        turn: the message in question, an assistant's with at most one call.
        slots: contents of that message, which lie somewhere in the render of the whole conversation.
        prompt: the end of its prompt.
        shown: from there on the render that ends with the turn.
    """
    mine, calls = {slot.kind: slot for slot in slots}, bool(messages[turn].get("tool_calls"))
    render = rendering.close(shown, calls)
    answer = _shown(prompt, render, mine)
    if answer is None or answer.start == answer.end or calls and _last_header(rendering, render[0][answer.start : answer.end]) >= 0:
        return None
    _check(rendering, messages, turn, mine, prompt, (render[0], shown), answer, counts)
    return answer


def _shown(prompt: str, render: tuple[str, int], mine: dict[str, Slot]) -> Answer | None:
    """Returns the answer in a render that begins with the prompt; None where it does not, or lacks reasoning that the data have."""
    text, end = render
    if not text.startswith(prompt) or end < len(prompt):
        return None
    return None if _thinks(prompt, text[len(prompt) : end], mine) else Answer(text, len(prompt), end, True, None)


def _thinks(prompt: str, said: str, mine: dict[str, Slot]) -> bool:
    """Returns whether a prompt opens a thinking section that the template closes at once; the data have what belongs in it."""
    closing = _unclosed(prompt)
    return bool("reasoning" in mine and closing and mine["reasoning"].text not in said and said.lstrip().startswith(closing))


def _put_together(rendering, messages, slots, prompt: str, render: tuple[str, int, str], mine: dict[str, Slot]) -> Answer:
    text, end, _ = render
    if text.startswith(prompt) and end >= len(prompt):
        said = mine["reasoning"].text + ("\n" if prompt.endswith("\n") else "") + text[len(prompt) : end].lstrip()
        return _compose(rendering, messages, slots, prompt, said, len(said) - len(rendering.turn_end.end))
    return _other_render(rendering, messages, slots, prompt, render, mine, _unclosed(prompt))


def _check(
    rendering, messages, turn: int, mine: dict[str, Slot], prompt: str, renders: tuple[str, str], answer: Answer, counts: dict[str, int]
) -> None:
    """Raises RowError for an answer that lacks what the turn says, and counts what a report should tell about it.

    `renders` are the one with the end of the turn, which may have been added, and the template's own.
    """
    closing, reasoning = _unclosed(prompt), mine["reasoning"].text if "reasoning" in mine else ""
    said = answer.text[answer.start : answer.end]
    text, shown = renders
    if not said:  # the template writes nothing for an empty answer, no end either
        raise _undecided(rendering, turn, prompt, text)
    if "content" in mine and not _shows(answer, mine["content"]):
        raise RowError(
            f"{rendering.name} changes the answer: message {turn} is {excerpt(mine['content'].text)}, "
            f"rendered as {excerpt(said)}; change the row or the template."
        )
    _check_calls(rendering, messages, turn, shown, said)
    if reasoning and reasoning not in said:
        counts["reasoning_dropped"] = counts.get("reasoning_dropped", 0) + 1
    if closing and closing not in said:
        counts["open_thinking"] = counts.get("open_thinking", 0) + 1
    if text is not shown:
        counts["end_added"] = counts.get("end_added", 0) + 1


def _shows(answer: Answer, content: Slot) -> bool:
    """Returns whether an answer shows the content of its turn, and not only markup that happens to hold the text."""
    if content.text not in answer.text[answer.start : answer.end]:
        return False
    located = answer.located
    return located is None or any(region.message == content.message and region.kind != "call" for region in located.regions)


def _check_calls(rendering: Rendering, messages: Messages, turn: int, shown: str, said: str) -> None:
    """Raises RowError where an answer lacks a call of the turn, its name or a text in its arguments.

    Of several calls each must change `shown`, the render that ends with the turn: a template may show the first one only.
    """
    calls = messages[turn].get("tool_calls", ())
    for number, call in enumerate(calls):
        if len(calls) > 1 and rendering.shows_same([*messages[:turn], {**messages[turn], "tool_calls": [*calls[:number], *calls[number + 1 :]]}], shown):
            raise RowError(
                f"{rendering.name} does not render call {number + 1} of {len(calls)} in message {turn}; change the row or the template."
            )
        function = call["function"]
        arguments = function["arguments"]
        values = [value_at(arguments, path) for path in value_paths(arguments)]
        for text in (function["name"], *values):
            if text.strip() not in said and json.dumps(text.strip(), ensure_ascii=False)[1:-1] not in said:
                raise RowError(
                    f"{rendering.name} does not render the call of {function['name']!r} in message {turn} as it is: "
                    f"{excerpt(text)} is missing from {excerpt(said)}; change the row or the template."
                )


def _asks_again(rendering: Rendering, messages: Messages, slots: Sequence[Slot], prompt: str, said: str) -> bool:
    """Returns whether an answer ends with a message that the template puts before every answer (Command R+)."""
    place = _last_header(rendering, said)
    if place < 0:
        return False
    history = rendering.locate(messages[:-1], slots, True, prompt)
    last = max((region.end for region in history.regions), default=0) if history else 0
    return said[place:] in prompt[last:]


def _last_header(rendering: Rendering, said: str) -> int:
    """Returns where an answer has the marker of a user's header last, or -1."""
    header = _MARKER.search(rendering.turn_end.user_header)
    return said.rfind(header.group(1)) if header else -1


def _other_render(rendering, messages, slots, prompt: str, render: tuple[str, int, str], mine, closing) -> Answer:
    """Returns the answer where the render does not begin with the prompt.

    What stands before the answer in the render is looked for at the end of the prompt. The prompt may go on after it,
    with a section that the answer then begins in.
    """
    text, end, shown = render
    turn = len(messages) - 1
    located = rendering.locate(messages, slots, False, shown)
    own = [region for region in located.regions if region.message == turn] if located else []
    if located is None or (mine and not own):
        raise _undecided(rendering, turn, prompt, text)
    tail = len(rendering.turn_end.end) if text[:end].endswith(rendering.turn_end.end) else 0
    begin = own[0].start if own else end - tail
    if own:  # white space, or a tag that opens reasoning, that the data has before
        slot = mine[own[0].kind]
        lead = messages[turn][slot.path[0]][: slot.start] if slot.kind != "call" else ""
        begin -= next((len(part) for part in (lead, lead.lstrip(), slot.lead) if text.endswith(part, 0, begin)), 0)
    before = max((region.end for region in located.regions if region.message < turn and region.end <= begin), default=0)
    literal = text[before:begin]

    calls = "tool_calls" in messages[turn]

    def after(cut: int) -> Answer:
        """Returns the prompt, and the render from `cut` in `literal` on."""
        moved = len(prompt) - before - cut
        regions = [region._replace(start=region.start + moved, end=region.end + moved) for region in own]
        return _joined(rendering, messages, slots, prompt, text[before + cut : end], regions)

    def shared_until(cut: int, asked: str = prompt) -> bool:
        """Returns whether the prompt ends as `literal[:cut]` does, with a marker or all of it."""
        shared = _common_end(asked, literal[:cut])
        return bool(shared.strip() and (len(shared) == cut or _MARKER.search(shared)))

    markers = [*_MARKER.finditer(literal)][::-1]
    begins = [match.start() for match in markers]
    # White space after a marker may belong to the prompt, to the answer, or some of it to each.
    ends = [end for match in markers for end in range(match.end(), match.end(1) - 1, -1)]
    for cut in (len(literal), *ends):
        if shared_until(cut):
            return after(cut)

    for cut in ends if closing and "reasoning" not in mine else ():
        # The prompt has white space behind the tag that opens a section, where the template leaves it empty.
        if literal.startswith(closing, cut) and shared_until(cut, prompt.rstrip()):
            return after(cut)

    history = rendering.locate(messages[:-1], slots, True, prompt)
    said = max((region.end for region in history.regions), default=0) if history else 0  # earlier answers begin so too
    found, cut = prompt.rfind(literal, said) if literal.strip() else -1, len(literal)
    if found < 0:  # what the answer begins with is markup, which the data have not, such as that of a call
        for cut in begins:
            if shared_until(cut):
                return after(cut)
        cuts = sorted({*begins, *ends}, reverse=True)
        if calls:
            found, cut = _found_before_call(prompt, said, literal, cuts)
        elif own:
            found, cut = _found_before_section(prompt, said, literal, cuts)
    if found < 0:
        raise _undecided(rendering, turn, prompt, text)
    opened = prompt[found + cut :]
    if closing and "reasoning" in mine:
        spoken = _reasoned(messages[turn], mine, opened, closing)
        contents = [region.end for region in own if region.kind == "content"]
        rest = text[contents[-1] : end] if contents else text[before + cut : end] if calls else rendering.turn_end.end
        return _compose(rendering, messages, slots, prompt, spoken + rest, len(spoken))
    ended = next((last for _, last in REASONING_TAGS if last in opened), "")
    if "reasoning" in mine and ended:  # the prompt has ended the section already
        behind = opened.rpartition(ended)[2]
        begin = text.find(ended + behind, own[0].end, end)
        own = [region for region in own if region.kind != "reasoning"]
        begin = begin + len(ended + behind) if begin >= 0 else own[0].start if own else end - tail
    elif cut < len(literal):
        return after(cut)
    moved = len(prompt) - begin
    regions = [region._replace(start=region.start + moved, end=region.end + moved) for region in own]
    return _joined(rendering, messages, slots, prompt, text[begin:end], regions)


def _found_before_call(prompt: str, first: int, literal: str, cuts: Sequence[int]) -> tuple[int, int]:
    """Returns (place in the prompt, length) of the longest beginning of `literal` with a marker that is there; (-1, 0) if none.

    It is looked for from the character `first` on. What the prompt has after it may have no markers but the tags of reasoning,
    and none that comes again in the rest, or the rest would begin before the answer.
    """
    for cut in cuts:
        place = prompt.rfind(literal[:cut], first)
        if place >= 0 and _MARKER.search(literal[:cut]):
            opened = [match.group(1) for match in _MARKER.finditer(prompt, place + cut)]
            return (place, cut) if all(only_tags(marker) and marker not in literal[cut:] for marker in opened) else (-1, 0)
    return -1, 0


def _found_before_section(prompt: str, first: int, literal: str, cuts: Sequence[int]) -> tuple[int, int]:
    """Returns (place in the prompt, length) of the longest beginning of `literal`, with a marker, that nothing but the tags of

    a section of reasoning follows; (-1, 0) if none. It is looked for from the character `first` on.
    """
    for cut in cuts:
        place = prompt.rfind(literal[:cut], first)
        if place >= 0 and _MARKER.search(literal[:cut]) and only_tags(prompt[place + cut :]):
            return place, cut
    return -1, 0


def _reasoned(message: dict, mine: dict[str, Slot], opened: str, closing: str) -> str:
    """Returns reasoning and answer of a message as they follow a prompt that ends with `opened`."""
    if mine["reasoning"].path == ("content",):  # the data has markup of its own
        content = message["content"].strip()
        opening = next(first for first, last in REASONING_TAGS if last == closing)
        if content.startswith(opened):
            return content[len(opened) :]
        return content[len(opening) :].lstrip() if content.startswith(opening) else content
    lines = ("\n", "\n\n") if opened.endswith("\n") else ("", "")
    answer = mine["content"].text if "content" in mine else ""
    return mine["reasoning"].text + lines[0] + closing + lines[1] + answer


def _compose(rendering, messages, slots, prompt: str, said: str, length: int) -> Answer:
    """Joins a prompt and an answer whose first `length` characters are the data's."""
    region = Region(-1, len(messages) - 1, "content", len(prompt), len(prompt) + length)
    return _joined(rendering, messages, slots, prompt, said, [region])


def _joined(rendering, messages, slots, prompt: str, said: str, regions: list[Region]) -> Answer:
    before = rendering.locate(messages[:-1], slots, True, prompt)
    located = None if before is None else Located((*before.regions, *regions), before.complete)
    return Answer(prompt + said, len(prompt), len(prompt) + len(said), False, located)


def _common_end(first: str, second: str) -> str:
    """Returns the longest text with which both texts end."""
    return os.path.commonprefix([first[::-1], second[::-1]])[::-1]


def _unclosed(prompt: str) -> str | None:
    """Returns the tag that closes the reasoning section in which a prompt ends, or None.

    >>> _unclosed("<|im_start|>assistant\\n<think>\\n")
    '</think>'
    """
    tail = prompt[-64:].rstrip()
    for opening, closing in REASONING_TAGS:
        place = tail.rfind(opening)
        if place >= 0 and (place + len(opening) == len(tail) or tail[place + len(opening) :].isalpha()):
            return closing
    return None


def _undecided(rendering: Rendering, turn: int, prompt: str, text: str) -> RowError:
    return RowError(
        f"{rendering.name}: message {turn} cannot be supervised, since the prompt that a server would feed is not how "
        f"the conversation begins. Prompt: {excerpt(prompt)}; conversation: {excerpt(text)}. "
        "Use another data.chat_template."
    )
