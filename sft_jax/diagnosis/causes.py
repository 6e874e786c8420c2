"""CAUSES: why a result may be disappointing. A further cause is a function and a line here.

The order is that in which they are looked for and told: what makes others appear comes first, so the first cause that is found is the
one to remove. Wrong data and prompts spoil everything after them; a learning rate spoils what comes out.
"""

from sft_jax.diagnosis import data_causes, learning_causes, result_causes
from sft_jax.diagnosis.finding import Cause, Evidence, Finding

CAUSES: dict[str, Cause] = {
    "first_loss": Cause("the loss before training is that of a guess", data_causes.first_loss),
    "mask_share": Cause("what is supervised is out of line", data_causes.mask_share),
    "few_tokens": Cause("too few supervised tokens", data_causes.few_tokens),
    "duplicates_or_leakage": Cause("rows that come up several times, or are held out as well", data_causes.duplicates_or_leakage),
    "template": Cause("prompts of training and of inference differ", result_causes.template),
    "export_differs": Cause("the export is not the trained model", result_causes.export_differs),
    "learning_rate_too_high": Cause("steps overshoot", learning_causes.learning_rate_too_high),
    "learning_rate_too_low": Cause("the model hardly moved", learning_causes.learning_rate_too_low),
    "over_fitting": Cause("held-out data get worse while training data get better", learning_causes.over_fitting),
    "under_training": Cause("the run ended too early", learning_causes.under_training),
    "truncated_answers": Cause("answers do not end", result_causes.truncated_answers),
    "forgetting": Cause("the base could do more", result_causes.forgetting),
}


def find_causes(evidence: Evidence) -> dict[str, Finding]:
    """Returns what was found, by cause, in the order of CAUSES."""
    found = {name: cause.check(evidence) for name, cause in CAUSES.items()}
    return {name: finding for name, finding in found.items() if finding is not None}
