"""Contracts "mask" and "boundary": what is supervised is what a server would see generated, and nothing else.

Every published template, every shape of conversation, three real tokenizers. The reference is transformers: its
renders, its ids. Where turns end is a table made by hand.
"""

import dataclasses
import itertools
import unicodedata
from typing import Any, NamedTuple

import numpy as np
import pytest
from chat_cases import (
    ALWAYS_OPENS,
    CHATS,
    END_ADDED,
    END_OF_TURN,
    GUARDED_CHATS,
    NO_TURN,
    TAKE_PARTS,
    as_dicts,
    end_of_turn,
    in_transformers,
    reference_render,
    shared_tokenizer,
    template_classes_script,
    trl_templates,
)
from slow_values import slow

from sft_jax.data.chats.chat import RowBuilder
from sft_jax.data.chats.templates import ChatTemplate
from sft_jax.data.examples import BadRow
from sft_jax.data.formats.conversation import Conversation

pytest.importorskip("transformers")
SCRIPT = template_classes_script()
THINKS, CLOSED = "<think>\n", ("</think>", "<channel|>")  # how prompts open and close a section for a thought

TRL_SHAPES = (
    "five turns", "system", "last answer empty", "white space around", "two users in a row", "two answers in a row", "tool result",
    "thinking, three turns", "reasoning field, three turns",
)  # fmt: skip


@pytest.fixture(scope="module")
def sources(assets):
    return SCRIPT.stock_templates(assets)


class Tokenizers(NamedTuple):
    """A tokenizer of ours and the same from transformers, with a builder for each template."""

    ours: Any
    reference: Any
    builders: dict[str, RowBuilder]


@pytest.fixture(scope="module", params=["qwen3", "llama2", *slow("llama3")])
def tokenizers(request, assets, sources):
    from transformers import AutoTokenizer

    folder = assets / "tokenizers" / request.param
    ours = shared_tokenizer(folder)
    builders = {
        name: RowBuilder(ours, ChatTemplate(source, ours.special_tokens), template_kwargs=SCRIPT.KWARGS.get(name, {}))
        for name, source in sources.items()
    }
    return Tokenizers(ours, AutoTokenizer.from_pretrained(str(folder)), builders)


def weighted(messages):
    """Gives answers different weights in turn, so that answers that follow each other directly can be told apart.

    They also do where a template leaves out what stands between them, such as the message of a tool.
    """
    weights = itertools.cycle((1.0, 0.5))
    return tuple(
        dataclasses.replace(message, weight=next(weights)) if message.role == "assistant" else message for message in messages
    )


def runs(example):
    """Returns (start, end, weight) of each stretch of supervised tokens of one weight."""
    edges = [0, *(np.flatnonzero(np.diff(example.weights)) + 1).tolist(), len(example.weights)]
    stretches = zip(edges[:-1], edges[1:], strict=True)
    return [(start, end, float(example.weights[start])) for start, end in stretches if example.weights[start] > 0]


def as_thought(message):
    """Returns (thought, what is said) of an answer; the thought is "" where it has none."""
    thought, closed, said = message.content.removeprefix(THINKS).partition("\n</think>\n\n")
    return (thought, said) if closed else (message.reasoning or "", message.content)


class Reference:
    """What transformers says about one conversation under one template."""

    def __init__(self, source, name, messages, reference):
        self.source, self.messages, self.reference = source, messages, reference
        self.variables = {**reference.special_tokens_map, **SCRIPT.KWARGS.get(name, {})}
        self.end = end_of_turn(name).format(eos=reference.eos_token)
        self.end_added, self.opening = name in END_ADDED, ALWAYS_OPENS.get(name, "")
        if self.end_added and self.end not in reference.get_added_vocab():
            self.end = reference.eos_token
        self.parts = name.startswith(TAKE_PARTS)
        self.turns = [index for index, message in enumerate(messages) if message.role == "assistant"]

    def render(self, count, prompt):
        return reference_render(self.source, self.messages[:count], prompt, self.variables, self.parts)

    def ids(self, text):
        return self.reference(text, add_special_tokens=False)["input_ids"]

    def prompt(self, turn):
        return self.render(turn, True)

    def answers(self, turn):
        """Returns what may follow the prompt: the render from there to the end of the turn.

        Where the render does not begin with the prompt: the content, as it is or trimmed, and the end of the turn; before
        it may stand what the template puts there in a chat of one turn. A thought stands there where the prompt opens a
        section for it, or where the template shows it as it is and the prompt has not closed the section, and else not at all.
        """
        prompt, shown = self.prompt(turn), self.render(turn + 1, False)
        if self.end_added:
            shown = shown.removesuffix(self.opening) + self.end
        if shown.startswith(prompt):
            return {shown[len(prompt) : shown.rindex(self.end, len(prompt)) + len(self.end)]}
        thought, content = as_thought(self.messages[turn])
        if thought and prompt.endswith(THINKS):
            return {f"{thought}\n</think>\n\n{content}{self.end}"}
        whole = self.messages[turn].content
        content = whole if whole.strip() in shown and not prompt.rstrip().endswith(CLOSED) else content
        if prompt.endswith(THINKS) and "<think></think>" in shown:  # the section that the prompt opens has to be closed
            return {"</think>" + text + self.end for text in (content, content.strip(), content.rstrip())}
        return {lead + text + self.end for lead in ("", self.lead()) for text in (content, content.strip())}

    def lead(self):
        """Returns what the template puts before the answer in a chat of one turn: white space, an empty thinking section."""
        chat = CHATS["one turn"]
        prompt = reference_render(self.source, chat[:1], True, self.variables, self.parts)
        rest = reference_render(self.source, chat, False, self.variables, self.parts).removeprefix(prompt)
        return rest[: rest.index(chat[1].content)] if chat[0].content not in rest else ""

    def refuses(self):
        """Returns whether the template raises for the conversation, or for a prompt in it."""
        try:
            self.render(len(self.messages), False)
            for turn in self.turns:
                self.render(turn, True)
                self.render(turn + 1, False)
        except Exception:
            return True
        return False


def same(got, wanted):
    """Compares texts up to the normalisation that tokenizers do: NFC, and SentencePiece's sign for a space."""
    return unicodedata.normalize("NFC", got.replace("▁", " ")) == unicodedata.normalize("NFC", wanted.replace("▁", " "))


def check_row(row, expected, tokenizer, guarded):
    """Yields what is wrong with a row."""
    left = {turn: (expected.prompt(turn), expected.answers(turn)) for turn in expected.turns}
    for example in row.examples:
        if row.kind == "once" and not guarded:
            shown = expected.render(len(expected.messages), False)
            if expected.messages[-1].role == "assistant":
                shown = shown.removesuffix(expected.opening)
            whole = expected.ids(shown)
            if example.ids.tolist()[: len(whole)] != whole:
                yield "the ids are not those of apply_chat_template"
            if len(example.ids) > len(whole) and tokenizer.decode(example.ids[len(whole) :]) != expected.end:
                yield "something was put after the render"
        for start, end, weight in runs(example):
            before, until = tokenizer.decode(example.ids[:start]), tokenizer.decode(example.ids[:end])
            answer = until[len(before) :]
            for turn, (prompt, answers) in left.items():
                known = example.ids[:start].tolist() == expected.ids(prompt) if not guarded else same(before, prompt)
                # White space after an end-of-turn that is plain text may share its last token.
                fits = any(same(answer, text) or same(answer.rstrip(), text) for text in answers)
                if known and fits and weight == expected.messages[turn].weight:
                    del left[turn]
                    break
            else:
                yield f"supervised: {answer!r} after {before[-80:]!r}"
    for prompt, answers in left.values():
        yield f"not supervised: {answers} after {prompt[-80:]!r}"


def failures(sources, tokenizers, chats, guarded):
    wrong, checked = [], 0
    chats = {shape: weighted(messages) for shape, messages in chats.items()}
    for name, source in sources.items():
        rows = tokenizers.builders[name].build([Conversation(messages=messages) for messages in chats.values()])
        for (shape, messages), row in zip(chats.items(), rows, strict=True):
            expected = Reference(source, name, messages, tokenizers.reference)
            if isinstance(row, BadRow) or expected.refuses():
                turn = NO_TURN.get((name, shape))
                shows_none = turn is not None and f"Prompt: {expected.prompt(expected.turns[turn])!r}; conversation: '" in row.reason
                if isinstance(row, BadRow) != (expected.refuses() or shows_none):
                    wrong.append(f"{name}, {shape}: {row}")
                continue
            checked += 1
            problems = check_row(row, expected, tokenizers.ours, guarded)
            wrong += [f"{name}, {shape}: {problem}" for problem in problems]
    assert checked > len(sources) * len(chats) // 2
    return wrong


def test_supervised_text_and_prompt_ids(sources, tokenizers):
    assert "\n".join(failures(sources, tokenizers, CHATS, guarded=False)) == ""


def test_supervised_text_where_content_holds_control_tokens(sources, tokenizers):
    assert "\n".join(failures(sources, tokenizers, GUARDED_CHATS, guarded=True)) == ""


def test_every_template_has_an_entry_in_the_table(sources):
    assert set(sources) == set(END_OF_TURN)


def test_once_is_apply_chat_template(sources, tokenizers):
    """The ids through the whole of transformers' own function, its special tokens and all."""
    for name in ("Qwen-Qwen3-0.6B", "meta-llama-Llama-3.1-8B-Instruct", "built-in/chatml", "trl/phi3"):
        row = tokenizers.builders[name].build([Conversation(messages=CHATS["one turn"])])[0]
        ids = tokenizers.reference.apply_chat_template(
            as_dicts(CHATS["one turn"]), chat_template=sources[name], return_dict=False
        )
        assert row.kind == "once"
        assert row.examples[0].ids.tolist() == ids, name


@pytest.mark.slow
def test_templates_of_an_installed_package(assets):
    """All that TRL brings, such as those of Nemotron, LFM2 and models that take contents as parts only."""
    sources = trl_templates()
    if not sources:
        pytest.skip("needs TRL's package: pip install 'sft_jax[parity]'")
    tokenizer = SCRIPT.with_markers(shared_tokenizer(assets / "tokenizers" / "llama3"), list(sources.values()))
    builders = {name: RowBuilder(tokenizer, ChatTemplate(source, tokenizer.special_tokens)) for name, source in sources.items()}
    chats = {shape: CHATS[shape] for shape in TRL_SHAPES}
    assert len(sources) > 60
    assert "\n".join(failures(sources, Tokenizers(tokenizer, in_transformers(tokenizer), builders), chats, guarded=False)) == ""
