"""What is computed with the models of a run: the base, the trained one and the export, one in memory at a time."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sft_jax.config import Config
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.diagnosis.bars import Bars, no_bars
from sft_jax.diagnosis.finding import EXPORTED_WEIGHTS, OWN_SAMPLES, Divergence, Evidence, Measured, TextLoss
from sft_jax.diagnosis.health import health_of
from sft_jax.errors import UserError
from sft_jax.evaluation.bootstrap import interval
from sft_jax.evaluation.decoding import round_up
from sft_jax.evaluation.evals import Between
from sft_jax.evaluation.generate import generate_ids
from sft_jax.evaluation.likelihoods import likelihoods
from sft_jax.evaluation.offline import Subject, open_decoder, open_held_out, open_tokenizer_of
from sft_jax.evaluation.prompts import PromptReader, stop_ids_of
from sft_jax.evaluation.samples import Decoding, generate_answers, sample_held_out, sample_records
from sft_jax.evaluation.sampling import sampling
from sft_jax.evaluation.scoring import ratio
from sft_jax.evaluation.step import make_eval_step, split_model
from sft_jax.hf.progress import Loading, silently
from sft_jax.model.decoder import Decoder
from sft_jax.model.sharding import pieces_along

# Plain openings of many kinds of text, none of them a task: what a tuned model should still go on with as its base does.
NEUTRAL = (
    "The history of the city begins with a small harbour", "Water boils at a lower temperature in the mountains because",
    "She opened the letter, read it twice and put it back", "The committee will meet again next week to decide whether",
    "In the third chapter the author describes how", "To make bread you need flour, water, salt and",
    "The train left the station a few minutes after", "Most birds in this region fly south when",
    "def add(a, b):\n    return", "The results of the survey show that more than half of",
    "It was raining when they reached the house at the end of", "A triangle has three sides, and the sum of its angles is",
    "The museum is open from Tuesday to Sunday and", "Dear all, thank you for coming to the meeting on",
    "My grandfather used to say that a good knife", "The price of oil fell on Monday after",
)  # fmt: skip
NEW_TOKENS = 48  # of what the base writes itself
PROMPTS = 16  # held-out prompts of each set that are answered where the run has no answers
MOST_TEXTS = 64  # pieces of the general text
_FEWEST_TEXTS = 16  # pieces that a short text is cut in, where they have so many tokens:
_SHORTEST_TEXT = 32
_ROWS = 4  # texts that are computed together; logits of a large vocabulary are the largest array
Log = Callable[[str], None]


_Texts = list[tuple[list[int], list[int]]]  # (context, what is predicted), ids


class _Base(NamedTuple):
    """What is kept of the base."""

    probabilities: list[np.ndarray]  # of the neutral prompts, see _log_probabilities
    texts: dict[str, tuple[_Texts, np.ndarray]]  # "general", "own": texts, and the loss of each, nats


def read_general(path: Path) -> str:
    """Returns the text of --general. Raises UserError where it cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--general: {path} cannot be read ({getattr(error, 'strerror', None) or error}); name a file of UTF-8 text.") from error
    if not text.strip():
        raise UserError(f"--general: {path} is empty; name a file of text that the model should still know.")
    return text


def measure(
    evidence: Evidence, mesh: Mesh, general: str = "", log: Log = lambda line: None, loading: Loading = silently, bars: Bars = no_bars
) -> tuple[Evidence, list[str]]:
    """Returns the evidence with what the models say, and notes on what could not be computed.

    Args:
        evidence: of the files of the run.
        mesh: that models lie on.
        general: text that the model should still know; "" is none.
        log: takes lines about what is done.
        loading, bars: for what takes long.
    """
    run, notes = evidence.run, []
    exact = dataclasses.replace(run.config.model, compute_dtype="float32", matmul_precision="highest")
    config = dataclasses.replace(run.config, model=exact)
    subject = Subject(str(run.folder))
    try:
        tokenizer = open_tokenizer_of(subject)
    except UserError as error:
        return _without(evidence, str(error), EXPORTED_WEIGHTS, OWN_SAMPLES), [f"Nothing was computed with the models: {error}"]
    prompts = [[*tokenizer.plain_prefix, *tokenizer.encode(text)] for text in NEUTRAL]
    base = _base(config, tokenizer, prompts, general, mesh, notes, log, loading, bars)
    if base is None:
        evidence = _without(evidence, notes[-1], OWN_SAMPLES)
    try:
        log("Reading the trained model.")
        with loading(str(run.folder)) as loaded:
            tuned = open_decoder(subject, config, mesh, loaded)
    except UserError as error:
        return _without(evidence, str(error), EXPORTED_WEIGHTS, OWN_SAMPLES), [*notes, f"Nothing was computed with the trained model: {error}"]
    measured = Measured()
    with bars() as bar:
        trained = _log_probabilities(tuned, prompts, mesh, bar)
        losses = {
            name: _text_loss(loss, _losses(tuned, texts, mesh, partial(bar, f"loss of {name} texts")), texts)
            for name, (texts, loss) in (base.texts if base is not None else {}).items()
        }
    if base is not None:
        measured = Measured(losses["general"], losses["own"], divergence(trained, base.probabilities))
    answers = evidence.answers
    if not run.samples and config.data.eval:
        try:
            answers = tuple(_answers(subject, config, tuned, tokenizer, run.result_step, log, bars))
        except UserError as error:
            notes.append(f"No held-out prompts were answered: {error}")
    del tuned
    if run.exported is None:
        evidence = _without(evidence, "there is no export", EXPORTED_WEIGHTS)
    else:
        try:
            log("Reading the export.")
            with loading(str(run.exported)) as loaded:
                decoder = open_decoder(Subject(str(run.exported)), config, mesh, loaded)
            with bars() as bar:
                export = divergence(_log_probabilities(decoder, prompts, mesh, bar), trained)
            measured = dataclasses.replace(measured, export=export)
        except UserError as error:
            notes.append(f"The export was not compared: {error}")
            evidence = _without(evidence, str(error), EXPORTED_WEIGHTS)
    return dataclasses.replace(evidence, measured=measured, answers=answers, health=health_of(answers) or evidence.health), notes


def _without(evidence: Evidence, why: str, *names: str) -> Evidence:
    """Returns the evidence, which says why these parts are not there."""
    return dataclasses.replace(evidence, absent={**evidence.absent, **dict.fromkeys(names, why)})


def _base(
    config: Config, tokenizer: Tokenizer, prompts: Sequence[list[int]], general: str, mesh: Mesh, notes: list[str], log: Log, loading: Loading,
    bars: Bars,
) -> _Base | None:  # fmt: skip
    """Returns what the base makes of the prompts and texts; None, and a note, where there is none to compare with."""
    if config.model.init == "random":
        notes.append("The base was drawn at random, so there was nothing to forget.")
        return None
    try:
        log("Reading the base.")
        with loading(config.model.path) as loaded:
            base = open_decoder(Subject(config.model.path), config, mesh, loaded)
    except UserError as error:
        notes.append(f"Nothing was compared with the base: {error}")
        return None
    with bars() as bar:
        texts = {"general": _pieces(tokenizer, general, config, base), "own": _own_samples(base, prompts, bar)}
        probabilities = _log_probabilities(base, prompts, mesh, bar)
        return _Base(probabilities, {name: (found, _losses(base, found, mesh, partial(bar, f"loss of {name} texts"))) for name, found in texts.items()})


def divergence(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Divergence | None:
    """Returns the mean KL(ours || theirs) of a token, None where the vocabularies differ in size.

    Args:
        ours, theirs: of each text the log probabilities of all tokens at each place, float32 [n, V].
    """
    if ours[0].shape != theirs[0].shape:
        return None
    sums = []
    for p, q in zip(ours, theirs, strict=True):
        p, q = p.astype(np.float64), q.astype(np.float64)
        sums.append(((np.exp(p) * (p - q)).sum(), len(p)))
    totals, counts = np.array(sums).T
    mean = totals.sum() / counts.sum()
    # Of a ratio of sums over texts: the texts are the sample, their tokens hang together.
    error = np.sqrt(np.sum((totals - mean * counts) ** 2) * len(counts) / max(len(counts) - 1, 1)) / counts.sum()
    return Divergence(float(max(mean, 0.0)), float(error), int(counts.sum()))


def _log_probabilities(decoder: Decoder, texts: Sequence[Sequence[int]], mesh: Mesh, bar: Between) -> list[np.ndarray]:
    """Returns of each text the log probabilities at each place, float32 [n, V], on the host."""
    length, groups = round_up(max(map(len, texts))), pieces_along(mesh, "batch")
    rows = -(-_ROWS // groups) * groups
    graphdef, state = nnx.split(decoder)
    forward = jax.jit(lambda state, *fields: jax.nn.log_softmax(nnx.merge(graphdef, state)(*fields).astype(jnp.float32)))
    found = []
    for first in range(0, len(texts), rows):
        group = texts[first : first + rows]
        tokens, segments = np.zeros((2, rows, length), np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
        for row, ids in enumerate(group):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        values = np.asarray(jax.device_get(forward(state, tokens, positions, segments)))
        found += [values[row, : len(ids)] for row, ids in enumerate(group)]
        bar("neutral prompts", len(found), len(texts))
    return found


def _own_samples(base: Decoder, prompts: Sequence[list[int]], bar: Between) -> _Texts:
    """Returns what the base writes behind the prompts, drawn with temperature 1: its loss there is its entropy."""
    between = lambda done: bar("what the base writes", done, len(prompts))  # noqa: E731
    answers = generate_ids(base, prompts, [], NEW_TOKENS, options=sampling(temperature=1.0), batch_size=_ROWS, between=between)
    return [(list(prompt), list(answer.ids)) for prompt, answer in zip(prompts, answers, strict=True) if len(answer.ids)]


def _pieces(tokenizer: Tokenizer, text: str, config: Config, decoder: Decoder) -> _Texts:
    """Returns pieces of a text, evenly spread where there are more than MOST_TEXTS.

    They are as long as a row of training, but those of a short text are shorter, since an interval needs some, and are predicted
    behind what comes before them in a row, since a model knows a text better than its pieces.
    """
    ids = list(tokenizer.encode(text)) if text else []
    longest = decoder.source.config_dict().get("max_position_embeddings") or config.data.max_length
    row = max(min(config.data.max_length, longest), 2)
    size = min(row, max(len(ids) // _FEWEST_TEXTS, _SHORTEST_TEXT))
    starts = [first for first in range(0, len(ids), size) if first + 1 < len(ids)]
    prefix, found = list(tokenizer.plain_prefix), []
    for first in starts[:: -(-len(starts) // MOST_TEXTS) or 1]:
        context, piece = prefix + ids[max(first - row + size, 0) : first], ids[first : first + size]
        found.append((context, piece) if context else (piece[:1], piece[1:]))
    return found


def _losses(decoder: Decoder, texts: _Texts, mesh: Mesh, told: Callable[[int, int], None]) -> np.ndarray:
    """Returns float64 [texts], the negative log-likelihood of each in nats."""
    graphdef, state = split_model(decoder)
    found = likelihoods(make_eval_step(graphdef, mesh), state, texts, _ROWS, mesh, lambda done: told(done, len(texts))) if texts else []
    return np.array([-one.log_likelihood for one in found], np.float64)


def _text_loss(base: np.ndarray, tuned: np.ndarray, texts: _Texts) -> TextLoss | None:
    if not len(texts):
        return None
    tokens = np.array([len(predicted) for _, predicted in texts], np.float64)
    ends = interval(np.stack([tuned - base, tokens], axis=1), ratio)
    return TextLoss(
        float(base.sum() / tokens.sum()), float(tuned.sum() / tokens.sum()), None if ends is None else tuple(ends), len(texts), int(tokens.sum())
    )


def _answers(
    subject: Subject, config: Config, decoder: Decoder, tokenizer: Tokenizer, step: int, log: Log, bars: Bars
) -> list[dict]:
    """Returns records like those of samples.jsonl, of a run that has answered no prompts."""
    reader = PromptReader(tokenizer, config.data.chat_template, config.data.chat_template_kwargs)
    stops = stop_ids_of(decoder.source, tokenizer, reader)
    records = []
    for name, stream in open_held_out(subject, config, log).eval.items():
        held_out = sample_held_out(stream, PROMPTS, config.seed)
        with bars() as bar:
            between = lambda done, name=name, held_out=held_out, bar=bar: bar(f"{name}: answers", done, len(held_out))  # noqa: E731
            decoding = Decoding(config.eval.max_new_tokens, PROMPTS)
            answers, generations = generate_answers(decoder, tokenizer, held_out, stops, decoding, between=between)
        records += [{"step": step, "set": name, **record} for record in sample_records(held_out, answers, generations, {})]
    return records
