"""The comparison from models to results: one model after the other is loaded, and asked in each of its ways."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from jax.sharding import Mesh

from sft_jax.checkpoint.processes import agree
from sft_jax.comparison.asking import Answered, Between, Respondent
from sft_jax.comparison.contenders import AUTO, Contender
from sft_jax.comparison.prompts import Asked, Form, Shelf, ask
from sft_jax.comparison.questions import Questions, read_questions
from sft_jax.comparison.results import Comparison, Price
from sft_jax.config import Config
from sft_jax.data.chats.templates import resolve_template
from sft_jax.errors import UserError
from sft_jax.evaluation.offline import Subject, open_decoder, open_tokenizer_of
from sft_jax.evaluation.prompts import PromptReader, stop_ids_of
from sft_jax.evaluation.samples import Decoding
from sft_jax.evaluation.scorers import find_scorers
from sft_jax.evaluation.scoring import Scorer
from sft_jax.hf.load import Progress
from sft_jax.hf.source import as_folder, chat_template_of, find_model, is_run, read_source, run_config
from sft_jax.model.decoder import Decoder

Loading = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Request:
    """What is compared, and how."""

    subjects: Mapping[str, Subject]  # by name of the model, in the order in which they are asked
    contenders: Sequence[Contender]  # those of a model stand together
    scorers: Sequence[str]  # see `find_scorers`
    decoding: Decoding
    set_name: str = ""  # of data.eval; "" where there is one only
    count: int | None = None  # held-out rows; None = all
    pool: int = 10_000  # training rows that may be shown as examples, at most
    validation: int = 64  # training rows on which a number of examples is chosen
    timed: int = 0  # prompts whose latency is measured
    prices: Mapping[str, Price] = field(default_factory=dict)  # by model
    of_run: bool = False  # the configuration is a run's: other models have their own template, where they have one, and no rounding of it


def compare(
    request: Request,
    config: Config,
    mesh: Mesh,
    *,
    log: Callable[[str], None] = print,
    loading: Loading | None = None,
    between: Between = lambda what, done, total: None,
) -> Comparison:
    """Asks all contenders the same held-out questions and returns what came of it.

    `config` has the data, and how models are computed. Of a run the template and its arguments are its own: a model answers
    in the form that it was trained in only if it is asked in that form. Raises UserError for whatever is wrong with models,
    data or request, as far as possible before a model is loaded. All processes make the same call.
    """
    scorers = comparable_scorers(request.scorers)
    examples = [contender.examples for contender in request.contenders if contender.examples is not None]
    chosen = any(each.count == AUTO for each in examples)
    forms = {name: agree(lambda subject=subject: form_of(subject, config, request.of_run)) for name, subject in request.subjects.items()}
    questions = agree(lambda: read_questions(
        config.data, set_name=request.set_name, count=request.count, validation=request.validation if chosen else 0,
        pool=request.pool if examples else 0, seed=config.seed, log=log,
    ))  # fmt: skip
    if chosen and not questions.validation:
        raise UserError("data.train: has no row to choose the number of examples on; name more training rows, or a number in place of auto.")
    notes, shelf = list(questions.notes), Shelf(questions.pool)
    prompts = agree(lambda: _prompts(request, forms, questions, shelf))
    answered: list[Answered] = []
    fingerprints = {}
    for name, subject in request.subjects.items():
        decoder = _load(name, subject, request, config, mesh, loading)
        fingerprints[name] = decoder.source.fingerprint
        respondent = Respondent(decoder, forms[name], questions, shelf, scorers, request.decoding, between)
        for contender in (each for each in request.contenders if each.model == name):
            asked = prompts.get(contender)
            if asked is None:
                contender, told = respondent.choose(contender)
                if contender in {*prompts, *(each.contender for each in answered)}:
                    notes.append(f"{told} That is {contender.name}, which takes part already.")
                    continue
                notes.append(told)
                asked = respondent.ask(contender, questions.scored)
            notes += asked.notes
            answered.append(respondent.answer(contender, asked, questions.scored, request.timed))
        del decoder, respondent  # before the next one is loaded
    notes += _differing_references(answered)
    if len(answered) < 2:
        raise UserError(f"--model: one contender is nothing to compare. {' '.join(notes)}")
    return Comparison(answered, questions.scored, questions.set_name, request.prices, fingerprints, notes, config.seed)


def comparable_scorers(specs: Sequence[str]) -> dict[str, Scorer]:
    """Returns the scorers by name. Raises UserError for one that does not look at answers."""
    scorers = find_scorers(specs, "--scorer")
    for name, scorer in scorers.items():
        if scorer.choices is not None:
            raise UserError(f"--scorer: {name} judges likelihoods, and what is compared are answers; use sft_jax.evaluate for it.")
    return scorers


def form_of(subject: Subject, config: Config, of_run: bool = False) -> Form:
    """Returns how a model is asked: as the run says where it is one, else as `config` does; see `Request.of_run`."""
    tokenizer = open_tokenizer_of(subject)
    data = config.data
    setting, kwargs, special = data.chat_template, data.chat_template_kwargs, data.allow_special_tokens_in_content
    own = _run_config_of(subject)
    if own is not None:
        setting = own["data"].get("chat_template", "auto")
        setting = chat_template_of(subject.path) if setting == "auto" else setting
        kwargs, special = own["data"].get("chat_template_kwargs") or {}, bool(own["data"].get("allow_special_tokens_in_content"))
    elif of_run and setting != "none" and tokenizer.chat_template is not None:
        setting = "auto"
    template = resolve_template(setting, tokenizer)
    source = read_source(find_model(subject.path, subject.base), subject.path)
    values = source.config_dict()
    context = (values.get("text_config") or values).get("max_position_embeddings")
    reader = PromptReader(tokenizer, setting, kwargs, special)
    return Form(tokenizer, template, dict(kwargs), special, stop_ids_of(source, tokenizer, reader), context)


def _run_config_of(subject: Subject) -> dict[str, Any] | None:
    folder = as_folder(subject.path)
    return run_config(folder) if folder.is_dir() and is_run(folder) else None


def _prompts(request: Request, forms: Mapping[str, Form], questions: Questions, shelf: Shelf) -> dict[Contender, Asked]:
    """Returns the prompts of all contenders whose number of examples is known. Raises UserError for a way that changes nothing."""
    found: dict[Contender, Asked] = {}
    for contender in request.contenders:
        if contender.examples is not None and contender.examples.count == AUTO:
            continue
        asked = ask(forms[contender.model], contender, questions.scored, shelf, request.decoding.max_new_tokens)
        plain = found.get(Contender(contender.model))
        if plain is not None and [item.prompt_ids for item in plain.items] == [item.prompt_ids for item in asked.items]:
            flag = "--system" if contender.system is not None else "--shots, --retrieve"
            raise UserError(
                f"{flag}: {contender.name} is asked exactly what {contender.model} is, since its chat template leaves that out; leave out the flag."
            )
        found[contender] = asked
    return found


def _load(name: str, subject: Subject, request: Request, config: Config, mesh: Mesh, loading: Loading | None) -> Decoder:
    own = _run_config_of(subject)
    qat = own.get("train", {}).get("qat", "") if own is not None else "" if request.of_run else config.train.qat
    settings = replace(config, model=replace(config.model, path=subject.path), train=replace(config.train, qat=qat))
    if loading is None:
        return open_decoder(subject, settings, mesh)
    with loading(name) as progress:
        return open_decoder(subject, settings, mesh, progress)


def _differing_references(answered: Sequence[Answered]) -> list[str]:
    """Returns a note on references that are not the same text for all, since templates and tokenizers write them otherwise."""
    if not answered:
        return []
    first = [answer.reference for answer in answered[0].answers]
    return [
        f"{each.contender.name}: {count:,} references are not written as those of {answered[0].contender.name}; each is compared with its own."
        for each in answered[1:]
        if (count := sum(answer.reference != text for answer, text in zip(each.answers, first, strict=True)))
    ]
