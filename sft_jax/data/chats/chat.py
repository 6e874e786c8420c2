"""Conversations -> examples: texts with spans, tokenised a batch at a time."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sft_jax.data.chats.guard import guard_of
from sft_jax.data.chats.outside import check_outside
from sft_jax.data.chats.rendering import Rendering
from sft_jax.data.chats.seams import SeamEncoder
from sft_jax.data.chats.spans import parse_supervise, plan_chat, plan_plain
from sft_jax.data.chats.templates import ChatTemplate
from sft_jax.data.chats.text_plans import RowPlan, Span, TextPlan
from sft_jax.data.examples import BadRow, BuiltRow, Example, RowError
from sft_jax.data.formats.conversation import Conversation, Message
from sft_jax.data.tokenizers.alignment import Encoding
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError

# What `BuiltRow.counts` may hold, for reports.
COUNTS = {
    "seam_cuts": "answers at whose beginning or end the text was cut, since a token straddled it",
    "per_turn": "examples that hold one assistant turn, since the template renders it differently once it is history",
    "guarded": "rows whose content holds the text of a control token, which stayed text",
    "reasoning_dropped": "answers whose reasoning the template does not render, so that it is not trained on",
    "hidden_messages": "messages of users, tools or the system before the last answer whose content the template does not render",
    "open_thinking": "answers without reasoning after a prompt that opens a thinking section",
    "end_added": "answers whose end-of-turn the template leaves to the next message, so that it was added",
    "empty_answers": "answers without text, so that only their end is trained on",
    "marked_messages": "messages that are supervised because the row says so, not by data.supervise",
    "weighted_parts": "parts of messages or texts that have weights of their own",
    "unused_arguments": "rows that bring template arguments, and are rendered with no template",
    "generation_less": "answers of which the template's {% generation %} leaves out a part, which is not supervised",
    "end_left_out": "answers whose end the template's {% generation %} leaves out, so that the model does not learn to stop",
    "unprompted_turns": "assistant turns at the beginning of a row, which no prompt leads to; not supervised",
}


def build_rows(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    supervise: str = "assistant",
    template_kwargs: dict[str, Any] | None = None,
    allow_special_tokens: bool = False,
) -> list[BuiltRow | BadRow]:
    """Returns the examples of each conversation, or why it cannot be used.

    Rows are independent: a bad one does not affect the others. All texts of a call are encoded together, so give many
    rows at once. See `RowBuilder` for the arguments.
    """
    kwargs = json.dumps(template_kwargs or {})
    return _builder(tokenizer, template, supervise, kwargs, allow_special_tokens).build(conversations)


@functools.lru_cache(maxsize=8)
def _builder(tokenizer, template, supervise, kwargs, allow_special_tokens) -> "RowBuilder":
    return RowBuilder(
        tokenizer,
        template,
        supervise=supervise,
        template_kwargs=json.loads(kwargs),
        allow_special_tokens=allow_special_tokens,
    )


@dataclass(slots=True)
class _Job:
    """One text on its way to an example."""

    row: int
    plan: TextPlan
    encoder: SeamEncoder
    encoding: Encoding | None = None


class RowBuilder:
    """Builds rows with one tokenizer, template and set of options; remembers what it learns about them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        supervise: str = "assistant",
        template_kwargs: dict[str, Any] | None = None,
        allow_special_tokens: bool = False,
    ):
        """Prepares to build rows.

        Args:
            template: what chats, and prompts with completions, are rendered with; None = chats are refused, and prompts
                and completions joined as they are.
            supervise: "assistant", "last", "all", or roles joined by commas.
            template_kwargs: the run's template arguments.
            allow_special_tokens: let content become control tokens.

        Raises UserError for an unknown `supervise`.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._supervise = parse_supervise(supervise)
        self._guard = None if allow_special_tokens else guard_of(tokenizer)
        doubtful = (self._guard.doubtful,) if self._guard else ()
        self._rendering = Rendering(template, template_kwargs or {}, tokenizer, *doubtful) if template else None
        self._plain_encoder = SeamEncoder(tokenizer)

    @property
    def end_of_turn(self) -> str:
        """The text with which an assistant turn ends, on which a server has to stop; "" where it cannot be told."""
        if self._rendering is None:
            return self._tokenizer.special_tokens.get("eos_token", "")
        return self._rendering.turn_end.end.strip()

    def build(self, conversations: Sequence[Conversation]) -> list[BuiltRow | BadRow]:
        """Returns the examples of each conversation, or why it cannot be used."""
        bad: dict[int, str] = {}
        rows: dict[int, RowPlan] = {}
        jobs: list[_Job] = []
        given: dict[int, Example] = {}
        for row, conversation in enumerate(conversations):
            try:
                if conversation.kind == "tokens":
                    given[row], rows[row] = self._given(conversation), RowPlan(None, [], "plain", {})
                    continue
                rows[row] = self._plan(conversation)
                if self._guard is not None:
                    check_outside(conversation, self._rendering, self._guard)
                guarded = self._guard is not None and self._guard.needed(_contents(conversation))
                jobs += self._jobs(row, rows[row], guarded)
            except RowError as error:
                bad[row] = str(error)
        jobs = self._encode(jobs, rows, bad)
        seams = dict.fromkeys(rows, 0)
        finished: list[_Job] = []
        while jobs:
            ready, jobs = self._settle(jobs, seams)
            finished += ready
        examples: dict[int, list[Example]] = {row: [] for row in rows}
        for row, example in given.items():
            examples[row] += [example] if example.weights.any() else []
        for job in finished:
            example = self._example(job)
            if example.weights.any():
                examples[job.row].append(example)
        return [self._result(row, rows, examples, seams, bad) for row in range(len(conversations))]

    def _plan(self, conversation: Conversation) -> RowPlan:
        if conversation.kind == "chat" and self._rendering is None:
            raise RowError(
                "it is a chat, and there is no chat template to render it with; name one in data.chat_template, "
                "such as chatml or a file."
            )
        if conversation.tools and (conversation.kind == "text" or self._rendering is None):
            raise RowError("it brings tools, and there is no chat template to render them with; name one in data.chat_template.")
        if conversation.kind == "text" or self._rendering is None:
            if self._tokenizer.eos_id is None:
                raise UserError(
                    "the tokenizer has no EOS token, so rows cannot be ended; name its eos_token in "
                    "tokenizer_config.json, or use chats with a template."
                )
            plan = plan_plain(conversation, self._supervise)
            if conversation.template_kwargs:
                plan.counts["unused_arguments"] = 1
            return plan
        rendering = self._rendering.of(conversation.tools, conversation.template_kwargs)
        return plan_chat(conversation.as_messages(), rendering, self._supervise)

    def _given(self, conversation: Conversation) -> Example:
        """Returns an example of tokens that the data bring, as they are."""
        ids, weights = conversation.ids, conversation.weights.copy()
        if ids.max() >= self._tokenizer.vocab_size:
            raise RowError(
                f"token id {ids.max()} is none of the tokenizer's {self._tokenizer.vocab_size:,}; use the tokenizer that the rows "
                "were made with."
            )
        weights[0] = 0
        return Example(ids, weights, -1, np.zeros(1, np.int32), ("other",), "")

    def _jobs(self, row: int, plan: RowPlan, guarded: bool) -> list[_Job]:
        texts = [*([plan.main] if plan.main else []), *plan.own]
        for text in texts:
            if not _is_unicode(text.text):
                raise RowError("it holds half of a surrogate pair, which no tokenizer can read; remove it.")
        if not guarded:
            return [_Job(row, text, self._plain_encoder) for text in texts]
        plan.counts["guarded"] = 1
        return [_Job(row, self._guard.rewrite(text), self._guard.encoder) for text in texts]

    def _encode(self, jobs: list[_Job], rows: dict[int, RowPlan], bad: dict[int, str]) -> list[_Job]:
        """Encodes all jobs. Rows whose content became a control token are guarded; where that does not help, bad."""
        plain = [job for job in jobs if job.encoder is self._plain_encoder]
        _encode_with(self._plain_encoder, plain)
        if self._guard is None:
            return plain
        leaking = {plain[number].row for number in self._guard.leaks(*_columns(plain))}
        guarded = [job for job in jobs if job.encoder is not self._plain_encoder]
        for row in sorted(leaking):
            try:
                guarded += self._jobs(row, rows[row], True)
            except RowError as error:
                bad[row] = str(error)
        if guarded:
            _encode_with(self._guard.encoder, guarded)
        for number in self._guard.leaks(*_columns(guarded)):
            bad[guarded[number].row] = "its content becomes a control token in every way to encode it; change its text."
        jobs = [job for job in plain if job.row not in leaking] + guarded
        return sorted((job for job in jobs if job.row not in bad), key=lambda job: job.row)

    def _settle(self, jobs: list[_Job], seams: dict[int, int]) -> tuple[list[_Job], list[_Job]]:
        """Returns the jobs whose ids are right before every answer, and what has to be made of the others."""
        broken: dict[int, set[int]] = {}
        for encoder in {id(job.encoder): job.encoder for job in jobs}.values():
            own = [number for number, job in enumerate(jobs) if job.encoder is encoder]
            places = [_prompt_ends(jobs[number].plan) for number in own]
            found = encoder.broken(
                [jobs[number].plan.text for number in own], [jobs[number].encoding for number in own], places
            )
            broken.update(zip(own, found, strict=True))
        ready, changed = [], []
        for number, job in enumerate(jobs):
            late = _straddled_ends(job)
            if not broken[number] and not late:
                ready.append(job)
                continue
            spans = job.plan.spans
            for span in spans[:]:
                if span.turn < 0 or (span.start not in broken[number] and span not in late):
                    continue
                seams[job.row] += 1
                cut = span.start if span.start in broken[number] else -1
                if span is spans[-1] and span not in late:
                    job.plan.cut = max(cut, job.plan.cut)
                else:  # what follows must see the ids that inference feeds, so this turn becomes an example of its own
                    spans.remove(span)
                    changed.append(_Job(job.row, _up_to(job.plan, span, cut), job.encoder))
            if spans:
                changed.append(job)
        for encoder in {id(job.encoder): job.encoder for job in changed}.values():
            own = [job for job in changed if job.encoder is encoder]
            _encode_with(encoder, [job for job in own if job.plan.cut < 0])
            cut = [job for job in own if job.plan.cut >= 0]
            found = encoder.encode_cut([job.plan.text for job in cut], [job.plan.cut for job in cut])
            for job, encoding in zip(cut, found, strict=True):
                job.encoding = encoding
        return ready, changed

    def _example(self, job: _Job) -> Example:
        plan, (ids, starts, _) = job.plan, job.encoding
        weighted = [each for span in plan.spans for each in (span, *span.pieces)]  # a piece wins over what it lies in
        edges = [edge for each in weighted for edge in (each.start, each.end)]
        found = starts.searchsorted(edges + plan.starts)
        prefix, suffix = (), ()
        if plan.ends_with_eos:
            prefix, eos = self._tokenizer.plain_prefix, self._tokenizer.eos_id
            ended = len(ids) > 0 and ids[-1] == eos and starts[-1] >= plan.starts[-1]  # the data has written it
            suffix = () if ended else (eos,)
        first, end = len(prefix), len(prefix) + len(ids)
        whole = np.empty(end + len(suffix), np.int32)
        whole[:first], whole[first:end], whole[end:] = prefix, ids, suffix
        weights = np.zeros(len(whole), np.float32)
        tokens = (found[: len(edges)] + first).tolist()
        for number, each in enumerate(weighted):
            weights[tokens[2 * number] : tokens[2 * number + 1]] = each.weight
        if plan.spans and plan.spans[-1].end == len(plan.text):
            weights[end:] = plan.spans[-1].weight
        weights[:1] = 0
        turn_starts = (found[len(edges) :] + first).astype(np.int32)
        text = plan.text if job.encoder is self._plain_encoder else self._guard.restore(plan.text)
        return Example(whole, weights, plan.turn, turn_starts, plan.roles, text)

    def _result(self, row: int, rows, examples, seams, bad) -> BuiltRow | BadRow:
        if row in bad:
            return BadRow(bad[row])
        if not examples[row]:
            return BadRow(f"no token of it is supervised (data.supervise is {self._describe()}); leave it out.")
        plan = rows[row]
        counts = {**plan.counts, **({"seam_cuts": seams[row]} if seams[row] else {})}
        kind = "cut" if seams[row] and plan.kind == "once" else plan.kind
        return BuiltRow(tuple(sorted(examples[row], key=lambda example: example.turn)), kind, counts)

    def _describe(self) -> str:
        mode, roles = self._supervise
        return f"'{mode}'" if mode != "roles" else f"'{','.join(sorted(roles))}'"


def _contents(conversation: Conversation) -> Sequence[Message]:
    return (Message("other", conversation.text or ""),) if conversation.kind == "text" else conversation.as_messages()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _columns(jobs: list[_Job]) -> tuple[list[TextPlan], list[Encoding]]:
    return [job.plan for job in jobs], [job.encoding for job in jobs]


def _encode_with(encoder: SeamEncoder, jobs: list[_Job]) -> None:
    for job, encoding in zip(jobs, encoder.encode([job.plan.text for job in jobs]), strict=True):
        job.encoding = encoding


def _prompt_ends(plan: TextPlan) -> list[int]:
    """Returns the places before which ids must be those of the prompt; a cut made one of them so."""
    starts = [span.start for span in plan.spans if span.turn >= 0 and span.start != plan.cut]
    return [start for start in starts if 0 < start < len(plan.text)]


def _straddled_ends(job: _Job) -> set[Span]:
    """Returns the spans whose last token goes on into text that is more than white space."""
    text, (_, starts, ends) = job.plan.text, job.encoding
    spans = [span for span in job.plan.spans if span.turn >= 0 and span.end < len(text)]
    if not spans:
        return set()
    tokens = starts.searchsorted([span.end for span in spans]).tolist()
    return {
        span
        for span, token in zip(spans, tokens, strict=True)
        if token and ends[token - 1] > span.end and text[span.end : ends[token - 1]].strip()
    }


def _up_to(plan: TextPlan, span: Span, cut: int) -> TextPlan:
    """Returns the plan of one turn: the text up to its end."""
    count = sum(start < span.end for start in plan.starts)
    return replace(
        plan,
        text=plan.text[: span.end],
        spans=[span],
        turn=span.turn,
        starts=plan.starts[:count],
        roles=plan.roles[:count],
        regions=tuple(region for region in plan.regions if region.end <= span.end),
        ends_with_eos=False,
        cut=cut,
    )
