"""BLEU and chrF as sacrebleu computes them: from counts over all answers, not as means of scores."""

import functools
from collections.abc import Sequence

import numpy as np

from sft_jax.errors import UserError
from sft_jax.evaluation.scoring import Answer, Scorer, Sums


def _package():
    try:
        import sacrebleu
    except ImportError as error:
        raise UserError("bleu, chrf: need the package sacrebleu; install it with pip install 'sft_jax[scorers]'.") from error
    return sacrebleu


def bleu(argument: str | None) -> Scorer:
    """Returns the scorer of BLEU, 0 to 100 (Papineni et al. 2002; Post 2018, arXiv:1804.08771); `argument` is a tokenizer of sacrebleu."""
    package = _package()
    try:
        metric = package.BLEU(tokenize=argument or "13a")
    except Exception as error:  # an unknown name is an assertion, one whose package is missing a RuntimeError
        raise UserError(f"bleu: sacrebleu has no tokenizer {argument!r}, or not its package ({error}); leave it out for 13a.") from error
    # An answer of fewer than four words has no runs of four; by itself it is scored by the runs that it can have, as by sentence_bleu.
    alone = package.BLEU(tokenize=argument or "13a", effective_order=True)
    return Scorer(
        functools.partial(_statistics, metric), functools.partial(_value, metric), _has_reference, alone=functools.partial(_value, alone)
    )


def chrf(argument: str | None) -> Scorer:
    """Returns the scorer of chrF, 0 to 100 (Popović 2015); with the argument 2 that of chrF++, which counts pairs of words too."""
    if argument not in (None, "0", "1", "2"):
        raise UserError(f"chrf: its argument is the longest run of words that is counted, 0, 1 or 2, not {argument!r}.")
    metric = _package().CHRF(word_order=int(argument or 0))
    return Scorer(functools.partial(_statistics, metric), functools.partial(_value, metric), _has_reference)


# Sacrebleu has no public function for the counts of one answer; these two methods are what its own bootstrap is made of.
def _statistics(metric, answer: Answer) -> Sequence[float]:
    (counts,) = metric._extract_corpus_statistics([answer.generation], [[answer.reference]])
    return counts


def _value(metric, sums: Sums) -> np.ndarray:
    flat = np.asarray(sums, np.float64).reshape(-1, np.shape(sums)[-1])
    values = [metric._compute_score_from_stats([int(count) for count in row]).score for row in np.rint(flat)]
    return np.array(values).reshape(np.shape(sums)[:-1])


def _has_reference(statistics: Sequence[float]) -> bool:
    return bool(np.any(np.asarray(statistics) > 0))
