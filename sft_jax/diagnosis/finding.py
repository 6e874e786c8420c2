"""What a cause is looked for in, and what is said where it is found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sft_jax.diagnosis.health import Health
from sft_jax.diagnosis.prompts import PromptDifference
from sft_jax.diagnosis.run_files import RunFiles
from sft_jax.doctor.findings import Diagnosis
from sft_jax.training.metrics import Record


class Finding(NamedTuple):
    """A cause that was found."""

    says: str  # what was seen, in a sentence with its numbers
    evidence: dict[str, float | int | str]
    why: str  # why that spoils a result
    remedy: str  # keys of the configuration, or what else to do


@dataclass(frozen=True)
class Divergence:
    """How far apart two models are on the same tokens."""

    kl: float  # KL(model || reference) in nats a token, the mean over the tokens
    error: float  # its standard error, over the texts
    tokens: int


@dataclass(frozen=True)
class TextLoss:
    """The loss of the same texts before and after, nats a token."""

    base: float
    tuned: float
    rise_interval: tuple[float, float] | None  # 95 %, of tuned - base, over the texts
    texts: int
    tokens: int


@dataclass(frozen=True)
class Measured:
    """What was computed with the models of the run."""

    general: TextLoss | None = None  # of the text that the user gave
    own_samples: TextLoss | None = None  # of what the base model writes by itself
    from_base: Divergence | None = None  # of the trained model, on neutral prompts
    export: Divergence | None = None  # of the export from the trained model, on the same prompts


# What is looked at beside the files of a run.
PROMPTS, DATA, EXPORTED_WEIGHTS, OWN_SAMPLES = "prompts", "data", "exported weights", "own samples"


@dataclass(frozen=True)
class Evidence:
    """All that is known of a run."""

    run: RunFiles
    health: dict[str, Health] = field(default_factory=dict)  # by held-out set, of its last answers
    health_first: dict[str, Health] = field(default_factory=dict)  # of its first ones
    prompts: PromptDifference | None = None
    data: Diagnosis | None = None
    measured: Measured = Measured()
    answers: tuple[Record, ...] = ()  # like records of samples.jsonl; made for the report, of a run that has answered no prompts
    absent: Mapping[str, str] = field(default_factory=dict)  # by name of the above, why it was not looked at


class Cause(NamedTuple):
    """An entry of CAUSES."""

    about: str
    check: Callable[[Evidence], Finding | None]
    lacks: Callable[[Evidence], str]  # why it cannot be looked for, or only in part; "" where it can


def number(value: Any) -> str:
    """Returns a value of the evidence as it is shown."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
