"""A held-out set and a model on any mesh, for tests of evaluation; as a program, one process of several."""

import json
import sys

import jax
from flax import nnx
from synthetic_data import Plain, make_stream, random_examples
from tiny_models import random_decoder

from sft_jax.config import OptimConfig
from sft_jax.evaluation.losses import evaluate_loss
from sft_jax.evaluation.generate import generate_ids
from sft_jax.evaluation.sampling import sampling
from sft_jax.evaluation.step import make_eval_step
from sft_jax.model.options import Options
from sft_jax.model.sharding import constrain_fn, make_mesh, shardings
from sft_jax.training.optim import make_optimizer
from sft_jax.training.platform import join_processes
from sft_jax.training.state import create_state

VOCABULARY = 96  # of the tiny models
PROMPTS = [[64, 77, 2], [5, 45, 49, 60, 27, 94, 3, 3, 81, 19, 2], [22]]


def held_out(count: int = 30) -> list[Plain]:
    """Examples of very different lengths and weights."""
    return [
        Plain([i % VOCABULARY for i in example.ids], [w * (1 + n % 3) for n, w in enumerate(example.weights)])
        for example in random_examples(count, seed=4)
    ]


def held_out_stream(packing: bool = True):
    return make_stream(held_out(), max_length=48, max_segments=6, packing=packing, shuffle=False)


def decoder_on(mesh, name: str = "llama"):
    """The same random decoder on any mesh."""
    decoder = random_decoder(name, Options() if mesh is None else Options(constrain=constrain_fn(mesh)))
    return jax.tree.map(jax.numpy.copy, decoder) if mesh is None else jax.device_put(decoder, shardings(decoder, mesh))


def evaluate_on(mesh, batch_size: int = 4, packing: bool = True) -> dict:
    decoder = decoder_on(mesh)
    graphdef, state = create_state(decoder, make_optimizer(OptimConfig(), nnx.state(decoder), 4), mesh)
    return evaluate_loss(make_eval_step(graphdef, mesh), state, held_out_stream(packing), batch_size, mesh)


def everything_on(mesh) -> dict:
    answers = generate_ids(decoder_on(mesh), PROMPTS, (), 8, options=sampling(1.0, top_p=0.9), seed=5)
    return {"values": evaluate_on(mesh), "ids": [answer.ids for answer in answers]}


if __name__ == "__main__":
    join_processes(100)
    json.dump(everything_on(make_mesh(1, -1, 1)), sys.stdout)
