"""Asking a contender: its answers and scores, how long one takes, and how many examples serve it best."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sft_jax.comparison.contenders import CANDIDATES, Contender
from sft_jax.comparison.prompts import GAP, Asked, Form, Shelf, ask
from sft_jax.comparison.questions import Question, Questions
from sft_jax.evaluation.generate import generate_ids
from sft_jax.evaluation.samples import Decoding, HeldOut, answer_of, generate_answers, score_answers
from sft_jax.evaluation.scoring import Answer, Scored, Scorer
from sft_jax.evaluation.slots import Generation
from sft_jax.evaluation.text import StopStrings, continuation_text, cut_before
from sft_jax.model.decoder import Decoder

Between = Callable[[str, int, int], None]  # (what is done, so many of, so many)


@dataclass(frozen=True)
class Latency:
    """Seconds from a prompt to its whole answer, one request at a time, on this machine."""

    median: float
    p90: float
    prompts: int


@dataclass(frozen=True)
class Answered:
    """What a contender said."""

    contender: Contender
    asked: Asked
    answers: list[Answer]
    generations: list[Generation]
    scored: dict[str, Scored]
    prompt_tokens: list[int]
    answer_tokens: list[int]  # with the token that ends an answer
    shared_tokens: int  # at the beginning of all prompts, which a server can keep
    latency: Latency | None


class Respondent:
    """A loaded model that questions are put to, always in the same way."""

    def __init__(
        self,
        decoder: Decoder,
        form: Form,
        questions: Questions,
        shelf: Shelf,
        scorers: Mapping[str, Scorer],
        decoding: Decoding,
        between: Between,
    ):
        self._decoder, self._form, self._questions, self._shelf = decoder, form, questions, shelf
        self._scorers, self._decoding, self._between = scorers, decoding, between

    def ask(self, contender: Contender, questions: Sequence[Question]) -> Asked:
        """Returns the prompts of a contender with a known number of examples."""
        return ask(self._form, contender, questions, self._shelf, self._decoding.max_new_tokens)

    def answer(
        self, contender: Contender, asked: Asked, questions: Sequence[Question], timed: int = 0, what: str = "answers"
    ) -> Answered:
        """Returns the answers of a contender to questions with their scores, and the latency of `timed` of them."""
        decoding, tokenizer, stop_ids = self._decoding_of(contender), self._form.tokenizer, self._form.stop_ids
        fitting = [place for place, fits in enumerate(asked.fits) if fits]
        rows = [question.row for question in questions]
        found, made = generate_answers(
            self._decoder, tokenizer, [asked.items[place] for place in fitting], stop_ids, decoding, rows=[rows[place] for place in fitting],
            between=lambda done: self._between(f"{contender.name}: {what}", done, len(fitting)),
        )  # fmt: skip
        answers = [answer_of(tokenizer, item, (), stop_ids, decoding.stop, row) for item, row in zip(asked.items, rows, strict=True)]
        generations = [Generation([], False)] * len(answers)  # of prompts that do not fit
        for place, answer, generation in zip(fitting, found, made, strict=True):
            answers[place], generations[place] = answer, generation
        sizes = [self._generated(item, generation, decoding) for item, generation in zip(asked.items, generations, strict=True)]
        prompts = [asked.items[place].prompt_ids for place in fitting]
        return Answered(
            contender, asked, answers, generations, score_answers(self._scorers, answers), [len(item.prompt_ids) for item in asked.items],
            sizes, shared_beginning(prompts), self._latency(contender, prompts, decoding, timed),
        )  # fmt: skip

    def choose(self, contender: Contender) -> tuple[Contender, str]:
        """Returns a contender with the number of examples that has the best score on the validation rows, and a line that says so.

        Of CANDIDATES those are tried with which every prompt fits, of the scored rows too; of equally good ones the fewest
        win. The score is that of the first scorer.
        """
        name, validation, values = next(iter(self._scorers)), self._questions.validation, {}
        for count in CANDIDATES:
            tried = contender.with_examples(count)
            if count > len(self._shelf):
                break
            asked, scored = (self.ask(tried, rows) for rows in (validation, self._questions.scored))
            if not all(asked.fits + scored.fits):
                break
            values[count] = self.answer(tried, asked, validation, what="answers for validation").scored[name].value
        best = max(values, key=lambda count: (np.nan_to_num(values[count], nan=-np.inf), -count), default=0)
        scores = ", ".join(f"{count}: {value:.4f}" for count, value in values.items()) or "none fits"
        left_out = [str(count) for count in CANDIDATES if count not in values]
        rest = f"; {', '.join(left_out)} would not fit, or are more than there are" if left_out and values else ""
        told = f"chosen by {name} on {len(validation):,} training rows that are neither shown nor scored ({scores}{rest})"
        return contender.with_examples(best), f"{contender.name}: {best} {told}."

    def _generated(self, item: HeldOut, generation: Generation, decoding: Decoding) -> int:
        """Returns how many tokens were generated, with the stop token where one ended the answer."""
        text = continuation_text(self._form.tokenizer, item.prompt_ids, generation.ids) if decoding.stop else ""
        return len(generation.ids) + (generation.finished and cut_before(text, decoding.stop) == text)

    def _decoding_of(self, contender: Contender) -> Decoding:
        """Returns how answers are generated. Where examples are plain text the gap between them ends an answer, too.

        A model without a template goes on with the next example. Where answers have gaps in them nothing can be told by one.
        """
        texts = [each.conversation.completion or "" for each in (*self._questions.scored, *self._shelf)]
        ends = contender.examples is not None and self._form.template is None and not any(GAP in text for text in texts)
        return replace(self._decoding, stop=(*self._decoding.stop, GAP)) if ends else self._decoding

    def _latency(self, contender: Contender, prompts: Sequence[Sequence[int]], decoding: Decoding, count: int) -> Latency | None:
        """Returns how long prompts take that are answered one after the other, evenly spread over all; None where there are none.

        They are answered twice, since programs are compiled the first time.
        """
        count = min(count, len(prompts))
        if not count:
            return None
        chosen = [prompts[place * len(prompts) // count] for place in range(count)]
        for repeat in range(2):
            reached: dict[int, float] = {}  # when so many were done

            def between(done: int, reached=reached, before: int = repeat * count) -> None:
                reached.setdefault(done, time.perf_counter())
                self._between(f"{contender.name}: latency", before + done, 2 * count)

            generate_ids(
                self._decoder, chosen, self._form.stop_ids, decoding.max_new_tokens, options=decoding.options, seed=decoding.seed, batch_size=1,
                stop=StopStrings(self._form.tokenizer, decoding.stop) if decoding.stop else None, between=between,
            )  # fmt: skip
        seconds = np.diff([reached[done] for done in range(count + 1)])
        return Latency(float(np.median(seconds)), float(np.quantile(seconds, 0.9)), count)


def shared_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Returns with how many tokens all prompts begin; 0 where there are fewer than two.

    >>> shared_beginning([[1, 2, 3], [1, 2, 4, 5]])
    2
    """
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in the order of tokens, so all others lie between
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
