"""Causes that show in what came out: prompts, export, answers, and what was forgotten."""

import json
import math

from sft_jax.diagnosis.data_causes import cut_at_right
from sft_jax.diagnosis.finding import Evidence, Finding
from sft_jax.diagnosis.needs import FEWEST_ANSWERS
from sft_jax.errors import UserError
from sft_jax.hf.files import read_json
from sft_jax.hf.source import PROVENANCE

UNENDED = 0.1  # share of answers that did not end; a sound model ends nearly all
_WHOLE_ANSWERS = "data.overlength=split or drop, or a larger data.max_length."
EXPORT_KL = 0.01  # nats a token; rounding to bfloat16 moves an export by 1e-4 to 1e-3, and answers begin to differ at some hundredths
ROUNDING_KL = 1e-3  # above it an export is also another model where it is more than
EXPORT_SHARE = 0.5  # of the way from the trained model that training has gone from the base
FORGOTTEN = 0.1  # rise of the loss on general text, as a share of what it was
# Of what the base knows of its own texts, ln(vocabulary) less their loss. Teaching one task moves a model far from what its base would
# write: sound runs of the quickstart lose 0.08 to 0.13 of it, and their users want that; one with fifteen times the learning rate 0.87.
LOST = 0.5


def template(evidence: Evidence) -> Finding | None:
    """Servers ask in another form than the one that was trained."""
    if (difference := evidence.prompts) is None:
        return None
    exported, kwargs = evidence.run.exported, evidence.run.config.data.chat_template_kwargs
    what = "its tokens differ" if difference.same_text else f"what is exported makes {_shown(difference.served)}"
    return Finding(
        f"Training made the prompt {_shown(difference.trained)} of a question; {what}.",
        {
            "trained": difference.trained, "served": difference.served, "data.chat_template": evidence.run.config.data.chat_template,
            **({"data.chat_template_kwargs": json.dumps(kwargs)} if kwargs else {}),
        },
        "The model is asked in a form that it has never seen, so its answers are those of an untuned model or do not end.",
        f"python -m sft_jax.export --model {evidence.run.shown} --out DIR writes the template of the run again"
        + (f"; keep chat_template.jinja and tokenizer_config.json in {exported.name}/ as they were written." if exported else ".")
        + (f" Or servers are told the chat_template_kwargs of the run with each request: {json.dumps(kwargs)}." if kwargs else ""),
    )  # fmt: skip


def export_differs(evidence: Evidence) -> Finding | None:
    """What was exported is not what was trained."""
    run = evidence.run
    if run.exported is None:
        return None
    why = "What is served is another model than the one that was evaluated."
    remedy = f"python -m sft_jax.export --model {run.shown} --out DIR writes it again, and compares it."
    try:
        written = read_json(run.exported / PROVENANCE).get("steps") if (run.exported / PROVENANCE).is_file() else None
        expected = run.summary.get("steps") if run.best_step is None else run.best_step
    except UserError:
        written = expected = None
    if isinstance(written, int) and isinstance(expected, int) and written != expected:
        return Finding(
            f"{run.exported.name}/ is of step {written:,}, and the result of the run is of step {expected:,}.",
            {"exported_step": written, "expected_step": expected}, why, remedy,
        )  # fmt: skip
    found = evidence.measured.export
    moved = evidence.measured.from_base.kl if evidence.measured.from_base else math.inf
    if found is None or found.kl <= EXPORT_KL and (found.kl <= ROUNDING_KL or found.kl <= EXPORT_SHARE * moved):
        return None
    return Finding(
        f"{run.exported.name}/ is {found.kl:.3g} nats a token away from the checkpoint (KL over {found.tokens:,} tokens); rounding to "
        f"bfloat16 makes up to {ROUNDING_KL:g}.",
        {"kl_from_checkpoint": found.kl, "standard_error": found.error, "tokens": found.tokens}, why, remedy,
    )  # fmt: skip


def truncated_answers(evidence: Evidence) -> Finding | None:
    """Answers do not end, or were cut in the training data."""
    run, cut = evidence.run, cut_at_right(evidence.run)
    for name, health in evidence.health.items():
        if health.answers < FEWEST_ANSWERS or 1 - health.ended <= UNENDED:
            continue
        found = {
            "set": name, "answers": health.answers, "ended": health.ended, "median_length": health.length,
            "median_reference_length": health.reference_length, "repeating": health.repeating,
            "eval.max_new_tokens": run.config.eval.max_new_tokens, **cut,
        }  # fmt: skip
        short = health.length < health.reference_length and not cut
        if short:
            why = "Answers are cut before their end, so they are scored, and served, as half of what was meant."
            remedy = f"eval.max_new_tokens={2 * run.config.eval.max_new_tokens}."
        elif cut:
            why = "The model has been shown answers without an end, and has not learnt when to end."
            remedy = _WHOLE_ANSWERS
        else:
            why = "The model has not learnt when to end, so servers cut its answers."
            remedy = "More train.epochs; python -m sft_jax.inspect_data --config ... --ids shows whether the end of turn is supervised."
        return Finding(
            f"{1 - health.ended:.0%} of {health.answers:,} answers to '{name}' did not end within {run.config.eval.max_new_tokens:,} tokens; their "
            f"median is {health.length:,.0f} characters, that of the references {health.reference_length:,.0f}"
            + (f". {cut['cut_documents']:,} training documents were cut." if cut else "."),
            found, why, remedy,
        )  # fmt: skip
    if not cut:
        return None
    return Finding(
        f"{cut['cut_documents']:,} documents were cut at data.max_length={run.config.data.max_length:,}, with {cut['supervised_tokens_lost']:,} "
        "supervised tokens.",
        cut, "Answers without their end teach not to end.", _WHOLE_ANSWERS,
    )  # fmt: skip


def forgetting(evidence: Evidence) -> Finding | None:
    """The loss on general text has risen; without such text, most of what the base knows of its own texts is lost."""
    general = evidence.measured.general
    if general is None or general.rise_interval is None:  # of a text too short to be judged
        return _own_texts_lost(evidence)
    rise = general.tuned - general.base
    if rise <= FORGOTTEN * general.base or general.rise_interval[0] <= 0:
        return None
    return Finding(
        f"The loss on the general text rose from {general.base:.3f} to {general.tuned:.3f} nats a token.",
        {"base_loss": general.base, "tuned_loss": general.tuned, "rise": rise, "rise_low": general.rise_interval[0], "texts": general.texts},
        _WHY_FORGOTTEN, _REMEDY_FORGOTTEN,
    )  # fmt: skip


_WHY_FORGOTTEN = "What the base could do is lost, also where the task needs it."
_REMEDY_FORGOTTEN = "A lower optim.learning_rate, fewer train.epochs, adapter.name=lora, or general rows beside the task in data.train."


def _own_texts_lost(evidence: Evidence) -> Finding | None:
    own, vocabulary = evidence.measured.own_samples, evidence.run.vocabulary
    if own is None or own.rise_interval is None or vocabulary is None:
        return None
    knew = math.log(vocabulary) - own.base
    if knew <= 0 or own.rise_interval[0] <= LOST * knew:
        return None
    share = (own.tuned - own.base) / knew
    return Finding(
        f"The loss of what the base itself writes rose from {own.base:.3f} to {own.tuned:.3f} nats a token: {share:.0%} of the way to a guess among "
        f"{vocabulary:,} tokens.",
        {"base_loss": own.base, "tuned_loss": own.tuned, "lost": share, "rise_low": own.rise_interval[0], "texts": own.texts},
        _WHY_FORGOTTEN, f"{_REMEDY_FORGOTTEN} --general FILE measures it on text of your own.",
    )  # fmt: skip


def _shown(text: str, most: int = 120) -> str:
    return repr(text if len(text) <= most else text[:most] + " ...")
