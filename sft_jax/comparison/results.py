"""What a comparison found: contenders, pairs of them, advice, and every answer."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sft_jax.comparison.advice import Advice, Entry, Judged, Terms, advise
from sft_jax.comparison.asking import Answered
from sft_jax.comparison.paired import compare_pair, holm
from sft_jax.comparison.questions import Question
from sft_jax.evaluation.results import describe_score


@dataclass(frozen=True)
class Price:
    """Of a million tokens, in any currency."""

    prompt: float
    answer: float
    shared: float | None = None  # of prompt tokens with which all prompts begin; None = as the others


@dataclass(frozen=True)
class Comparison:
    """The answers of all contenders to the same questions."""

    answered: Sequence[Answered]
    questions: Sequence[Question]
    set_name: str
    prices: Mapping[str, Price]  # by model; empty = none was given
    fingerprints: Mapping[str, str | None]  # by model
    notes: Sequence[str]
    seed: int  # of resamples and permutations

    @property
    def scorers(self) -> list[str]:
        """The names of the scorers; advice is by the first."""
        return list(self.answered[0].scored)

    @cached_property
    def pairs(self) -> dict[str, dict[tuple[int, int], Judged]]:
        """By scorer, every two contenders (places, the first below the second) of which some answers count for both."""
        found = {}
        for name in self.scorers:
            judged = {
                places: pair
                for places in itertools.combinations(range(len(self.answered)), 2)
                if (pair := compare_pair(*(self.answered[place].scored[name] for place in places), self.seed)) is not None
            }
            corrected = holm([pair.p for pair in judged.values()])
            found[name] = {places: Judged(pair, p) for (places, pair), p in zip(judged.items(), corrected, strict=True)}
        return found

    def cost(self, answered: Answered) -> float | None:
        """Returns the price of 1,000 requests like these to a contender; None where no price was given."""
        if not self.prices:
            return None
        price = self.prices[answered.contender.model]
        prompt, answer = np.mean(answered.prompt_tokens), np.mean(answered.answer_tokens)
        shared = 0 if price.shared is None else answered.shared_tokens
        total = (prompt - shared) * price.prompt + shared * (price.shared or 0) + answer * price.answer
        return float(1000 * total / 1e6)

    @cached_property
    def advice(self) -> Advice | None:
        """What to take by the first scorer; None where it counts no answer of some contender."""
        name = self.scorers[0]
        first = self.answered[0].contender.model
        pairs = self.pairs[name]
        if len(pairs) < len(self.answered) * (len(self.answered) - 1) // 2:
            return None
        entries = [
            Entry(
                each.contender.name, each.scored[name].value,
                float(1000 * (np.mean(each.prompt_tokens) + np.mean(each.answer_tokens))) if not self.prices else self.cost(each),
                each.contender.model == first,
            )  # fmt: skip
            for each in self.answered
        ]

        def against(one: int, other: int) -> Judged:
            return pairs[one, other] if one < other else pairs[other, one].swapped()

        return advise(entries, against, len(pairs), Terms(name, len(self.questions), bool(self.prices)))

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the answers as JSON values."""
        advice = self.advice
        return {
            "set": self.set_name,
            "rows": len(self.questions),
            "scorers": self.scorers,
            "contenders": [self._contender(each) for each in self.answered],
            "pairs": [
                {
                    "first": self.answered[one].contender.name, "second": self.answered[other].contender.name,
                    "scores": {name: _pair(self.pairs[name][one, other]) for name in self.scorers if (one, other) in self.pairs[name]},
                }
                for one, other in itertools.combinations(range(len(self.answered)), 2)
            ],
            "advice": None if advice is None else {**vars(advice), "sentences": list(advice.sentences)},
            "notes": list(self.notes),
        }  # fmt: skip

    def _contender(self, each: Answered) -> dict[str, Any]:
        contender, latency = each.contender, each.latency
        return {
            "name": contender.name,
            "model": contender.model,
            "model_fingerprint": self.fingerprints[contender.model],
            "system": None if contender.system is None else contender.system._asdict(),
            "examples": None if contender.examples is None else {"count": contender.examples.count, "nearest": contender.examples.nearest},
            "scores": {name: describe_score(scored, self.seed) for name, scored in each.scored.items()},
            "prompt_tokens": float(np.mean(each.prompt_tokens)),
            "answer_tokens": float(np.mean(each.answer_tokens)),
            "shared_tokens": each.shared_tokens,
            "cost_per_1000": self.cost(each),
            "latency": None if latency is None else vars(latency),
            "not_fitting": each.asked.fits.count(False),
            "unfinished": sum(fits and not made.finished for fits, made in zip(each.asked.fits, each.generations, strict=True)),
        }

    def records(self) -> list[dict[str, Any]]:
        """Returns a record for every question and contender, in the order of the data, then of the contenders."""
        values = [{name: scored.of_each() for name, scored in each.scored.items()} for each in self.answered]
        return [
            {
                "set": self.set_name,
                "example": {"file": question.where.file, "line": question.where.line},
                "contender": each.contender.name,
                "prompt": each.answers[place].prompt,
                "reference": each.answers[place].reference,
                "generation": each.answers[place].generation,
                **{name: of_each[place] for name, of_each in scores.items()},
                "finished": each.generations[place].finished,
                "fits": each.asked.fits[place],
                "prompt_tokens": each.prompt_tokens[place],
                "answer_tokens": each.answer_tokens[place],
                "examples": [str(shown.where) for shown in each.asked.shown[place]],
            }
            for place, question in enumerate(self.questions)
            for each, scores in zip(self.answered, values, strict=True)
        ]


def _pair(judged: Judged) -> dict[str, Any]:
    pair = judged.pair
    return {
        "difference": pair.difference, "interval": None if pair.interval is None else list(pair.interval), "p": pair.p, "p_holm": judged.p,
        "exact": pair.exact, "wins": pair.wins, "losses": pair.losses, "ties": pair.ties, "answers": pair.answers,
    }  # fmt: skip
