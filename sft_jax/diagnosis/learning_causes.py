"""Causes that lie in how the run went: learning rate and length, by the curves and by how far updates moved the parameters."""

import math

import numpy as np

from sft_jax.diagnosis.curves import Curve
from sft_jax.diagnosis.finding import Evidence, Finding
from sft_jax.diagnosis.needs import FEWEST_EVALUATIONS, FEWEST_RECORDS
from sft_jax.diagnosis.run_files import RunFiles

# The norm of an update over that of the parameters. About 1e-3 is usual in training (A. Karpathy's rule of thumb), 1e-4 in tuning.
RATIO_HIGH = 0.1  # ten such steps make another model; of adapters, which begin small, nothing follows from it
RATIO_LOW = 1e-5  # a thousand such steps in one direction move the parameters by a hundredth
# An adapter has no knowledge to keep: its matrices are small, half of them begin at zero, and have to grow. Usual are 1e-3 to 1e-1.
RATIO_LOW_ADAPTER = 3e-4
# Falls and rises of the loss are shares of the first one, so that they mean the same for all models and vocabularies.
ROSE = 0.1  # of the training loss, above its lowest part
HARDLY_FELL = 0.1  # of the training loss
HELD_OUT_ROSE = 0.02  # of the held-out loss, above its best
# Rows that came up at least twice, and a held-out loss far above theirs. A sound run of the quickstart over three epochs has 1.8 times it.
SEEN = 2.0  # epochs
FAR_ABOVE = 3.0  # times the training loss
FAR_SHARE = 0.05  # of the first held-out loss, above the training loss: small losses may be many times smaller ones
# Share of the fall between the last two fifths of the run, by the sum of its learning rates: a schedule that ends near zero flattens
# every curve. A fall with a time constant of one run leaves 0.152, and has more than a third of its way before it.
STILL_FALLS = 0.15
SURE = 4.0  # standard errors
_PARTS = 10  # of the training curve, at most; each of four records or more


def learning_rate_too_high(evidence: Evidence) -> Finding | None:
    """Steps that were not finite, a training loss that rose again, or updates of the size of the parameters."""
    run = evidence.run
    ratio = median_ratio(run)
    skipped = int(sum(record.get("nonfinite_steps") or 0 for record in run.train))
    found = {**_rate(run, ratio), "nonfinite_steps": skipped}
    why = "Steps overshoot: what the base knows is destroyed before the task is learnt."
    remedy = f"optim.learning_rate={run.config.optim.learning_rate / 5:.1g} or less; a longer optim.warmup and optim.clip_norm=1 help at the start."
    if skipped:
        return Finding(f"{skipped:,} steps had a loss or a gradient that was not finite, and were left out.", found, why, remedy)
    curve = run.curve("loss")
    if len(curve.steps) >= FEWEST_RECORDS:
        levels, first = curve.levels(min(_PARTS, len(curve.steps) // 4)), float(curve.values[0])
        end, lowest, highest = levels[-1], min(levels), max(levels)
        found |= {"first_loss": first, "highest_loss": highest.mean, "lowest_loss": lowest.mean, "last_loss": end.mean}
        if end.mean - lowest.mean > max(ROSE * first, SURE * float(np.hypot(end.error, lowest.error))):
            return Finding(f"The training loss fell to {lowest.mean:.3f} and rose to {end.mean:.3f} again.", found, why, remedy)
        one_record = end.error * math.sqrt(len(curve.steps) / len(levels))  # the first loss is one record, as noisy as those of the end
        if highest.mean - first > max(ROSE * first, SURE * one_record):
            return Finding(f"The training loss rose from {first:.3f} to {highest.mean:.3f}; at the end it was {end.mean:.3f}.", found, why, remedy)
    if ratio is not None and ratio > RATIO_HIGH and run.config.adapter.name == "none":
        return Finding(f"An update moved the parameters by {ratio:.1%} of their norm (median); 0.01% to 1% is usual.", found, why, remedy)
    return None


def learning_rate_too_low(evidence: Evidence) -> Finding | None:
    """The loss hardly fell, and updates are far smaller than usual."""
    run, curve = evidence.run, evidence.run.curve("loss")
    ratio = median_ratio(run)
    adapted = run.config.adapter.name != "none"
    usual = RATIO_LOW_ADAPTER if adapted else RATIO_LOW
    if ratio is None or ratio >= usual or not curve:
        return None
    first, last = float(curve.values[0]), end_of(curve)
    fell = (first - last) / first if first > 0 else 0.0
    if fell > HARDLY_FELL:
        return None
    return Finding(
        f"An update moved the {'adapter' if adapted else 'parameters'} by {ratio:.1e} of the norm (median), below {usual:g}, and the loss fell "
        f"by {fell:.1%} only.",
        {**_rate(run, ratio), "first_loss": first, "last_loss": last, "fell": fell},
        "The model has stayed where it began.",
        f"optim.learning_rate={run.config.optim.learning_rate * 10:.1g} or more"
        + ("; adapters take ten times that of full fine-tuning, 1e-4 to 1e-3." if adapted else "; full fine-tuning usually takes 1e-6 to 1e-4."),
    )  # fmt: skip


def over_fitting(evidence: Evidence) -> Finding | None:
    """The held-out loss rose again while the training loss fell on, or is far above that of rows that came up several times."""
    run = evidence.run
    end = run.result_step or run.steps  # where the best state is the untrained one, how the run went on says why
    train = run.curve("loss").until(end)
    for name in run.evals if train else ():
        held_out = run.eval_curve(name).until(end)
        if len(held_out.steps) > 1:
            found = _rose_again(run, name, held_out, train) or _far_above_training(run, name, held_out, train)
            if found is not None:
                return found
    return None


def _rose_again(run: RunFiles, name: str, held_out: Curve, train: Curve) -> Finding | None:
    best, first, last = int(np.argmin(held_out.values)), float(held_out.values[0]), float(held_out.values[-1])
    rise, at = last - float(held_out.values[best]), int(held_out.steps[best])
    before = train.values[np.abs(train.steps - at).argmin()]
    if rise <= HELD_OUT_ROSE * first or end_of(train) >= before:
        return None
    epochs = _epochs(run, int(held_out.steps[-1]))
    found = {
        "set": name, "best_loss": float(held_out.values[best]), "best_step": at, "last_loss": last, "training_loss_then": float(before),
        "training_loss": end_of(train), **({"epochs": epochs} if epochs is not None else {}),
    }  # fmt: skip
    once = epochs is not None and epochs <= 1
    return Finding(
        f"The loss on '{name}' was best at step {at:,} ({held_out.values[best]:.3f}) and is {last:.3f} at step {int(held_out.steps[-1]):,}, while that "
        f"of training fell from {before:.3f} to {end_of(train):.3f}.",
        found,
        "Every row came up once at most, so the held-out rows are of another kind than the training rows." if once
        else "Training rows are learnt by heart, and what is said of others gets worse.",
        f"Rows in data.train that are like '{name}'." if once else _against_over_fitting(run, name),
    )  # fmt: skip


def _far_above_training(run: RunFiles, name: str, held_out: Curve, train: Curve) -> Finding | None:
    """What shows of rows learnt by heart without the loss having been seen to rise: how far it is above that of these rows."""
    after, epochs = held_out.values[held_out.steps > 0], _epochs(run, int(held_out.steps[-1]))
    if epochs is None or epochs < SEEN or not len(after):
        return None
    evaluations = int((run.eval_curve(name).steps > 0).sum())  # also of those after the best state
    if evaluations >= FEWEST_EVALUATIONS and after[-1] <= after.min():
        return None  # it is at its best
    first, last, seen = float(held_out.values[0]), float(held_out.values[-1]), end_of(train)
    # Held-out rows may be harder than training rows, which shows at the start. The first record is of some steps later, so this is at most more.
    harder = max(first / float(train.values[0]), 1.0) if train.values[0] > 0 else 1.0
    if last <= FAR_ABOVE * harder * seen or last - seen <= FAR_SHARE * first:
        return None
    return Finding(
        f"The loss on '{name}' is {last:.3f}, that of the training rows, which came up {epochs:.3g} times, {seen:.3f}.",
        {"set": name, "first_loss": first, "last_loss": last, "training_loss": seen, "epochs": epochs},
        "Training rows are learnt by heart, and little of that holds for others.",
        _against_over_fitting(run, name),
    )


def _against_over_fitting(run: RunFiles, name: str) -> str:
    chosen = run.config.checkpoint.best
    if not chosen:
        return "checkpoint.best=loss with eval.every exports the best state, train.patience ends there; fewer train.epochs, more rows."
    by_loss = chosen in ("loss", f"{name}/loss")
    return "Fewer train.epochs or more rows" + ("." if by_loss else f"; checkpoint.best={chosen} has chosen the state, which is not the loss on '{name}'.")


def _epochs(run: RunFiles, step: int) -> float | None:
    """Returns how often the rows had come up at a step, None where that was not logged."""
    found = run.curve("epoch").until(step)
    return float(found.values[-1]) if found else None


def under_training(evidence: Evidence) -> Finding | None:
    """The training loss was still falling when the run ended."""
    run, curve = evidence.run, evidence.run.curve("loss")
    if len(curve.steps) < FEWEST_RECORDS or _got_worse_since(run):
        return None
    moved = _by_learning_rate(run, curve)
    before, after = moved.level(0.6, 0.8), moved.level(0.8, 1.0)
    if before is None or after is None:
        return None
    fell, lately = float(curve.values[0]) - after.mean, before.mean - after.mean
    if fell <= 0 or lately < STILL_FALLS * fell or lately < SURE * float(np.hypot(before.error, after.error)):
        return None
    found = {**_rate(run, median_ratio(run)), "fell": fell, "fell_lately": lately, "share": lately / fell, "last_loss": after.mean}
    return Finding(
        f"{lately / fell:.0%} of the fall of the training loss came between the last two fifths of {run.steps:,} steps, by the sum of their learning "
        "rates.",
        found,
        "The run ended before the task was learnt; the numbers would be better with more steps.",
        f"train.epochs={2 * run.config.train.epochs:g} (or train.steps), or a larger optim.learning_rate; a new run, since the schedule has ended.",
    )  # fmt: skip


def _got_worse_since(run: RunFiles) -> bool:
    """Returns whether a held-out loss was better at the result than at the end, so that more steps would not have helped."""
    curves = ((whole, whole.until(run.result_step)) for whole in map(run.eval_curve, run.evals))
    return any(bool(judged) and whole.values[-1] > judged.values[-1] for whole, judged in curves)


def median_ratio(run: RunFiles) -> float | None:
    """Returns the median of update_ratio over records with a learning rate, None where it was not logged."""
    found = [record["update_ratio"] for record in run.train if record.get("update_ratio") and record.get("learning_rate")]
    return float(np.median(found)) if found else None


def end_of(curve: Curve) -> float:
    """Returns the loss of the last tenth of a curve that is not empty."""
    level = curve.level(0.9, 1.0)
    return level.mean if level is not None else float(curve.values[-1])


def _rate(run: RunFiles, ratio: float | None) -> dict[str, float]:
    return {"optim.learning_rate": run.config.optim.learning_rate, **({"update_ratio": ratio} if ratio is not None else {})}


def _by_learning_rate(run: RunFiles, curve: Curve) -> Curve:
    """Returns a curve over the sum of the learning rates so far in place of the steps, where these are known."""
    rates = run.curve("learning_rate")
    if not rates or not rates.values.max() > 0:
        return curve
    sums = np.cumsum(rates.values * np.diff(rates.steps, prepend=0))
    return Curve(np.interp(curve.steps, rates.steps, sums), curve.values)
