"""What scripts/plan_recipes.py takes for a plan that does not keep what was promised."""

import re

import pytest
from plan_recipes import PLANNED, README, fault, run

from sft_jax.planning.machines import machine
from sft_jax.training.hardware import GPU_MEMORY_FRACTION

GATE = next(one for one in PLANNED if one.gate and one.topology.startswith("v"))
OTHER = next(one for one in PLANNED if not one.gate and one.topology.startswith("a100"))
# Recipes that the README says are for one GPU of so many GB, and the sizes.
CLAIMED = [
    (recipe, int(size))
    for recipe, cards in re.findall(r"^\| `(\w+)` \| ([^|]*one GPU of [^|]*) \|$", README.read_text(), re.MULTILINE)
    for size in re.findall(r"of (\d+) GB", cards)
]
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


def planned_for(recipe: str, size: int) -> list:
    """Returns the plans of a recipe for one GPU of `size` GB."""
    plans = [(one, machine(one.topology)) for one in PLANNED if one.recipe == recipe]
    memory = GPU_MEMORY_FRACTION * size * 1e9
    return [one for one, on in plans if on.chip.platform == "gpu" and on.devices == 1 and on.chip.memory == pytest.approx(memory)]


def test_every_gpu_that_the_readme_names_is_planned():
    """Or it would be a claim that nobody has looked at."""
    assert len(CLAIMED) >= 5
    assert not [claim for claim in CLAIMED if not planned_for(*claim)]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "size"), CLAIMED)
def test_recipes_fit_the_gpus_that_the_readme_names(recipe, size):
    for one in planned_for(recipe, size):
        assert run(one, estimate=True)["fits"], one.name
