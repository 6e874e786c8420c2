"""Benchmarks of lm-evaluation-harness (package lm-eval, extra `lm-eval`) on a model of ours."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sft_jax.data.chats.templates import resolve_template
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError, reason_of
from sft_jax.evaluation.generate import generate_ids
from sft_jax.evaluation.likelihoods import likelihoods
from sft_jax.evaluation.prompts import PromptReader, stop_ids_of
from sft_jax.evaluation.sampling import sampling
from sft_jax.evaluation.slots import mesh_of
from sft_jax.evaluation.step import make_eval_step, split_model
from sft_jax.evaluation.text import StopStrings, continuation_text, cut_before
from sft_jax.model.decoder import Decoder

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError("--tasks: needs lm-evaluation-harness; install it with pip install 'sft_jax[lm-eval]'.") from error

_CONTEXT = 2048  # tokens that a model reads at most where its config.json names no number
_ANSWER = 256  # tokens of an answer where the task names no number, as in the harness
_MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one thing, the first wins
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):
    """A decoder as lm-evaluation-harness asks models: likelihoods of continuations, of whole texts, and generation.

    Attributes:
        truncated: sequences that did not fit the model's context and lost their beginning.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 32,
        seed: int = 0,
        chat_template: str = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ):
        """Prepares to answer; `chat_template` and its arguments are those of training, used where the harness asks for chats."""
        super().__init__()
        self._decoder, self._tokenizer, self._mesh = decoder, tokenizer, mesh_of(decoder)
        self.batch_size, self._seed, self._progress = batch_size, seed, progress
        self._template, self._template_kwargs = resolve_template(chat_template, tokenizer), chat_template_kwargs or {}
        self._stop_ids = stop_ids_of(decoder.source, tokenizer, PromptReader(tokenizer, chat_template, chat_template_kwargs))
        self.max_length: int = decoder.source.config_dict().get("max_position_embeddings") or _CONTEXT
        self.truncated = 0
        graphdef, self._state = split_model(decoder)
        self._eval_step = make_eval_step(graphdef, self._mesh)

    @property
    def eot_token_id(self) -> int:
        token = self._tokenizer.eos_id if self._tokenizer.eos_id is not None else next(iter(self._stop_ids), None)
        if token is None:
            raise UserError("--tasks: the tokenizer has no end-of-text token, which stands before a text without a context.")
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: BOS where there is one."""
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the text of the template, for the harness's records."""
        return self._template.source if chat_template and self._template is not None else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self._template is None:
            raise UserError("--apply_chat_template: the model has no chat template; leave it out.")
        return self._template.render(chat_history, add_generation_prompt, **self._template_kwargs)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Returns the ids of a text as at inference: with what the tokenizer puts before texts, if it is not there already."""
        ids = self._tokenizer.encode(string)
        prefix = list(self._tokenizer.plain_prefix)
        wanted = ids[: len(prefix)] != prefix if add_special_tokens is None else add_special_tokens
        return [*prefix, *ids] if wanted else ids

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness has it, without its bar where that would go to a file."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        sequences = []
        for _, context, continuation in requests:
            if not len(continuation):
                raise UserError("--tasks: a task asks for the likelihood of an empty continuation.")
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise UserError(f"--tasks: a continuation has {len(continuation):,} tokens, and the model's context is {self.max_length:,}.")
            self.truncated += len(context) > room
            sequences.append((context[-room:], continuation))
        between = lambda done: self._progress("benchmarks: likelihoods", done, len(sequences))  # noqa: E731
        found = likelihoods(self._eval_step, self._state, sequences, self.batch_size, self._mesh, between)
        answers = [(item.log_likelihood, item.greedy) for item in found]
        for (pair, _, _), answer in zip(requests, answers, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += [(number, *make_disjoint_window(part)) for part in parts]
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens([(None, context, continuation) for _, context, continuation in windows])
        for (number, _, _), (value, _) in zip(windows, scored, strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers: list[str] = [""] * len(requests)
        for settings, numbers in groups.items():
            texts = self._generate([requests[number].args[0] for number in numbers], json.loads(settings))
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return answers

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        until = settings.pop("until", None) or []
        until = [text for text in ([until] if isinstance(until, str) else until) if text]
        sizes = [settings.pop(name) for name in _MOST_TOKENS if name in settings]
        most = min(int(sizes[0] if sizes else _ANSWER), self.max_length - 1)
        sampled = bool(settings.pop("do_sample", False))
        options = {name: settings.pop(name) for name in _SAMPLING if name in settings}
        if settings:
            raise UserError(f"--tasks: generation_kwargs of a task name {', '.join(settings)}, which is not known here.")
        if not sampled:
            options = {name: value for name, value in options.items() if name == "repetition_penalty"}
        else:
            options.setdefault("temperature", 1.0)
        room = self.max_length - most
        prompts = []
        for context in contexts:
            ids = self.tok_encode(context) or [self.prefix_token_id]
            self.truncated += len(ids) > room
            prompts.append(ids[-room:])
        generations = generate_ids(
            self._decoder, prompts, self._stop_ids, most, options=sampling(**options), seed=self._seed, batch_size=self.batch_size,
            stop=StopStrings(self._tokenizer, until) if until else None,
            between=lambda done: self._progress("benchmarks: answers", done, len(prompts)),
        )  # fmt: skip
        return [
            cut_before(continuation_text(self._tokenizer, ids, answer.ids), until)
            for ids, answer in zip(prompts, generations, strict=True)
        ]


@dataclass(frozen=True)
class Benchmarks:
    """What is asked of the harness."""

    tasks: tuple[str, ...]  # names of tasks, or files of tasks (.yaml)
    num_fewshot: int | None = None  # None = as each task says
    limit: int | None = None  # examples of each task, at most
    apply_chat_template: bool = False


class Tasks(NamedTuple):
    """Tasks that the harness knows, and what it knows them by."""

    names: list[str]
    manager: TaskManager


def find_tasks(asked: Benchmarks) -> Tasks:
    """Returns the tasks that were asked for. Raises UserError for one that is unknown; nothing of their data is read."""
    files = [task for task in asked.tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--tasks: there is no file {file}; name a task of lm-evaluation-harness, or a file of one.")
    manager = TaskManager(include_defaults=len(files) < len(asked.tasks))
    unknown = [task for task in asked.tasks if task not in files and not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"--tasks: lm-evaluation-harness has no task {', '.join(unknown)}; name one of its own, or a .yaml file.")
    return Tasks([str(Path(task).absolute()) if task in files else task for task in asked.tasks], manager)


def run_benchmarks(model: HarnessModel, asked: Benchmarks, tasks: Tasks, log: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Returns the values of every task by name: metrics with their standard errors, and how many examples there were.

    Raises UserError for tasks whose data are not there.
    """
    try:
        found = simple_evaluate(
            model, tasks=tasks.names, num_fewshot=asked.num_fewshot, limit=asked.limit, apply_chat_template=asked.apply_chat_template,
            task_manager=tasks.manager, log_samples=False, batch_size=model.batch_size,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:
        raise UserError(f"--tasks: the data of a task cannot be read ({reason_of(error)}).") from error
    if model.truncated:
        log(f"--tasks: {model.truncated:,} sequences did not fit the model's context of {model.max_length:,} tokens and lost their beginning.")
    results = {}
    for name, values in found["results"].items():
        values = {key: value for key, value in values.items() if key != "sample_len"}  # no metric: "examples" says it
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        examples = found.get("n-samples", {}).get(name, {}).get("effective")
        results[name] = numbers | ({"examples": examples} if examples is not None else {})
    return results
