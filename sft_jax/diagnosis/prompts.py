"""Whether a server that loads what the run has exported asks in the form that was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sft_jax.config import DataConfig
from sft_jax.data.chats.templates import resolve_template
from sft_jax.data.examples import RowError
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.hf.load import load_model_tokenizer

# One question, and a question after an answer: templates differ in how they end earlier turns, too.
_CHATS = (
    [{"role": "user", "content": "What is the time?"}],
    [{"role": "user", "content": "What is the time?"}, {"role": "assistant", "content": "Noon."}, {"role": "user", "content": "And now?"}],
)


class PromptDifference(NamedTuple):
    """A chat of which a server makes another prompt than training did."""

    trained: str  # the prompt, or why there is none
    served: str
    same_text: bool  # the texts are the same and their tokens differ


def compare_prompts(base: str, exported: Path, data: DataConfig) -> PromptDifference | None:
    """Returns the first sample chat whose prompt is another one by the template of `exported`, None where all are the same.

    Of a run without chats (`data.chat_template` "none", or a base without a template) None, since no prompt was trained.
    Raises UserError where the base or the export cannot be read.
    """
    ours, theirs = _tokenizer(base, data.add_tokens), _tokenizer(str(exported))
    if resolve_template(data.chat_template, ours) is None:
        return None
    for chat in _CHATS:
        trained, trained_ids = _prompt(data.chat_template, ours, chat, data.chat_template_kwargs)
        served, served_ids = _prompt("auto", theirs, chat, {})  # a server is told no arguments
        if trained != served or trained_ids != served_ids:
            return PromptDifference(trained, served, trained == served)
    return None


def _tokenizer(path: str, add_tokens: Sequence[str] = ()) -> Tokenizer:
    tokenizer = load_model_tokenizer(path, add_tokens)
    if tokenizer is None:
        raise UserError(f"{path}: has no tokenizer.")
    return tokenizer


def _prompt(setting: str, tokenizer: Tokenizer, chat: list[dict], kwargs: dict) -> tuple[str, list[int]]:
    template = resolve_template(setting, tokenizer)
    if template is None:
        return "no chat template, so chats are refused", []
    try:
        text = template.render(chat, add_generation_prompt=True, **kwargs)
    except RowError as error:
        return f"refused: {error}", []
    return text, list(tokenizer.encode(text))
