"""Contracts "mask" and "boundary": what is supervised is what a server would see generated, and nothing else.

Every published template, every shape of conversation, three real tokenizers. The reference is transformers: its
renders, its ids. Where turns end is a table made by hand.
"""

import unicodedata

import numpy as np
import pytest

from chat_cases import CHATS, END_OF_TURN, GUARDED_CHATS, as_dicts, reference_render, template_classes_script
from sft_jax.data.chat import RowBuilder
from sft_jax.data.conversation import Conversation
from sft_jax.data.examples import BadRow
from sft_jax.data.templates import ChatTemplate
from sft_jax.data.tokens import load_tokenizer

pytest.importorskip("transformers")
SCRIPT = template_classes_script()


@pytest.fixture(scope="module", params=["llama3", "qwen3", "llama2"])
def tokenizers(request, assets):
    """A tokenizer of ours and the same from transformers."""
    from transformers import AutoTokenizer

    folder = assets / "tokenizers" / request.param
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def sources(assets):
    return SCRIPT.stock_templates(assets)


def runs(example):
    """Returns the (start, end) of each stretch of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.weights > 0, [0]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


class Reference:
    """What transformers says about one conversation under one template."""

    def __init__(self, source, name, messages, reference):
        self.source, self.messages, self.reference = source, messages, reference
        self.variables = {**reference.special_tokens_map, **SCRIPT.KWARGS.get(name, {})}
        self.end = END_OF_TURN[name].format(eos=reference.eos_token)
        if name == "GLM-4.6" and self.end not in reference.get_added_vocab():
            self.end = reference.eos_token
        self.turns = [index for index, message in enumerate(messages) if message.role == "assistant"]

    def render(self, count, prompt):
        return reference_render(self.source, self.messages[:count], prompt, self.variables)

    def ids(self, text):
        return self.reference(text, add_special_tokens=False)["input_ids"]

    def prompt(self, turn):
        return self.render(turn, True)

    def answers(self, turn):
        """Returns what may follow the prompt: the render from there to the end of the turn.

        Where the render does not begin with the prompt: the content, as it is or trimmed, and the end of the turn.
        """
        prompt, shown = self.prompt(turn), self.render(turn + 1, False)
        if self.end not in shown[len(prompt) :]:
            shown += self.end
        if shown.startswith(prompt):
            return {shown[len(prompt) : shown.rindex(self.end, len(prompt)) + len(self.end)]}
        content = self.messages[turn].content
        return {content + self.end, content.strip() + self.end}

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
    """Compares texts up to the normalisation that tokenizers do."""
    return unicodedata.normalize("NFC", got) == unicodedata.normalize("NFC", wanted)


def check_row(row, expected, tokenizer, guarded):
    """Yields what is wrong with a row."""
    left = {turn: (expected.prompt(turn), expected.answers(turn)) for turn in expected.turns}
    for example in row.examples:
        if row.kind == "once" and not guarded:
            whole = expected.ids(expected.render(len(expected.messages), False))
            if example.ids.tolist()[: len(whole)] != whole:
                yield "the ids are not those of apply_chat_template"
            if len(example.ids) > len(whole) and tokenizer.decode(example.ids[len(whole) :]) != expected.end:
                yield "something was put after the render"
        for start, end in runs(example):
            before, until = tokenizer.decode(example.ids[:start]), tokenizer.decode(example.ids[:end])
            answer = until[len(before) :]
            for turn, (prompt, answers) in left.items():
                known = example.ids[:start].tolist() == expected.ids(prompt) if not guarded else same(before, prompt)
                # White space after an end-of-turn that is plain text may share its last token.
                if known and any(same(answer, text) or same(answer.rstrip(), text) for text in answers):
                    del left[turn]
                    break
            else:
                yield f"supervised: {answer!r} after {before[-80:]!r}"
    for prompt, answers in left.values():
        yield f"not supervised: {answers} after {prompt[-80:]!r}"


def failures(sources, tokenizers, chats, guarded):
    tokenizer, reference = tokenizers
    wrong, checked = [], 0
    for name, source in sources.items():
        template = ChatTemplate(source, tokenizer.special_tokens)
        builder = RowBuilder(tokenizer, template, template_kwargs=SCRIPT.KWARGS.get(name, {}))
        rows = builder.build([Conversation(messages=messages) for messages in chats.values()])
        for (shape, messages), row in zip(chats.items(), rows, strict=True):
            expected = Reference(source, name, messages, reference)
            if isinstance(row, BadRow) or expected.refuses():
                if isinstance(row, BadRow) != expected.refuses():
                    wrong.append(f"{name}, {shape}: {row}")
                continue
            checked += 1
            wrong += [f"{name}, {shape}: {problem}" for problem in check_row(row, expected, tokenizer, guarded)]
    assert checked > len(sources) * len(chats) // 2
    return wrong


def test_supervised_text_and_prompt_ids(sources, tokenizers):
    assert "\n".join(failures(sources, tokenizers, CHATS, guarded=False)) == ""


def test_supervised_text_where_content_holds_control_tokens(sources, tokenizers):
    assert "\n".join(failures(sources, tokenizers, GUARDED_CHATS, guarded=True)) == ""


def test_every_template_has_an_entry_in_the_table(sources):
    assert set(sources) == set(END_OF_TURN)


def test_once_is_apply_chat_template(sources, tokenizers):
    """The ids through the whole of transformers' own function, template arguments and all."""
    tokenizer, reference = tokenizers
    for name in ("Qwen-Qwen3-0.6B", "meta-llama-Llama-3.1-8B-Instruct", "built-in/chatml", "trl/phi3"):
        row = RowBuilder(tokenizer, ChatTemplate(sources[name], tokenizer.special_tokens)).build(
            [Conversation(messages=CHATS["one turn"])]
        )[0]
        assert row.kind == "once"
        ids = reference.apply_chat_template(as_dicts(CHATS["one turn"]), chat_template=sources[name], return_dict=False)
        assert row.examples[0].ids.tolist() == ids, name
