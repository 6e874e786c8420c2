"""From a conversation to texts with weighted spans; nothing is tokenised here.

The span of an assistant turn runs from the end of the prompt that a server would feed (the history rendered with
add_generation_prompt) to the end of its end-of-turn: all of that has to be generated. What that is says the render that
ends with the turn, since that is what the turn looks like when it has just been written. Where the render of the whole
conversation shows the same, the turn is supervised there; where it shows something else (templates that drop earlier
thinking, that end the last turn differently, or whose prompt is no beginning of the render), the turn is an example of
its own: prompt, answer, end-of-turn.
"""

import bisect
import os
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from sft_jax.config_checks import check_supervise
from sft_jax.data.chats.answers import Answer, find_answer, find_shown_answer
from sft_jax.data.chats.locate import MOST_CONTENTS, Located, Region, Slot, slots_of
from sft_jax.data.chats.prefixes import Prefixes
from sft_jax.data.chats.rendering import Messages, Rendering
from sft_jax.data.chats.text_plans import RowPlan, Span, TextPlan
from sft_jax.data.examples import RowError
from sft_jax.data.formats.conversation import ROLES, Conversation, Message, Piece

_TAIL = 64  # characters of a prompt at least that show how it ends
_FEW = 4  # turns of which each prompt is rendered, where more are looked for in one render


class Supervise(NamedTuple):
    """Which tokens are targets."""

    mode: Literal["roles", "last", "all"]
    roles: frozenset[str]


def parse_supervise(value: str) -> Supervise:
    """Returns what `data.supervise` says: "assistant", "last", "all", or roles with commas. Raises UserError."""
    check_supervise("data.supervise", value)
    if value == "all":
        return Supervise("all", frozenset(ROLES))
    if value == "last":
        return Supervise("last", frozenset(["assistant"]))
    return Supervise("roles", frozenset(part.strip() for part in value.split(",")))


def plan_plain(conversation: Conversation, supervise: Supervise) -> RowPlan:
    """Plans a prompt with its completion, or plain text, without a template: EOS ends it."""
    if conversation.kind == "text":
        text = conversation.text or ""
        weight = conversation.pieces[-1].weight if conversation.pieces else 1.0  # of the end
        plan = TextPlan(text, [Span(0, len(text), weight, -1, conversation.pieces)], ends_with_eos=True)
        plan.roles, plan.starts = ("other",), [0]
        plan.regions = (Region(0, 0, "content", 0, len(text)),)
        return RowPlan(plan, [], "plain", {"weighted_parts": len(conversation.pieces)} if conversation.pieces else {})
    counts = {} if conversation.completion.strip() else {"empty_answers": 1}
    prompt = f"{conversation.system}\n\n{conversation.prompt}" if conversation.system else conversation.prompt
    prompt += conversation.separator
    text = prompt + conversation.completion
    asked, answered = (0, len(prompt)), (len(prompt), len(text))
    spans = []
    if supervise.mode == "all" or "user" in supervise.roles:
        spans.append(Span(*asked, 1.0, -1))
    if "assistant" in supervise.roles:
        spans.append(Span(*answered, 1.0, 0))
    plan = TextPlan(text, spans, ends_with_eos=True, starts=[0, len(prompt)], roles=("user", "assistant"))
    plan.regions = (Region(0, 0, "content", *asked), Region(1, 1, "content", *answered))
    return RowPlan(plan, [], "plain", counts)


def plan_chat(messages: Sequence[Message], rendering: Rendering, supervise: Supervise) -> RowPlan:
    """Plans a chat. Raises RowError where the template refuses it or spans cannot be decided."""
    dicts = rendering.dicts(messages)
    usual = _usual_weights(messages, supervise)
    weights = [
        each if message.weight is None else message.weight for each, message in zip(usual, messages, strict=True)
    ]
    slots = slots_of(dicts)
    if len(slots) > MOST_CONTENTS:
        raise RowError(f"it has {len(slots):,} contents, more than the {MOST_CONTENTS:,} that can be told apart in a render; split it.")
    whole = text = rendering.render(dicts, False)
    counts = _count_messages(messages, usual, weights)
    spans: dict[int, Span] = {}  # of the assistant turns that `text` shows as they were written
    own = []
    chosen = [bool(weight) or any(piece.weight for piece in message.pieces) for weight, message in zip(weights, messages, strict=True)]
    turns = _chosen(messages, chosen, supervise)
    prefixes = rendering.prefixes(dicts, max(1, turns[0][0]), whole) if len(turns) > _FEW else None
    generated = rendering.generated(dicts, whole) if prefixes else None
    located = rendering.locate(dicts, slots, False, whole)
    contents = {slot.message for slot in slots if slot.kind == "content"}
    unseen = contents - {region.message for region in located.regions if region.kind != "call"} if located else set()
    places = _places(slots, len(dicts)) if prefixes else []
    for index, number in turns:
        if index == 0:  # nothing asks for it, so there is no prompt that leads to it
            counts["unprompted_turns"] = 1
            continue
        last = index == len(dicts) - 1
        if prefixes and not last and index not in unseen and not messages[index].pieces and len(messages[index].calls) < 2:
            mine = slots[places[index] : places[index + 1]]
            answer = _in_prefixes(prefixes, dicts, index, mine, rendering, counts)
            if answer is not None:
                span = Span(answer.start, answer.end, weights[index], number)
                spans[index] = span.with_pieces(_left_out(_within(generated, answer), whole, answer, counts))
                continue
        history = dicts if last else dicts[: index + 1]
        shown = whole if last else rendering.render(history, False)
        answer = find_answer(rendering, history, slots, shown, counts)
        span = Span(answer.start, answer.end, weights[index], number)
        pieces = _placed(messages[index], index, slots, answer.text, answer.located, rendering)
        left_out = _left_out(rendering.generated(history, shown), shown, answer, counts)
        span = span.with_pieces([*pieces, *left_out])
        if last and answer.shown:
            text = answer.text
        if answer.shown and text.startswith(answer.text[: answer.end]):
            spans[index] = span
        else:
            plan = _text_plan(answer.text[: answer.end], history, answer.located, rendering, {index: span})
            plan.turn = number
            own.append(plan)
    main = _text_plan(text, dicts, located, rendering, spans)
    if supervise.mode == "all":
        if located is None and len(set(weights)) > 1:
            raise RowError(
                f"{rendering.name}: messages cannot be told apart in its render, so they cannot have weights."
            )
        begins = [0, *main.starts[1:]]
        placed = [_placed(message, index, slots, text, located, rendering) for index, message in enumerate(messages)]
        parts = zip(begins, [*begins[1:], len(text)], weights, placed, strict=True)
        main.spans = [Span(start, end, weight, -1).with_pieces(pieces) for start, end, weight, pieces in parts]
    else:
        main.spans += _other_roles(text, messages, weights, slots, located, rendering)
        main.spans.sort()
    main.spans = [span for span in main.spans if span.supervised]
    if count := _hidden(slots, dicts, [*own, main] if main.spans else own):
        counts["hidden_messages"] = count
    if own:
        counts["per_turn"] = len(own)
        if len(main.spans) == 1 and main.spans[0].turn >= 0:
            main.turn = main.spans[0].turn
            counts["per_turn"] += 1
    return RowPlan(main if main.spans else None, own, "per_turn" if own else "once", counts)


def _places(slots: Sequence[Slot], count: int) -> list[int]:
    """Returns the first slot of each of `count` messages, and the end of the last one's."""
    owners = [slot.message for slot in slots]
    return [bisect.bisect_left(owners, message) for message in range(count + 1)]


def _in_prefixes(
    prefixes: Prefixes, dicts: Messages, index: int, mine: Sequence[Slot], rendering: Rendering, counts: dict[str, int]
) -> Answer | None:
    """Returns the answer of a turn where the render of the whole conversation shows it; None where it has to be looked for.

    The end of its prompt is enough, so that all turns together take no longer than the render is.
    """
    begin, end = prefixes.place(index), prefixes.place(index + 1)
    closings = (*rendering.turn_end[:2], *(rendering.call_end if dicts[index].get("tool_calls") else ()))
    first = max(0, begin - _TAIL - sum(map(len, closings)))
    before = prefixes.text[first:begin]
    if first and not before.strip():
        return None
    shown = prefixes.text[first:end] + prefixes.end
    counted = dict(counts)
    answer = find_shown_answer(rendering, dicts, index, mine, before + prefixes.ask, shown, counted)
    if answer is None or not prefixes.text.startswith(answer.text[: answer.end], first):
        return None
    counts.update(counted)
    return answer._replace(text=prefixes.text, start=first + answer.start, end=first + answer.end)


def _within(generated: list[tuple[int, int]] | None, answer: Answer) -> list[tuple[int, int]] | None:
    """Returns what of `generated`, which is in order, may touch an answer."""
    if generated is None:
        return None
    first = bisect.bisect_left(generated, answer.start, key=lambda part: part[1])
    return generated[first : bisect.bisect_left(generated, answer.end, key=lambda part: part[0])]


def _usual_weights(messages: Sequence[Message], supervise: Supervise) -> list[float]:
    """Returns the weight of each message where the row gives it none: whether the run supervises it."""
    if supervise.mode == "all":
        return [1.0] * len(messages)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant" and not message.given]
    if supervise.mode == "last":
        answers = answers[-1:]
    elif "assistant" not in supervise.roles:
        answers = []
    own, others = set(answers), supervise.roles - {"assistant"}
    return [float(message.role in others or index in own) for index, message in enumerate(messages)]


def _count_messages(messages: Sequence[Message], usual: Sequence[float], weights: Sequence[float]) -> dict[str, int]:
    counts = {"marked_messages": 0, "empty_answers": 0, "weighted_parts": 0}
    for message, before, weight in zip(messages, usual, weights, strict=True):
        counts["marked_messages"] += bool(weight) and not before
        counts["weighted_parts"] += len(message.pieces)
        if message.role == "assistant" and weight and not (message.content.strip() or message.reasoning or message.calls):
            counts["empty_answers"] += 1
    return {name: count for name, count in counts.items() if count}


def _hidden(slots: Sequence[Slot], dicts: Messages, plans: Sequence[TextPlan]) -> int:
    """Returns how many messages that ask for an answer, or that tell what it needs, have a content that no text shows."""
    last = max((index for index, message in enumerate(dicts) if message["role"] == "assistant"), default=0)
    asking = {slot.message for slot in slots if dicts[slot.message]["role"] != "assistant" and slot.message < last}
    if not all(plan.complete for plan in plans):  # it cannot be told
        return 0
    return len(asking - {region.message for plan in plans for region in plan.regions})


def _chosen(messages: Sequence[Message], chosen: Sequence[bool], supervise: Supervise) -> list[tuple[int, int]]:
    """Returns (message, number among the assistant's) of the assistant turns that are supervised as answers."""
    if supervise.mode == "all":
        return []
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    return [(index, number) for number, index in enumerate(turns) if chosen[index]]


def _text_plan(
    text: str, dicts: Messages, located: Located | None, rendering: Rendering, spans: Mapping[int, Span]
) -> TextPlan:
    """Returns a plan with the spans of assistant turns; `spans` has them by message."""
    plan = TextPlan(text, list(spans.values()), roles=tuple(message["role"] for message in dicts))
    if located is not None:
        plan.regions, plan.complete = located
    else:
        plan.complete = False
    if not plan.complete:
        plan.neutral = rendering.render_neutral(dicts, False)
    plan.starts = _message_starts(plan, rendering, spans)
    return plan


def _message_starts(plan: TextPlan, rendering: Rendering, spans: Mapping[int, Span]) -> list[int]:
    """Returns where each message begins: at its header as far as that can be told, else at its content."""
    text, end = plan.text, rendering.turn_end
    first: dict[int, Region] = {}
    last: dict[int, Region] = {}
    for region in plan.regions:
        first.setdefault(region.message, region)
        last[region.message] = region
    starts, done = [], 0  # `done`: where the content of the message before ends
    for index, role in enumerate(plan.roles):
        content = first[index].start if index in first else spans[index].start if index in spans else done
        content = max(content, done)
        between = text[done:content]
        start = content
        for closing in (end.end, end.user_end) if index else ():
            if closing and between.startswith(closing):
                start = done + len(closing)
                start += len(text[start:content]) - len(text[start:content].lstrip())
                break
        else:
            if role == "user" and end.user_header and between.endswith(end.user_header):
                start = content - len(end.user_header)
            elif index == 0:
                start = len(rendering.bos) if between.startswith(rendering.bos) else 0
            elif index in spans:
                start = spans[index].start
        starts.append(max(start, starts[-1] if starts else 0))
        done = max(done, last[index].end if index in last else content)
    return starts


def _left_out(generated: list[tuple[int, int]] | None, shown: str, answer: Answer, counts: dict[str, int]) -> list[Piece]:
    """Returns what of an answer the template's `{% generation %}` leaves out, so that it is not supervised.

    Args:
        generated: what stands in it in `shown`, the render that ends with the turn.
        counts: gets how many answers are not supervised as a whole, and how many not to their end.
    """
    if generated is None:
        return []
    said = answer.text[answer.start : answer.end]
    end = answer.end if answer.shown else shown.rfind(said) + len(said)
    if not answer.shown and end < len(said):  # put together in a way that the template does not show
        return []
    moved = answer.end - end
    inside = [(max(start + moved, answer.start), min(stop + moved, answer.end)) for start, stop in generated]
    inside = [(start, stop) for start, stop in inside if start < stop]
    edges = [answer.start, *(edge for pair in inside for edge in pair), answer.end]
    left_out = [Piece(start, stop, 0.0) for start, stop in zip(edges[::2], edges[1::2], strict=True) if answer.text[start:stop].strip()]
    if left_out:
        counts["generation_less"] = counts.get("generation_less", 0) + 1
        if left_out[-1].end == answer.end:
            counts["end_left_out"] = counts.get("end_left_out", 0) + 1
    return left_out


def _placed(
    message: Message, index: int, slots: Sequence[Slot], text: str, located: Located | None, rendering: Rendering
) -> tuple[Piece, ...]:
    """Returns the pieces of a message as places in a render. Raises RowError where the render does not show them."""
    if not message.pieces or not message.content.strip():
        return ()
    own = [region for region in located.regions if region.message == index and region.kind != "call"] if located else []
    own = [region for region in own if region.slot < 0 or slots[region.slot].path == ("content",)]
    if not own or any(region.slot < 0 or text[region.start : region.end] != slots[region.slot].text for region in own):
        raise RowError(
            f"{rendering.name}: the content of message {index} is not found as it is in the render, so its parts cannot have "
            "weights; weight the whole message."
        )
    first, last = slots[own[0].slot], slots[own[-1].slot]
    if text[own[0].start : own[-1].end] == message.content[first.start : last.end]:  # markup between them too
        before = os.path.commonprefix([message.content[: first.start][::-1], text[: own[0].start][::-1]])
        after = os.path.commonprefix([message.content[last.end :], text[own[-1].end :]])
        ranges = [(first.start - len(before), last.end + len(after), own[0].start - len(before))]
    else:
        ranges = [(slots[region.slot].start, slots[region.slot].end, region.start) for region in own]
    return tuple(
        Piece(place + max(piece.start, start) - start, place + min(piece.end, end) - start, piece.weight)
        for piece in message.pieces
        for start, end, place in ranges
        if max(piece.start, start) < min(piece.end, end)
    )


def _other_roles(text, messages, weights, slots, located, rendering: Rendering) -> list[Span]:
    """Returns the spans of supervised messages that no prompt leads to: content and, where it shows, end of turn."""
    spans = []
    closings = [end for end in (rendering.turn_end.user_end, rendering.turn_end.end) if end]
    regions: dict[int, list[Region]] = {}
    for region in located.regions if located else ():
        regions.setdefault(region.message, []).append(region)
    for index, message in enumerate(messages):
        pieces = _placed(message, index, slots, text, located, rendering) if message.role != "assistant" else ()
        if message.role == "assistant" or not (weights[index] or any(piece.weight for piece in pieces)):
            continue
        own = regions.get(index, [])
        if message.content.strip() and not own:
            raise RowError(f"{rendering.name}: message {index} of the {message.role} is not found in its render.")
        for region in own:
            closing = next((end for end in closings if text.startswith(end, region.end)), "")
            spans.append(Span(region.start, region.end + len(closing), weights[index], -1).with_pieces(pieces))
    return spans
