"""Makes tests/goldens/template_classes.json: how each published chat template turns conversations into examples.

    python scripts/make_template_classes.py --assets ../shared/assets

For each template and shape of conversation the table says "once", "cut" or "per_turn" (see
sft_jax.data.examples.BuiltRow), with what is counted, or "refused" with the reason. The tokenizer is Llama 3's with the
markers of all templates as special tokens, so that each template finds its control tokens, as in its own model.
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from sft_jax.data.chats.chat import RowBuilder
from sft_jax.data.chats.templates import TEMPLATES, ChatTemplate
from sft_jax.data.examples import BadRow
from sft_jax.data.formats.conversation import Conversation, Message
from sft_jax.data.formats.tool_calls import Call
from sft_jax.data.tokenizers.hf_tokenizer import HFTokenizer
from sft_jax.data.tokenizers.tokens import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "tests" / "goldens" / "template_classes.json"

# Arguments without which a template renders nothing at all: it reads them without asking whether they are there.
KWARGS: dict[str, dict[str, Any]] = {
    "CohereForAI-c4ai-command-r-plus-tool_use": {"tools": []},
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": {"tools": []},
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": {"tools": []},
    "meetkai-functionary-medium-v3.1": {"tools": []},
    "fireworks-ai-llama-3-firefunction-v2": {"functions": "[]", "datetime": "2024-06-01"},
}

_USER = [Message("user", text) for text in ("What is 17 + 25?", "And times two?", "Thanks. Why?")]
_ANSWERS = ("42.", "84.", "Because 2 x 42 = 84.")
_PLAIN = [Message("assistant", text) for text in _ANSWERS]
_THOUGHT = [Message("assistant", f"<think>\nSum {n}.\n</think>\n\n{text}") for n, text in enumerate(_ANSWERS)]
_REASONED = [Message("assistant", text, reasoning=f"Sum {n}.") for n, text in enumerate(_ANSWERS)]
_CALL = Message("assistant", "", calls=(Call("add", {"of": "17 and 25"}, '{"of": "17 and 25"}', "call00001"),))
_RESULT = Message("tool", '{"sum": 42}', call_id="call00001", name="add")
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds numbers.",
        "parameters": {"type": "object", "properties": {"of": {"type": "string", "description": "Which."}}, "required": ["of"]},
    },
}
_SYSTEM = Message("system", "You are a calculator.")


def _turns(answers: list[Message]) -> tuple[Message, ...]:
    return tuple(message for pair in zip(_USER, answers, strict=True) for message in pair)


SHAPES: dict[str, tuple[Message, ...]] = {
    "one turn": _turns(_PLAIN)[:2],
    "three turns": _turns(_PLAIN),
    "system": (_SYSTEM, *_turns(_PLAIN)[:2]),
    "system, three turns": (_SYSTEM, *_turns(_PLAIN)),
    "thinking": _turns(_THOUGHT)[:2],
    "thinking, three turns": _turns(_THOUGHT),
    "reasoning field": _turns(_REASONED)[:2],
    "reasoning field, three turns": _turns(_REASONED),
    "tool result": (_USER[0], Message("assistant", "I look it up."), Message("tool", '{"sum": 42}'), _PLAIN[0]),
    "tool call": (_USER[0], _CALL, _RESULT, _PLAIN[0]),
    "tool call, thinking": (_USER[0], replace(_CALL, reasoning="I add."), _RESULT, _PLAIN[0]),
    "two users in a row": (_USER[0], _USER[1], _PLAIN[0]),
    "ends with user": (*_turns(_PLAIN)[:2], _USER[1]),
}


def stock_templates(assets: Path) -> dict[str, str]:
    """Returns name -> source of every published template, and of our own."""
    folder = assets / "chat_templates"
    stock = {path.stem: path.read_text() for path in sorted((folder / "stock").glob("*.jinja"))}
    pairs = sorted((folder / "with_generation_tag").glob("*.stock.jinja"))
    pairs = {f"trl/{path.name.removesuffix('.stock.jinja')}": path.read_text() for path in pairs}
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    cases = {f"llama.cpp/{case['name'].partition(' (')[0]}": case["template"] for case in cases}
    return {**stock, **pairs, **cases, **{f"built-in/{name}": source for name, source in TEMPLATES.items()}}


def with_markers(tokenizer: HFTokenizer, sources: list[str]) -> HFTokenizer:
    """Returns the tokenizer with all that looks like a control token in `sources` as special tokens."""
    markers = {marker for source in sources for marker in re.findall(r"<\|?[\w｜▁/]+\|?>|\[/?[A-Z_]+\]", source)}
    values, files = tokenizer.state()
    backend = tokenizers.Tokenizer.from_str(files["backend"].decode())
    backend.add_special_tokens(
        [tokenizers.AddedToken(text, special=True) for text in sorted(markers | {"<s>", "</s>"})]
    )
    added = {token.content: number for number, token in sorted(backend.get_added_tokens_decoder().items())}
    values = {
        **values,
        "added_tokens": added,
        "special_added_tokens": sorted(added),
        "vocab_size": max(added.values()) + 1,
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
        "bos_id": added["<s>"],
        "eos_id": added["</s>"],
    }
    return HFTokenizer.from_state(values, {**files, "backend": backend.to_str().encode()})


def classify(template: ChatTemplate, tokenizer: Tokenizer, kwargs: dict[str, Any]) -> dict[str, str]:
    """Returns shape -> class, with what is counted, or the reason of a refusal."""
    builder = RowBuilder(tokenizer, template, template_kwargs=kwargs)
    tools = [(_TOOL,) if _RESULT in messages else None for messages in SHAPES.values()]
    rows = builder.build([Conversation(messages=messages, tools=tool) for messages, tool in zip(SHAPES.values(), tools, strict=True)])
    result = {"end of turn": builder.end_of_turn}
    for shape, row in zip(SHAPES, rows, strict=True):
        if isinstance(row, BadRow):
            result[shape] = f"refused: {row.reason}"
        else:
            counts = ", ".join(f"{name} {count}" for name, count in sorted(row.counts.items()) if name != "per_turn")
            result[shape] = row.kind + (f" ({counts})" if counts else "")
    return result


def make_table(assets: Path, base: Tokenizer) -> dict[str, dict[str, str]]:
    """Returns template -> shape -> class; `base` is the tokenizer that gets the markers of all templates."""
    sources = stock_templates(assets)
    tokenizer = with_markers(base, list(sources.values()))
    return {
        name: classify(ChatTemplate(source, tokenizer.special_tokens), tokenizer, KWARGS.get(name, {}))
        for name, source in sources.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, required=True, help="folder with chat_templates and tokenizers")
    parser.add_argument("--out", type=Path, default=GOLDEN)
    arguments = parser.parse_args()
    table = make_table(arguments.assets, load_tokenizer(arguments.assets / "tokenizers" / "llama3"))
    arguments.out.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
