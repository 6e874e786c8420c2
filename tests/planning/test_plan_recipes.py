"""What scripts/plan_recipes.py takes for a plan that does not keep what was promised."""

import pytest
from plan_recipes import PLANNED, fault

GATE = next(one for one in PLANNED if one.gate and one.topology.startswith("v"))
OTHER = next(one for one in PLANNED if not one.gate and one.topology.startswith("a100"))
GOOD = {"fits": True, "estimated": False, "whole_arrays": []}


@pytest.mark.parametrize(
    ("planned", "changed", "words"),
    [
        (GATE, {}, ""), (GATE, {"fits": False}, "does not fit"), (GATE, {"whole_arrays": ["logits of all"]}, "logits of all"),
        (GATE, {"estimated": True, "whole_arrays": None}, "by estimate only"), (GATE, {"whole_arrays": None}, "before its arrays were looked at"),
        (OTHER, {"estimated": True, "whole_arrays": None}, ""),
    ],
)  # fmt: skip
def test_faults(planned, changed, words):
    found = fault(planned, {**GOOD, **changed})
    assert words in found and bool(words) == bool(found)
