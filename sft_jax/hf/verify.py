"""Reading an export back and comparing it with the live model, before anybody is told that it is done."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.data.chats.templates import ChatTemplate
from sft_jax.data.examples import RowError
from sft_jax.data.tokenizers.tokens import Tokenizer, load_tokenizer
from sft_jax.hf.files import equal_bytes, open_tensors
from sft_jax.hf.gather import carried_tensors
from sft_jax.hf.load import load_decoder
from sft_jax.hf.source import GENERATION_CONFIG, Source, read_source
from sft_jax.model.decoder import Decoder
from sft_jax.model.layers import dtype_of
from sft_jax.model.sharding import is_variable, named_leaves

LOGIT_TOLERANCE = 1e-4  # of the largest logit
_LENGTH = 32  # tokens of a compared row

PROMPTS = (
    "Hello",
    "What is 12 x 34?\nAnswer:",
    " leading space, tab\t, two\n\nnewlines ",
    "naïve ½ 漢字 🤗 def f(x): return {'k': x[0]}",
)


class ExportMismatch(Exception):
    """What was written is not the model that was to be written; the message says where they differ."""


@dataclass(frozen=True)
class ExportReport:
    """What was compared, and how well it agreed."""

    parameters: int  # compared bit by bit
    carried: int  # tensors that are no parameters and were copied from the base
    logit_difference: float  # largest, between the reloaded model and the live one in the dtype of the export
    rounding_difference: float  # largest, between the live model in the dtype of the export and in its own
    prompts: int  # whose token ids were compared
    refused_prompts: int  # conversations that the chat template does not accept
    stop_ids: tuple[int, ...]

    def __str__(self) -> str:
        """Returns the report as the end of a line that says what was written."""
        text = (
            f"{self.parameters:,} parameters and {self.prompts} prompts equal, logits within {self.logit_difference:.1e}, "
            f"stop ids {list(self.stop_ids)}"
        )
        if self.carried:
            text += f"; {self.carried} tensors beside the language model equal those of the base"
        if self.rounding_difference:
            text += f"; rounding to the dtype of the export moved logits by up to {self.rounding_difference:.1e}"
        if self.refused_prompts:
            text += f"; the chat template refused {self.refused_prompts} of {len(PROMPTS)} sample conversations"
        return text


def verify_export(
    folder: Path, decoder: Decoder, tokenizer: Tokenizer | None, stop_ids: Sequence[int], dtype: str | None = None
) -> ExportReport:
    """Compares the directory `folder` with the model that it was written from, cast to `dtype` where that is given.

    Parameters, and tensors copied from the base, must be equal bit by bit, logits within 1e-4 of the largest, the ids
    of sample prompts and the template equal, and generation stop at `stop_ids` and whatever the source stops at.
    Raises ExportMismatch.
    """
    tokens = _sample_tokens(decoder.spec.vocab_size, tokenizer)
    live = _logits(decoder, tokens)
    # The rounded copy is gone before the reloaded one is made: at the end of a run the optimizer's state is there too.
    logits = live if dtype is None else _logits(_cast(decoder, dtype), tokens)
    exported = load_decoder(folder, decoder.options, _mesh(decoder))
    exported.source = decoder.source  # the same static part, so that one compilation serves both
    parameters = _compare_parameters(exported, decoder, dtype)
    carried = _compare_carried(folder, decoder)
    difference = _largest(_logits(exported, tokens) - logits)
    if not difference <= LOGIT_TOLERANCE * max(1.0, _largest(logits)):  # also where it is NaN
        raise ExportMismatch(
            f"{folder}: logits differ from the live model's by {difference:.3g} of {_largest(logits):.3g}."
        )
    rounding = _largest(live - logits)
    prompts, refused = (0, 0) if tokenizer is None else _compare_prompts(folder, tokenizer)
    stops = _compare_stop_ids(folder, decoder.source, tokenizer, stop_ids)
    return ExportReport(parameters, carried, difference, rounding, prompts, refused, stops)


def _mesh(decoder: Decoder) -> Mesh | None:
    sharding = named_leaves(decoder)[0][1].get_value().sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _cast(decoder: Decoder, dtype: str) -> Decoder:
    layout = jax.tree.map(lambda leaf: leaf.sharding, decoder)
    cast = lambda leaf: leaf.replace(leaf.get_value().astype(dtype_of(leaf, dtype)))  # noqa: E731
    return jax.jit(lambda tree: jax.tree.map(cast, tree, is_leaf=is_variable), out_shardings=layout)(decoder)


def _compare_parameters(exported: Decoder, decoder: Decoder, dtype: str | None) -> int:
    """Returns how many numbers were compared; parameters of `decoder` are cast one at a time."""
    count = 0
    for (path, ours), (_, leaf) in zip(named_leaves(exported), named_leaves(decoder), strict=True):
        ours, theirs = ours.get_value(), leaf.get_value()
        theirs = theirs.astype(dtype_of(leaf, dtype) if dtype else theirs.dtype)
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise ExportMismatch(
                f"{path}: was written as {ours.dtype} {ours.shape}, but is {theirs.dtype} {theirs.shape}."
            )
        different = int(_on_every_device(_count_different, ours)(ours, theirs).block_until_ready())
        if different:
            raise ExportMismatch(f"{path}: {different} of {ours.size} numbers differ from the live model's.")
        count += ours.size
    return count


def _compare_carried(folder: Path, decoder: Decoder) -> int:
    """Returns how many tensors were copied from the base; the first process compares their bytes."""
    base, written = carried_tensors(decoder), open_tensors(folder)
    for name, info in base.tensors.items() if jax.process_index() == 0 else ():
        found = written.tensors.get(name)
        same = found is not None and (found.shape, found.dtype) == (info.shape, info.dtype)
        if not same or not equal_bytes(written, name, base, name):
            raise ExportMismatch(f"{folder}: tensor '{name}' is not that of {base.folder}, which it was copied from.")
    return len(base.tensors)


def _count_different(x: jax.Array, y: jax.Array) -> jax.Array:
    bits = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16
    same = jax.lax.bitcast_convert_type(x, bits) == jax.lax.bitcast_convert_type(y, bits)
    return jnp.sum(~same, dtype=jnp.uint32)


def _logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Returns the logits [B, L, V] of one model, in every process."""
    forward = _on_every_device(_forward, named_leaves(decoder)[0][1].get_value())
    return np.asarray(forward(decoder, tokens).block_until_ready())


def _forward(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    return decoder(tokens)


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def _on_every_device(function: Callable, like: jax.Array) -> Callable:
    """Returns `function` compiled, its results readable in every process."""
    return _jit(function, NamedSharding(like.sharding.mesh, P()) if isinstance(like.sharding, NamedSharding) else None)


@functools.lru_cache(maxsize=16)
def _jit(function: Callable, sharding: NamedSharding | None) -> Callable:
    return jax.jit(function, out_shardings=sharding)


def _sample_tokens(vocab_size: int, tokenizer: Tokenizer | None) -> np.ndarray:
    """Returns two rows of ids: the sample prompts, and random ids of the whole vocabulary."""
    drawn = np.random.default_rng(0).integers(0, vocab_size, (2, _LENGTH), np.int32)
    if tokenizer is not None:
        ids = [token for prompt in PROMPTS for token in tokenizer.encode(prompt) if token < vocab_size][:_LENGTH]
        drawn[0, : len(ids)] = ids
    return drawn


def _compare_prompts(folder: Path, tokenizer: Tokenizer) -> tuple[int, int]:
    exported = load_tokenizer(folder)
    for name in ("chat_template", "plain_prefix", "bos_id", "eos_id", "added_tokens", "special_added_tokens"):
        ours, theirs = getattr(exported, name), getattr(tokenizer, name)
        if ours != theirs:
            raise ExportMismatch(
                f"{folder}: the tokenizer's {name} was written as {ours!r:.200}, but is {theirs!r:.200}."
            )
    added = list(tokenizer.added_tokens)  # those that a run added are the last ones
    texts = [*PROMPTS, *(f"a{text}b" for text in dict.fromkeys(added[:32] + added[-32:]))]
    refused = 0
    if tokenizer.chat_template is not None:
        template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        for prompt in PROMPTS:
            try:
                texts.append(template.render([{"role": "user", "content": prompt}], add_generation_prompt=True))
            except RowError:
                refused += 1
    for text in texts:
        ours, theirs = exported.encode(text), tokenizer.encode(text)
        if list(ours) != list(theirs):
            raise ExportMismatch(
                f"{folder}: the tokenizer was written so that {text!r} has the ids {ours}, not {theirs}."
            )
    return len(texts), refused


def _compare_stop_ids(
    folder: Path, source: Source, tokenizer: Tokenizer | None, stop_ids: Sequence[int]
) -> tuple[int, ...]:
    exported = read_source(folder, str(folder)).stop_ids()
    expected = {*source.stop_ids(), *(int(token) for token in stop_ids)}
    if not expected and tokenizer is not None and tokenizer.eos_id is not None:
        expected = {tokenizer.eos_id}
    if set(exported) != expected:
        raise ExportMismatch(
            f"{folder / GENERATION_CONFIG}: generation stops at {sorted(exported)}, not at {sorted(expected)}."
        )
    return exported
