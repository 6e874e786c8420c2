"""What a run exports as its chat template renders without arguments what training rendered with them, in transformers too."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from sft_jax.data.chats.template_defaults import with_defaults
from sft_jax.data.chats.templates import TEMPLATES, ChatTemplate
from sft_jax.data.examples import RowError

CHAT = [{"role": "user", "content": "What is the time?"}, {"role": "assistant", "content": "Noon."}, {"role": "user", "content": "And now?"}]
ARGUMENTS = {"enable_thinking": False, "thinking": True, "builtin_tools": ["search"], "date_string": "1 May", "reasoning_effort": "high"}
VALUES = {
    "text": "\"'\\\n\r\t%} }} {# {{ é 😀 \x7f", "number": -3, "large": 10**20, "small": 1e-7, "nothing": None, "no": False,
    "parts": [1.5, {"a key": [True, "x"]}, []], "empty": {},
}  # fmt: skip


def served(source: str, **kwargs) -> str:
    (rendered,), _ = render_jinja_template([CHAT], chat_template=source, add_generation_prompt=True, **kwargs)
    return rendered


def test_the_worked_example():
    source = with_defaults(ChatTemplate("{{ messages }}"), {"enable_thinking": False})
    assert source == "{% set enable_thinking = enable_thinking if enable_thinking is defined else false %}\n{{ messages }}"
    assert with_defaults(ChatTemplate(source), {"enable_thinking": False}) == source
    assert with_defaults(ChatTemplate("x"), {}) == "x" == with_defaults(ChatTemplate("x"), {"not": 1, "a-b": 2, "true": 3})


def test_the_arguments_of_a_run_are_what_a_server_renders_and_what_it_is_given_wins(stock):
    read = set()
    tokens, otherwise = {"bos_token": "<s>", "eos_token": "</s>"}, {**ARGUMENTS, "enable_thinking": True}
    for name, source in {**stock, **TEMPLATES}.items():
        if "strftime_now" in source:
            continue  # the clock may pass midnight
        template = ChatTemplate(source, tokens)
        exported = with_defaults(template, ARGUMENTS)
        try:
            trained, other, plain = (template.render(CHAT, True, **given) for given in (ARGUMENTS, otherwise, {}))
        except RowError:
            continue
        assert served(exported, **tokens) == trained == ChatTemplate(exported, tokens).render(CHAT, True), name
        assert served(exported, **tokens, enable_thinking=True) == other, name
        read |= {name} if trained != plain else set()
    assert len(read) >= 3  # templates that read one of them


@pytest.mark.parametrize("begin", ["", "\n", "  ", "  {% if true %}\n  {% endif %}", "{#- a comment -#}\n"])
def test_every_value_is_the_same_one_and_white_space_stays(begin):
    names = list(VALUES)
    source = begin + "{% macro show(x) %}{{ x }}{% endmacro %}" + "|".join(f"{{{{ show({name}) }}}}{{{{ {name} | tojson }}}}" for name in names)
    template = ChatTemplate(source)
    assert served(with_defaults(template, VALUES)) == template.render(CHAT, True, **VALUES)
    given = dict.fromkeys(names, None)
    assert served(with_defaults(template, VALUES), **given) == template.render(CHAT, True, **given)
