"""What commands print for programs is JSON also where a number is none that JSON has."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from sft_jax import cli
from sft_jax.checking.outcome import Outcome
from sft_jax.checking.report import to_dict


def strictly(text: str) -> dict:
    """Parses one JSON object, and refuses NaN and Infinity, which Python takes and no other reader."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_number_that_is_not_finite_is_null(capsys):
    cli.print_json({"a": math.nan, "b": [1.5, -math.inf, {"c": math.inf}], "d": (True, None, "NaN")})
    out = capsys.readouterr().out
    assert strictly(out) == {"a": None, "b": [1.5, None, {"c": None}], "d": [True, None, "NaN"]} and out.count("\n") == 1


def test_a_contract_that_came_out_as_nan_fails_and_is_null(capsys):
    """As of a model whose loss is not finite, which is what selfcheck is for."""
    mesh = SimpleNamespace(shape={"data": 1}, devices=np.array([SimpleNamespace(platform="cpu")]))
    subject = SimpleNamespace(run=SimpleNamespace(model=SimpleNamespace(path="m")), mesh=mesh, batch=SimpleNamespace(tokens=np.zeros((2, 8))))
    cli.print_json(to_dict(subject, [Outcome("packing", "loss of a token", math.nan, 1e-4)]))
    found = strictly(capsys.readouterr().out)
    assert found["holds"] is False and found["contracts"][0]["state"] == "fails" and found["contracts"][0]["error"] is None


@pytest.mark.parametrize("failed", [False, True])
def test_results_of_runs_with_a_loss_that_is_none_are_one_object(capsys, failed):
    try:
        cli.show_results({"loss": math.nan}, "text", [], as_json=True, failed=failed)
    except SystemExit as end:
        assert failed and end.code == cli.EXIT_FINDINGS
    assert strictly(capsys.readouterr().out) == {"loss": None}
