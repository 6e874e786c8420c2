"""Talks to a model in the terminal: python -m sft_jax.chat --model DIR_OR_WORKDIR_OR_ADAPTER [--prompt TEXT]

A model with a chat template holds a conversation; one without goes on from what is typed. Ctrl-C ends an answer, Ctrl-C
or Ctrl-D at the prompt ends the chat, /new begins a new one. With --prompt the answer is printed and that is all. Exit
codes: 0 done, 2 wrong input.
"""

import contextlib
import json
import sys
from collections.abc import Generator
from typing import Any

from absl import flags

from sft_jax import cli
from sft_jax.config_checks import check_template_arguments
from sft_jax.decoding_flags import define_decoding_flags
from sft_jax.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory, hub id, or workdir of a run.")
_BASE = flags.DEFINE_string("base", None, "The base of an adapter, where it is not where the adapter says.")
_PROMPT = flags.DEFINE_string("prompt", None, "Print the answer to this, instead of a conversation.")
_SYSTEM = flags.DEFINE_string("system", None, "System message at the start of a conversation.")
_TEMPLATE = flags.DEFINE_string("chat_template", "auto", "auto (the model's own), none, a built-in name or a file.")
_TEMPLATE_KWARGS = flags.DEFINE_string(
    "chat_template_kwargs", None, "Arguments of the template as JSON; default: those that a run was trained with."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Tokens of an answer, at most.")
_DECODING = define_decoding_flags("Of the draws.")
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices over which the model is split.")

_NEW = "/new"


def main() -> None:
    if not _MODEL.value:
        raise UserError("--model: is missing; name a Hugging Face directory, a hub id or the workdir of a run.")

    from sft_jax.evaluation.prompts import prompt_options_of
    from sft_jax.evaluation.session import ChatSession
    from sft_jax.training.platform import set_up_platform

    options = _DECODING.checked()  # refused before anything is loaded
    given = _template_kwargs()
    if _PROMPT.value is None and sys.stdin is None:
        raise UserError("standard input: is closed, so nothing can be typed; give the message with --prompt.")
    asked = prompt_options_of(_MODEL.value)
    if given is not None:
        check_template_arguments("--chat_template_kwargs", given)
        asked["chat_template_kwargs"] = given
    set_up_platform(deterministic=False)
    model, tokenizer = _load()
    session = ChatSession(
        model, tokenizer, system=_SYSTEM.value, chat_template=_TEMPLATE.value,
        max_new_tokens=_MAX_NEW_TOKENS.value, options=options, seed=_DECODING.seed.value, stop=_DECODING.texts, **asked,
    )  # fmt: skip
    if _PROMPT.value is not None:
        _print(session, _PROMPT.value)
    else:
        sys.stdin.reconfigure(errors="replace")
        _talk(session)


def _template_kwargs() -> dict[str, Any] | None:
    """Returns the value of --chat_template_kwargs."""
    if _TEMPLATE_KWARGS.value is None:
        return None
    try:
        value = json.loads(_TEMPLATE_KWARGS.value)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"--chat_template_kwargs: must be a JSON object such as '{{\"enable_thinking\": false}}', not {_TEMPLATE_KWARGS.value!r}."
        )
    return value


def _load():
    """Returns model and tokenizer, with the arithmetic in 16 bits where that is what the model is stored in.

    On a CPU it stays in 32 bits, which is faster there.
    """
    import jax

    from sft_jax.hf.load import load
    from sft_jax.hf.progress import LoadProgress
    from sft_jax.hf.source import find_model, read_source
    from sft_jax.model.options import Options
    from sft_jax.model.sharding import constrain_fn, make_mesh

    dtype = read_source(find_model(_MODEL.value, _BASE.value), _MODEL.value).dtype
    devices = jax.local_devices()
    if not 1 <= _TENSOR.value <= len(devices):
        raise UserError(f"--tensor: must be within 1 and the {len(devices)} devices here, not {_TENSOR.value}.")
    mesh = make_mesh(1, 1, _TENSOR.value, devices[: _TENSOR.value])
    half = dtype in ("bfloat16", "float16") and devices[0].platform != "cpu"
    options = Options(compute_dtype="bfloat16" if half else "float32", constrain=constrain_fn(mesh))
    with LoadProgress(_MODEL.value) as progress:
        model, tokenizer = load(_MODEL.value, options=options, mesh=mesh, progress=progress, base=_BASE.value)
    if tokenizer is None:
        raise UserError(f"{_MODEL.value}: has no tokenizer; put its tokenizer.json or tokenizer.model there.")
    return model, tokenizer


def _talk(session) -> None:
    """Reads what the user types and prints answers until the input ends."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and history
        what = "Type a message" if session.is_chat else "The model has no chat template: it goes on from what you type"
        print(f"{what}. {_NEW} begins anew, Ctrl-D ends.")
    while True:
        try:
            text = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print()
            return
        if text.strip() == _NEW:
            session.clear()
        elif text.strip():
            try:
                _print(session, text)
            except KeyboardInterrupt:
                print(" [stopped]")
            except UserError as error:  # such as a message that the template refuses: the chat goes on
                if not terminal:
                    raise
                print(f"error: {error}", file=sys.stderr)


def _print(session, text: str) -> None:
    answer: Generator[str] = session.answer(text)
    with contextlib.closing(answer):  # an interrupt ends the answer here and now
        for piece in answer:
            print(piece, end="", flush=True)
    print(flush=True)
    if not session.finished:
        print("[cut: the answer reached --max_new_tokens or the end of the model's context]", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, __doc__)
