"""CAUSES: why a result may be disappointing. A further cause is a function and a line here, with what it is looked for in.

The order is that in which they are looked for and told: what makes others appear comes first, so the first cause that is found is the
one to remove. Wrong data and prompts spoil everything after them; a learning rate spoils what comes out.
"""

from collections.abc import Collection

from sft_jax.diagnosis import data_causes, learning_causes, needs, result_causes
from sft_jax.diagnosis.finding import Cause, Evidence, Finding

CAUSES: dict[str, Cause] = {
    "first_loss": Cause("the loss before training is that of a guess", data_causes.first_loss, needs.first_loss),
    "mask_share": Cause("what is supervised is out of line", data_causes.mask_share, needs.data_report),
    "few_tokens": Cause("too few supervised tokens", data_causes.few_tokens, needs.data_report),
    "duplicates_or_leakage": Cause("rows that come up several times, or are held out as well", data_causes.duplicates_or_leakage, needs.rows),
    "template": Cause("prompts of training and of inference differ", result_causes.template, needs.prompts),
    "export_differs": Cause("the export is not the trained model", result_causes.export_differs, needs.exported_weights),
    "learning_rate_too_high": Cause("steps overshoot", learning_causes.learning_rate_too_high, needs.training_curve),
    "learning_rate_too_low": Cause("the model hardly moved", learning_causes.learning_rate_too_low, needs.update_ratio),
    "over_fitting": Cause("held-out data get worse while training data get better", learning_causes.over_fitting, needs.held_out_curve),
    "under_training": Cause("the run ended too early", learning_causes.under_training, needs.training_curve),
    "truncated_answers": Cause("answers do not end", result_causes.truncated_answers, needs.answers),
    "forgetting": Cause("the base could do more", result_causes.forgetting, needs.texts_of_the_base),
}


def find_causes(evidence: Evidence) -> dict[str, Finding]:
    """Returns what was found, by cause, in the order of CAUSES."""
    found = {name: cause.check(evidence) for name, cause in CAUSES.items()}
    return {name: finding for name, finding in found.items() if finding is not None}


def not_looked_for(evidence: Evidence, found: Collection[str]) -> dict[str, str]:
    """Returns why, by cause, for those that were not `found` and could not be looked for, or only in part."""
    lacking = {name: cause.lacks(evidence) for name, cause in CAUSES.items() if name not in found}
    return {name: why for name, why in lacking.items() if why}
