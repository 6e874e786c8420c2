"""Evaluation on held-out sets: loss over every supervised token, and scores of generated answers."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sft_jax.batch import Batch
from sft_jax.config import Config
from sft_jax.data.pipeline import RowStream
from sft_jax.data.tokens import Tokenizer
from sft_jax.evaluation.prompts import PromptReader, stop_ids_of
from sft_jax.evaluation.samples import HeldOut, evaluate_generations, sample_held_out
from sft_jax.hf.source import Source
from sft_jax.model.loss import LossSum
from sft_jax.model.sharding import batch_sharding, pieces_along

_MAX_EXPONENT = 700.0  # keeps perplexity finite, since JSON has no infinity
_IN_FLIGHT = 2  # batches whose sums are fetched late, so that the host reads rows while devices compute

Values = dict[str, float | int]


class Interrupted(Exception):
    """An evaluation was given up since the run is to stop; it has no result."""


class State(Protocol):
    """The part of the train state that is evaluated."""

    params: nnx.State
    frozen: nnx.State


class EvalData(Protocol):
    """The part of the prepared data that is evaluated on."""

    eval: dict[str, RowStream]
    tokenizer: Tokenizer


def evaluate_loss(
    eval_step: Callable[[Any, Batch], LossSum],
    state: Any,
    stream: RowStream,
    batch_size: int,
    mesh: Mesh | None = None,
    stopping: Callable[[int], bool] = lambda late: False,
) -> Values:
    """Returns the token-weighted loss of a whole set.

    The step gives sums over each document; they are added on the host in float64 and divided once, so that the result
    does not depend on batch size, packing or devices. Padding has no weight.

    Args:
        eval_step: (state, Batch [B, L]) -> LossSum, whole on every process.
        batch_size: rows of a batch over all devices; rounded up to a multiple of the devices that rows are split over.
        stopping: asked between batches with the number of those under way; Interrupted is raised where it says True.

    Returns:
        loss: nats per token, weighted; perplexity: exp(loss); accuracy: weighted share of targets that are the argmax;
        tokens: supervised tokens; examples: documents with a supervised token.
    """
    groups = pieces_along(mesh, "batch") if mesh is not None else 1
    rows = -(-batch_size // groups) * groups
    total = weight = correct = 0.0
    tokens = examples = 0
    waiting: deque[LossSum] = deque()

    def collect() -> None:
        nonlocal total, weight, correct, tokens, examples
        sums: LossSum = jax.device_get(waiting.popleft())
        weights = sums.per_example_weight.astype(np.float64)
        total += float(sums.per_example.astype(np.float64).sum())
        weight += float(weights.sum())
        correct += float(sums.correct)
        tokens += int(sums.count)
        examples += int((weights > 0).sum())

    for first in range(0, stream.total_rows, rows):
        waiting.append(eval_step(state, _read_rows(stream, first, rows, mesh)))
        if len(waiting) > _IN_FLIGHT:
            collect()
        if stopping(len(waiting)):
            raise Interrupted
    while waiting:
        collect()
    if not weight > 0:
        raise ValueError(f"the {stream.total_rows} rows of the set have no supervised token")
    loss = total / weight
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, _MAX_EXPONENT)),
        "accuracy": correct / weight,
        "tokens": tokens,
        "examples": examples,
    }


class Evaluator:
    """Evaluates every eval set of a run, always on the same rows and prompts.

    In a multi-process run every process calls it at the same steps.
    """

    def __init__(
        self,
        config: Config,
        data: EvalData,
        graphdef: nnx.GraphDef,
        eval_step: Callable[[Any, Batch], LossSum],
        mesh: Mesh | None,
        batch_size: int,
        source: Source,
        stopping: Callable[[int], bool] = lambda late: False,
    ):
        """Draws the prompts. `batch_size` is the number of rows of a batch, and of prompts that are answered together.

        `source` is where the model was read from, and says what ends its answers. `stopping` is asked between batches,
        with the number of those under way, whether to give up.
        """
        self._streams, self._tokenizer = data.eval, data.tokenizer
        self._graphdef, self._eval_step, self._mesh, self._batch_size = graphdef, eval_step, mesh, batch_size
        self._max_new_tokens, self._stopping = config.eval.max_new_tokens, stopping
        self._held_out: dict[str, list[HeldOut]] = {}
        if config.eval.generate:
            reader = PromptReader(data.tokenizer, config.data.chat_template, config.data.chat_template_kwargs)
            self._stop_ids = stop_ids_of(source, data.tokenizer, reader)
            for name, stream in data.eval.items():
                self._held_out[name] = sample_held_out(stream, config.eval.generate, config.seed)

    def __call__(self, state: State, step: int) -> tuple[dict[str, Values], list[dict[str, Any]]]:
        """Returns the values of every set by name, and the records of samples.jsonl. Raises Interrupted."""
        results: dict[str, Values] = {}
        records: list[dict[str, Any]] = []
        for name, stream in self._streams.items():
            results[name] = evaluate_loss(self._eval_step, state, stream, self._batch_size, self._mesh, self._stopping)
            if self._held_out:
                values, answered = self._generate(state, name)
                results[name].update(values)
                records += [{"step": step, "set": name, **record} for record in answered]
        return results, records

    def _generate(self, state: State, name: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
        decoder = nnx.merge(self._graphdef, state.params, state.frozen)
        return evaluate_generations(
            decoder, self._tokenizer, self._held_out[name], self._stop_ids,
            max_new_tokens=self._max_new_tokens, batch_size=self._batch_size, between=self._go_on,
        )  # fmt: skip

    def _go_on(self, done: int) -> None:
        if self._stopping(0):
            raise Interrupted


def _read_rows(stream: RowStream, first: int, count: int, mesh: Mesh | None) -> Batch:
    """Returns the rows [first, first + count) on the devices; a process reads the rows of its own devices only."""
    if mesh is None:
        return stream.read(first, count)
    sharding = batch_sharding(mesh)
    places = sharding.addressable_devices_indices_map((count,)).values()
    ranges = [index[0].indices(count) for index in places]
    start, stop = min(begin for begin, _, _ in ranges), max(end for _, end, _ in ranges)
    local = stream.read(first + start, stop - start)

    def place(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            begin, end, _ = index[0].indices(count)
            return array[(slice(begin - start, end - start), *index[1:])]

        return jax.make_array_from_callback((count, *array.shape[1:]), sharding, part)

    return Batch(*map(place, local))
