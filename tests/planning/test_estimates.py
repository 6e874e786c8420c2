"""Estimates of memory against what the compiler for TPUs said: of scripts/estimates.jsonl, and of the recipes in scripts/plans.jsonl."""

import json

import pytest
from check_estimates import CASES, RECORDED, WITHIN, plan
from plan_recipes import PLANNED, read_plans, run
from slow_values import slow

from sft_jax.planning.machines import machine

COMPILED = {found["case"]: found for found in map(json.loads, RECORDED.read_text().splitlines())}
PLANS = read_plans()
# Of one slice: what several hold for the network no formula counts (ARCHITECTURE.md).
RECIPES = {one.name: one for one in PLANNED if machine(one.topology).nodes == 1 and not PLANS[one.name]["estimated"]}


def test_all_cases_were_compiled():
    assert list(COMPILED) == [case.name for case in CASES]
    assert len(RECIPES) >= 6


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_estimate_is_within_a_tenth(case):
    found = plan(case, estimated=True, plain=True)
    assert found.held.state == COMPILED[case.name]["state"]
    assert found.train.needed == pytest.approx(COMPILED[case.name]["compiled"], rel=WITHIN)


@pytest.mark.parametrize("name", [min(RECIPES), *slow(*sorted(RECIPES)[1:])])
def test_estimates_of_the_recipes_are_within_a_tenth(name):
    """With what is gathered ahead, as the launchers have them compiled."""
    assert run(RECIPES[name], estimate=True)["needed_bytes"] == pytest.approx(PLANS[name]["needed_bytes"], rel=WITHIN)
