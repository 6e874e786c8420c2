"""Measures data: preparing them (read, render, tokenise, mask, pack, store) beside rivals, and feeding what is prepared.

    python scripts/bench_data.py --data ../shared/assets/datasets/gsm8k/train.jsonl \
        --tokenizer ../shared/assets/tokenizers/llama2 [--chat_template auto] [--repeat 10] [--peer trl]

Prints JSON lines, one for each case, then one of ratios:

    tokenizers    batch calls of the `tokenizers` library, which makes no Python lists; all cores, and nothing else
    transformers  batch calls of the transformers tokenizer on the same texts
    prepare       our preparation as a user meets it, the first opening of the tokenizer apart (it imports transformers)
    trl           what TRL's trainer does to the same rows before it trains: map and pack, with as many processes as cores
    again         preparation of what is prepared already
    feed          reading batches of prepared rows, as the training loop does

tokens_per_second counts the tokens that the case makes or reads; peak_memory_bytes is that of the process and its children
together, above what it had before. `--repeat` writes every row so many times, each with its number, so that files of any
size can be had. Cases are run in turn, `--rounds` times, and medians are printed; nothing else should run meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLUMNS = {"prompt": "question", "completion": "answer"}
FEED_ROWS = 64  # of a batch
BATCH_ROWS = 150_000  # of a batch call of a tokenizer, which holds all that it makes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL with the fields question and answer")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer directory")
    parser.add_argument("--chat_template", default="none", help="as data.chat_template")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], choices=["trl"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_all(arguments, Path(folder))


def run_all(arguments, folder: Path) -> None:
    """Runs every case in turn and prints the medians."""
    import transformers

    from sft_jax.data.stores.tokenizer_cache import open_tokenizer

    data = repeated(Path(arguments.data), arguments.repeat, folder)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts = [row["question"] + row["answer"] for row in rows]
    count = len(rows)
    parts = [texts[start : start + BATCH_ROWS] for start in range(0, count, BATCH_ROWS)]
    del rows, texts
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.tokenizer)
    started = time.perf_counter()
    open_tokenizer(arguments.tokenizer, folder / "opened")
    opening = time.perf_counter() - started
    number = iter(range(10**6))
    prepared: list[Any] = []

    def prepare_new() -> int:
        prepared[:] = [prepare_into(folder / f"cache{next(number)}", data, arguments)]
        return prepared[0].report["train"]["sets"]["train"]["tokens"]

    def prepare_again() -> int:
        prepared[:] = [prepare_into(sorted(folder.glob("cache*"), key=os.path.getmtime)[-1], data, arguments)]
        return prepared[0].report["train"]["sets"]["train"]["tokens"]

    cases: dict[str, Callable[[], int]] = {
        "tokenizers": lambda: sum(
            len(each.ids) for part in parts for each in tokenizer.backend_tokenizer.encode_batch_fast(part, add_special_tokens=False)
        ),
        "transformers": lambda: sum(len(ids) for part in parts for ids in tokenizer(part, add_special_tokens=False)["input_ids"]),
        "prepare": prepare_new,
        "again": prepare_again,
        "feed": lambda: feed(prepared[0].train),
    }
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for name, case in cases.items():
            results.setdefault(name, []).append(measured(case))
        if arguments.peer:
            results.setdefault("trl", []).append(trl(data, arguments))
    rates = {}
    for name, found in results.items():
        median = {key: statistics.median(each[key] for each in found) for key in found[0]}
        rates[name] = median["tokens"] / median["seconds"]
        print(json.dumps({
            "case": name, "data": data.name, "rows": count, "tokenizer": Path(arguments.tokenizer).name,
            "chat_template": arguments.chat_template, "tokens": int(median["tokens"]), "seconds": round(median["seconds"], 3),
            "tokens_per_second": round(rates[name]), "peak_memory_bytes": int(median["peak_memory_bytes"]),
        }), flush=True)  # fmt: skip
    ratios = {f"prepare / {name}": round(rates["prepare"] / rates[name], 3) for name in ("transformers", "tokenizers", "trl") if name in rates}
    print(json.dumps({"case": "ratios", **ratios, "first_opening_of_the_tokenizer_seconds": round(opening, 2)}))


def repeated(data: Path, times: int, folder: Path) -> Path:
    """Returns a file with every row so many times; each copy has a number, so that all differ."""
    if times == 1:
        return data
    lines = data.read_text().splitlines()
    path = folder / f"{data.stem}_x{times}.jsonl"
    with path.open("w") as file:
        for copy in range(times):
            for line in lines:
                row = json.loads(line)
                file.write(json.dumps({**row, "question": f"{copy}. {row['question']}"}) + "\n")
    return path


def prepare_into(cache: Path, data: Path, arguments):
    """Prepares the data with a cache of its own."""
    from sft_jax.config_parsing import parse_config
    from sft_jax.data.prepare import prepare

    config = parse_config({
        "model": {"path": arguments.tokenizer},
        "data": {"train": str(data), "columns": COLUMNS, "overlength": "drop", "chat_template": arguments.chat_template,
                 "max_length": arguments.length, "cache_dir": str(cache)},
    })  # fmt: skip
    return prepare(config.data, model_path=arguments.tokenizer, log=lambda line: None)


def feed(stream) -> int:
    """Reads all rows in batches and returns how many tokens they have."""
    from sft_jax.data.packing.pipeline import batches

    return sum(int((batch.segments > 0).sum()) for _, batch in batches(stream, 0, FEED_ROWS, FEED_ROWS))


def measured(case: Callable[[], int]) -> dict[str, float]:
    """Returns tokens, seconds and the peak memory of a case, children included."""
    before, peak, done = memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        tokens = case()
        seconds = time.perf_counter() - started
    finally:
        done.set()
        watcher.join()
    return {"tokens": tokens, "seconds": seconds, "peak_memory_bytes": max(peak[0] - before, 0)}


def memory() -> int:
    """Returns the resident memory of this process and its children, in bytes; pages that several share count once each."""
    import psutil

    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def trl(data: Path, arguments) -> dict[str, float]:
    """Returns what the rival measures of itself, in a process of its own."""
    peer = Path(__file__).parent / "peers" / "trl_prepare.py"
    command = [sys.executable, str(peer), str(data), arguments.tokenizer, str(arguments.length)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
