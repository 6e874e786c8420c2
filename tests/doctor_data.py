"""Sets of rows for the tests of the doctor."""

import io
import random

import numpy as np
from rich.console import Console
from row_files import lines, write

from sft_jax.config import default_config
from sft_jax.config_parsing import parse_config
from sft_jax.data.formats.conversation import Conversation, Message
from sft_jax.doctor.check import diagnose, run_check
from sft_jax.doctor.texts import texts_of

MAIL = "someone.real@mail.example.org"

WORDS = (
    "apple river stone window garden letter market winter silver candle harbour meadow thunder pocket engine ladder basket "
    "copper mirror saddle pepper button castle forest island jacket kettle lantern marble needle orange pillow quarry ribbon "
    "shadow temple velvet walnut yellow zipper anchor bridge cactus donkey eleven falcon goblet hammer insect jungle"
).split()


def sentence(seed, count=30):
    """Returns words at random, as a sentence: two of them with different seeds have next to nothing in common."""
    return " ".join(random.Random(seed).choices(WORDS, k=count)).capitalize() + "."


def row(seed, **fields):
    """Returns a row without a fault, unlike every other one."""
    return {"prompt": f"Tell me about {sentence(f'p{seed}', 12)}", "completion": sentence(f"c{seed}"), **fields}


def rows(count, first=0):
    return [row(seed) for seed in range(first, first + count)]


def pair(answer, prompt="What do you think of that?"):
    """Returns the texts of a prompt and its answer."""
    return texts_of(Conversation(prompt=prompt, completion=answer))


def chat(*turns):
    """Returns the texts of turns, (role, content) each."""
    return texts_of(Conversation(messages=tuple(Message(*turn) for turn in turns)))


def changed(text, count, seed=0):
    """Returns a text of which `count` words are others."""
    parts = text.split()
    for place in np.random.default_rng(seed).choice(len(parts), count, replace=False):
        parts[place] = "changed"
    return " ".join(parts)


def configure(folder, train, held_out=None, /, **data):
    """Writes rows to files and returns the configuration that names them."""
    config = default_config()
    config.model.path = "unused"
    config.data.workers = 1
    config.data.train = write(folder, "train.jsonl", lines(*train))
    if held_out is not None:
        config.data.eval = write(folder, "eval.jsonl", lines(*held_out))
    for name, value in data.items():
        config.data[name] = value
    return parse_config(config)


def examine(folder, train, held_out=None, benchmark=()):
    """Returns the diagnosis of rows."""
    return diagnose(configure(folder, train, held_out).data, benchmark)


def found(diagnosis, kind):
    """Returns {line: detail} of what was found of a kind in the training rows."""
    return {finding.line: finding.detail for finding in diagnosis.findings[kind] if finding.set == "data.train"}


def faulty(count=30):
    """Returns rows with a fault of many kinds each, beside some without."""
    return [
        *rows(count),
        row(1),
        row(50, completion=" "),
        row(51, completion=f"{sentence(51)} Write to {MAIL}."),
        row(52, completion="I'm sorry, but I can't help with that."),
        row(53, completion=sentence(53) + "<|im_end|>"),
        row(54, completion=sentence(54) + "\n```\nx = 1"),
    ]


def visit(config, **options):
    """Runs the check; returns the exit code and what it printed."""
    out = io.StringIO()
    code = run_check(config, console=Console(file=out, width=160), **options)
    return code, out.getvalue()
