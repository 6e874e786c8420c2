"""Evaluation on held-out sets: loss over every supervised token, and scores of generated answers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from flax import nnx
from jax.sharding import Mesh

from sft_jax.config import Config
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.evaluation.choices import read_choices
from sft_jax.evaluation.held_out_rows import HeldOutRows, Slices
from sft_jax.evaluation.likelihoods import likelihoods
from sft_jax.evaluation.losses import Interrupted, evaluate_documents, supervised_bytes
from sft_jax.evaluation.prompts import PromptReader, stop_ids_of
from sft_jax.evaluation.results import SetResult
from sft_jax.evaluation.samples import HeldOut, decoding_of, generate_answers, sample_held_out, sample_records, score_answers
from sft_jax.evaluation.scorers import find_scorers
from sft_jax.evaluation.scoring import Answer
from sft_jax.evaluation.step import EvalStep, State
from sft_jax.hf.source import Source

Between = Callable[[str, int, int], None]  # (what is done in which set, so many of, so many)


class EvalData(Protocol):
    """The part of the prepared data that is evaluated on."""

    eval: dict[str, RowStream]
    tokenizer: Tokenizer


class Evaluator:
    """Evaluates every eval set of a configuration, always on the same rows and prompts.

    In a multi-process run every process calls it at the same steps.
    """

    def __init__(
        self,
        config: Config,
        data: EvalData,
        graphdef: nnx.GraphDef,
        eval_step: EvalStep,
        mesh: Mesh | None,
        batch_size: int,
        source: Source,
        stopping: Callable[[int], bool] = lambda late: False,
        slices: Mapping[str, Slices] | None = None,
        progress: Between = lambda what, done, total: None,
    ):
        """Draws the prompts.

        Args:
            eval_step: gives sums whole on every process.
            batch_size: rows of a batch, and prompts that are answered together.
            source: where the model was read from; it says what ends its answers.
            stopping: asked between batches, with the number of those under way, whether to give up.
            slices: by set, what its records tell apart, see `slices_of`.
            progress: takes note of what is done.
        """
        self._config, self._streams, self._tokenizer = config, data.eval, data.tokenizer
        self._graphdef, self._eval_step, self._mesh, self._batch_size = graphdef, eval_step, mesh, batch_size
        self._stopping, self._progress = stopping, progress
        self._slices, self._decoding = slices or {}, decoding_of(config.eval, batch_size)
        self._sizes = {name: supervised_bytes(stream, data.tokenizer) for name, stream in data.eval.items()}
        self._held_out: dict[str, list[HeldOut]] = {}
        if config.eval.generate:
            self._scorers = find_scorers(config.eval.scorers, "eval.scorers")
            self._columns = {scorer.choices for scorer in self._scorers.values() if scorer.choices is not None}
            self._needs_rows = bool(self._columns) or any(scorer.needs_row for scorer in self._scorers.values())
            reader = PromptReader(data.tokenizer, config.data.chat_template, config.data.chat_template_kwargs)
            self._stop_ids = stop_ids_of(source, data.tokenizer, reader)
            count = None if config.eval.generate < 0 else config.eval.generate
            for name, stream in data.eval.items():
                self._held_out[name] = sample_held_out(stream, count, config.seed)

    def __call__(self, state: State, step: int) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """Returns by name what the log says of every set (`SetResult.record`), and the records of samples.jsonl. Raises Interrupted."""
        results = self.evaluate(state)
        records = [{"step": step, "set": name, **record} for name, result in results.items() for record in result.records]
        seed = self._config.seed
        return {name: result.record(self._slices.get(name, {}), seed) for name, result in results.items()}, records

    def evaluate(self, state: State) -> dict[str, SetResult]:
        """Returns the result of every set by name. Raises Interrupted."""
        results = {}
        for name, stream in self._streams.items():
            stopping = self._watched(f"{name}: loss", stream.total_rows)
            documents = evaluate_documents(
                self._eval_step, state, stream, self._batch_size, self._mesh, stopping, self._sizes[name]
            )
            results[name] = SetResult(documents)
            if self._held_out:
                results[name] = self._with_answers(results[name], state, name)
        return results

    def _with_answers(self, result: SetResult, state: State, name: str) -> SetResult:
        held_out, decoder = self._held_out[name], nnx.merge(self._graphdef, state.params, state.frozen)
        asked = [item.document for item in held_out]
        held = HeldOutRows(self._streams[name], self._config.data, name) if self._needs_rows else None
        answers, generations = generate_answers(
            decoder, self._tokenizer, held_out, self._stop_ids, self._decoding,
            rows=held.rows(asked) if held is not None else None, between=self._go_on(f"{name}: answers", len(held_out)),
        )  # fmt: skip
        by_column = {column: self._with_choices(answers, held, asked, column, state, name) for column in self._columns}
        scored = {}
        for scorer_name, scorer in self._scorers.items():
            of = answers if scorer.choices is None else by_column[scorer.choices]
            scored |= score_answers({scorer_name: scorer}, of)
        return SetResult(result.documents, asked, scored, sample_records(held_out, answers, generations, scored))

    def _with_choices(
        self, answers: list[Answer], held: HeldOutRows, asked: list[int], column: str, state: State, name: str
    ) -> list[Answer]:
        def score(sequences):
            between = self._go_on(f"{name}: choices", len(sequences))
            return likelihoods(self._eval_step, state, sequences, self._batch_size, self._mesh, between)

        choices = read_choices(held, asked, column, self._tokenizer, self._config, score)
        return [replace(answer, choices=of_row) for answer, of_row in zip(answers, choices, strict=True)]

    def _watched(self, what: str, total: int) -> Callable[[int], bool]:
        """Returns `stopping`, which also tells that one more batch of the `total` rows was begun."""
        rows = 0

        def stopping(late: int) -> bool:
            nonlocal rows
            rows = min(rows + self._batch_size, total)
            self._progress(what, rows, total)
            return self._stopping(late)

        return stopping

    def _go_on(self, what: str, total: int) -> Callable[[int], None]:
        def between(done: int) -> None:
            self._progress(what, done, total)
            if self._stopping(0):
                raise Interrupted

        return between
