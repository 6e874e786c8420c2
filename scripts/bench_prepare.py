"""Measures preparation (read, render, tokenise, mask, pack, store) against the bare tokenizers on the same texts.

    python scripts/bench_prepare.py --data ../shared/assets/datasets/gsm8k/train.jsonl \
        --tokenizer ../shared/assets/tokenizers/llama2 [--chat_template auto]

The rivals are one batch call of a transformers tokenizer, and one of the `tokenizers` library below it, which makes no
Python lists; both use all cores and do nothing else. All are run in turn, `--rounds` times; the medians of their tokens/s
and the ratios are printed as one JSON line. Opening the tokenizer for the first time, which imports transformers, is
measured apart. Nothing else should run on the machine meanwhile.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL with the fields question and answer")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer directory")
    parser.add_argument("--chat_template", default="none", help="as data.chat_template")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    import transformers

    from sft_jax.config import parse_config
    from sft_jax.data.prepare import prepare
    from sft_jax.data.tokenizer_cache import open_tokenizer

    rows = [json.loads(line) for line in Path(arguments.data).read_text().splitlines()]
    texts = [row["question"] + row["answer"] for row in rows]
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.tokenizer)
    rivals = {
        "transformers": lambda: tokenizer(texts, add_special_tokens=False)["input_ids"],
        "tokenizers": lambda: [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)],
    }
    with tempfile.TemporaryDirectory() as folder:

        def prepared(name: str, data: str):
            config = parse_config({
                "model": {"path": arguments.tokenizer},
                "data": {"train": data, "columns": {"prompt": "question", "completion": "answer"}, "overlength": "drop",
                         "chat_template": arguments.chat_template, "max_length": arguments.length, "cache_dir": f"{folder}/{name}"},
            })  # fmt: skip
            started = time.perf_counter()
            open_tokenizer(arguments.tokenizer, Path(config.data.cache_dir))
            opened = time.perf_counter()
            result = prepare(config.data, model_path=arguments.tokenizer, log=lambda line: None)
            return opened - started, time.perf_counter() - opened, result

        opening, _, _ = prepared("first", arguments.data)
        seconds: dict[str, list[float]] = {name: [] for name in ("prepare", *rivals)}
        for number in range(arguments.rounds):
            for name, run in rivals.items():
                started = time.perf_counter()
                ids = run()
                seconds[name].append(time.perf_counter() - started)
            _, took, result = prepared(str(number), arguments.data)
            seconds["prepare"].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    bare, stored = sum(map(len, ids)), result.report["train"]["sets"]["train"]["tokens"]
    rates = {name: (stored if name == "prepare" else bare) / median for name, median in medians.items()}
    print(json.dumps({
        "data": Path(arguments.data).name, "rows": len(rows), "tokenizer": Path(arguments.tokenizer).name,
        "chat_template": arguments.chat_template, "tokens": stored, "seconds": round(medians["prepare"], 2),
        "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
        **{f"prepare / {name}": round(rates["prepare"] / rates[name], 3) for name in rivals},
        "first_opening_of_the_tokenizer_seconds": round(opening, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
