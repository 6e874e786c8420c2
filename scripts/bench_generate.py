"""Measures batched greedy generation beside transformers.generate, on the same prompts in the same run.

    python scripts/bench_generate.py --model ../shared/assets/models/stories260k --text ../shared/assets/reference/stories260k_greedy.txt

Prompts are pieces of the text, of very different lengths. transformers is given them sorted by length, padded at the left, in
batches of as many sequences; answers end at the same stop ids in both. Prints JSON lines, one a case, then one with the ratio
of output tokens per second and how many answers are the same token by token. Each case is run once to compile or warm up, then
in turn `--rounds` times, of which medians are printed; nothing else should run meanwhile.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--text", required=True, help="a text file of which prompts are pieces")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--longest", type=int, default=96, help="tokens of a prompt, at most")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    from sft_jax.data.tokenizers.tokens import load_tokenizer
    from sft_jax.evaluation.prompts import PromptReader, stop_ids_of
    from sft_jax.hf.source import read_source

    tokenizer = load_tokenizer(arguments.model)
    stop_ids = stop_ids_of(read_source(Path(arguments.model), arguments.model), tokenizer, PromptReader(tokenizer))
    prompts = pieces(tokenizer, Path(arguments.text).read_text(encoding="utf-8"), arguments.prompts, arguments.longest)
    cases = {"ours": ours(arguments, prompts, stop_ids), "transformers": theirs(arguments, prompts, stop_ids)}
    answers = {name: run() for name, run in cases.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.rounds):
        for name, run in cases.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    rates = {}
    for name, times in seconds.items():
        tokens = sum(map(len, answers[name]))
        rates[name] = tokens / statistics.median(times)
        shown = {"case": name, "output_tokens": tokens, "seconds": statistics.median(times), "output_tokens_per_second": rates[name]}
        print(json.dumps({**shown, "all_seconds": times}))
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    print(json.dumps({"ratio": rates["ours"] / rates["transformers"], "equal_answers": same, "prompts": len(prompts)}))


def pieces(tokenizer, text: str, count: int, longest: int) -> list[list[int]]:
    """Returns prompts of 1 to `longest` tokens that begin anywhere in the text, the same ones in every run."""
    ids, rng = tokenizer.encode(text), np.random.default_rng(0)
    sizes = rng.integers(0, longest - len(tokenizer.plain_prefix) + 1, count)
    starts = [int(rng.integers(0, max(len(ids) - size, 1))) for size in sizes]
    return [[*tokenizer.plain_prefix, *ids[start : start + size]] or ids[:1] for start, size in zip(starts, sizes, strict=True)]


Run = Callable[[], list[list[int]]]


def ours(arguments, prompts: list[list[int]], stop_ids: tuple[int, ...]) -> Run:
    from sft_jax.evaluation.generate import generate_ids
    from sft_jax.hf.load import load

    decoder, _ = load(arguments.model)

    def run() -> list[list[int]]:
        found = generate_ids(decoder, prompts, stop_ids, arguments.max_new_tokens, batch_size=arguments.batch_size)
        return [answer.ids for answer in found]

    return run


def theirs(arguments, prompts: list[list[int]], stop_ids: tuple[int, ...]) -> Run:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))

    def run() -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        for first in range(0, len(order), arguments.batch_size):
            group = order[first : first + arguments.batch_size]
            longest = max(len(prompts[index]) for index in group)
            ids, mask = torch.zeros((2, len(group), longest), dtype=torch.long)
            for row, index in enumerate(group):
                ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, longest - len(prompts[index]) :] = 1
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=mask, max_new_tokens=arguments.max_new_tokens, do_sample=False, eos_token_id=list(stop_ids),
                    pad_token_id=0,
                )  # fmt: skip
            for row, index in enumerate(group):
                new = out[row, longest:].tolist()
                answers[index] = new[: next((place for place, token in enumerate(new) if token in stop_ids), len(new))]
        return answers

    return run


if __name__ == "__main__":
    main()
