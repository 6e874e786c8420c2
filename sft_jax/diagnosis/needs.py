"""What a cause is looked for in, and why it cannot be looked for where that is not there."""

from collections.abc import Callable

from sft_jax.diagnosis.finding import DATA, EXPORTED_WEIGHTS, OWN_SAMPLES, PROMPTS, Evidence

FEWEST_RECORDS = 12  # of training, below which a curve is not judged
FEWEST_ANSWERS = 8  # of a held-out set
FEWEST_EVALUATIONS = 3  # after step 0, below which a loss is not seen to rise again from its best
Need = Callable[[Evidence], str]  # -> why the cause cannot be looked for, "" where it can

_NO_REPORT = "data_report.json does not say what was trained on"


def first_loss(evidence: Evidence) -> str:
    """The size of the vocabulary, and the loss of a step that was not trained yet."""
    if evidence.run.vocabulary is None:
        return "the size of the vocabulary is not known"
    curves = [evidence.run.eval_curve(name) for name in evidence.run.evals] or [evidence.run.curve("loss")]
    known = any(curve and (not evidence.run.evals or curve.steps[0] == 0) for curve in curves)
    return "" if known else "metrics.jsonl has no loss from before training"


def data_report(evidence: Evidence) -> str:
    """What data_report.json says of the training sets."""
    return "" if evidence.run.training_sets else _NO_REPORT


def rows(evidence: Evidence) -> str:
    """The rows of the data."""
    return evidence.absent.get(DATA, "")


def prompts(evidence: Evidence) -> str:
    """Tokenizers and templates of the base and of the export."""
    return evidence.absent.get(PROMPTS, "")


def exported_weights(evidence: Evidence) -> str:
    """The export, and what it computes beside the checkpoint."""
    return evidence.absent.get(EXPORTED_WEIGHTS, "")


def training_curve(evidence: Evidence) -> str:
    """Enough records of training."""
    count = len(evidence.run.curve("loss").steps)
    return "" if count >= FEWEST_RECORDS else f"metrics.jsonl has {count:,} records of training, and {FEWEST_RECORDS} are needed (log.every)"


def update_ratio(evidence: Evidence) -> str:
    """The size of updates, and a loss."""
    if not any(record.get("update_ratio") for record in evidence.run.train):
        return "metrics.jsonl has no update_ratio, as that of an older run"
    return "" if evidence.run.curve("loss") else "metrics.jsonl has no training loss"


def held_out_curve(evidence: Evidence) -> str:
    """Enough evaluations of a held-out set to see its loss rise, and the training loss beside them."""
    counts = [int((evidence.run.eval_curve(name).steps > 0).sum()) for name in evidence.run.evals]
    if not counts:
        return "no held-out set was evaluated (data.eval)"
    if max(counts) < FEWEST_EVALUATIONS:
        return f"eval.every: a rise shows in {FEWEST_EVALUATIONS} or more evaluations after step 0, and the log has {max(counts):,}"
    return "" if evidence.run.curve("loss") else "metrics.jsonl has no training loss"


def answers(evidence: Evidence) -> str:
    """Answers to held-out prompts; what data_report.json says of cut rows is looked at beside them."""
    most = max((health.answers for health in evidence.health.values()), default=0)
    if most >= FEWEST_ANSWERS:
        return "" if evidence.run.training_sets else _NO_REPORT
    return f"{most:,} held-out prompts were answered, and {FEWEST_ANSWERS} of a set are needed (eval.generate)"


def texts_of_the_base(evidence: Evidence) -> str:
    """The loss of general text, or of what the base itself writes, before and after."""
    measured = evidence.measured
    if measured.general is not None and measured.general.rise_interval is None:
        instead = "; what the base writes was looked at instead" if measured.own_samples is not None else ""
        return f"--general: a text of {measured.general.tokens:,} tokens is too short to tell its loss from chance{instead}"
    if measured.general is not None or measured.own_samples is not None:
        return ""
    return evidence.absent.get(OWN_SAMPLES, "no text was compared with the base")
