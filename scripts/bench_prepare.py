"""Measures preparation (read, render, tokenise, mask, pack, store) against the bare tokenizer on the same texts.

    python scripts/bench_prepare.py --data ../shared/assets/datasets/gsm8k/train.jsonl \
        --tokenizer ../shared/assets/tokenizers/llama2 [--chat_template auto]

The rival is one batch call of the `tokenizers` library on the same texts, all cores, and nothing else. Both are run in
turn, `--rounds` times; the medians of their tokens/s and the ratio are printed as one JSON line. Opening the tokenizer for the
first time, which imports transformers, is measured apart. Nothing else should run on the machine meanwhile.
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

    from tokenizers import Tokenizer

    from sft_jax.config import parse_config
    from sft_jax.data.prepare import open_tokenizer, prepare

    rows = [json.loads(line) for line in Path(arguments.data).read_text().splitlines()]
    texts = [row["question"] + row["answer"] for row in rows]
    bare = Tokenizer.from_file(str(Path(arguments.tokenizer) / "tokenizer.json"))
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
        bare_seconds, seconds = [], []
        for number in range(arguments.rounds):
            started = time.perf_counter()
            encodings = bare.encode_batch_fast(texts, add_special_tokens=False)
            bare_seconds.append(time.perf_counter() - started)
            _, took, result = prepared(str(number), arguments.data)
            seconds.append(took)
    bare_rate = sum(len(encoding.ids) for encoding in encodings) / statistics.median(bare_seconds)
    stored = result.report["train"]["sets"]["train"]["tokens"]
    rate = stored / statistics.median(seconds)
    print(json.dumps({
        "data": Path(arguments.data).name, "rows": len(rows), "tokenizer": Path(arguments.tokenizer).name,
        "chat_template": arguments.chat_template, "tokens": stored, "tokens_per_second": round(rate),
        "bare_tokens_per_second": round(bare_rate), "ratio": round(rate / bare_rate, 3),
        "seconds": round(statistics.median(seconds), 2), "first_opening_of_the_tokenizer_seconds": round(opening, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
