"""The form in which a template takes contents: text, or OpenAI's list of parts, as templates of some multimodal models do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sft_jax.data.examples import RowError

_PROBE = [{"role": "user", "content": "Probed question?"}, {"role": "assistant", "content": "Probed answer."}]


def in_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages with each text in a list of one part.

    >>> in_parts([{"role": "user", "content": "Hi"}])
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]}]
    """
    result = []
    for message in messages:
        text = message["content"]
        result.append({**message, "content": [{"type": "text", "text": text}] if isinstance(text, str) else text})
    return result


def takes_parts(render: Callable[[Sequence[Mapping[str, Any]]], str]) -> bool:
    """Returns whether a template shows contents as lists of parts only: Idefics, SmolVLM and LLaVA lose plain text.

    Servers tell these by reading the template (vLLM, `--chat-template-content-format auto`) and give them parts.
    """

    def shows(messages: Sequence[Mapping[str, Any]]) -> bool:
        try:
            text = render(messages)
        except RowError:
            return False
        return all(message["content"] in text for message in _PROBE) and "'text'" not in text

    return not shows(_PROBE) and shows(in_parts(_PROBE))
