"""What TRL's trainer does to rows before it trains: adds EOS, tokenises, packs. Prints tokens, seconds, peak memory.

    python scripts/peers/trl_prepare.py DATA.jsonl TOKENIZER LENGTH

The trainer is made as a user makes it, with a model of no weight, and its own preparation is timed.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_data import COLUMNS, measured

TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}


def main() -> None:
    data, tokenizer, length = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        from datasets import load_dataset
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        from trl import SFTConfig, SFTTrainer

        processing = AutoTokenizer.from_pretrained(tokenizer)
        processing.pad_token = processing.pad_token or processing.eos_token
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(processing), **TINY))
        own, took = SFTTrainer._prepare_dataset, {}

        def timed(self, *arguments, **keywords):
            def prepare() -> int:
                started = time.perf_counter()
                took["dataset"] = own(self, *arguments, **keywords)
                took["seconds"] = time.perf_counter() - started
                return 0

            took["memory"] = measured(prepare)["peak_memory_bytes"]
            return took["dataset"]

        SFTTrainer._prepare_dataset = timed
        rows = load_dataset("json", data_files=data, split="train").rename_columns({ours: name for name, ours in COLUMNS.items()})
        config = SFTConfig(
            output_dir=folder, max_length=int(length), packing=True, dataset_num_proc=os.cpu_count(), report_to=[], use_cpu=True, bf16=False,
        )  # fmt: skip
        SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=processing)
        tokens = sum(map(len, took["dataset"]["input_ids"]))
    print(json.dumps({"tokens": tokens, "seconds": took["seconds"], "peak_memory_bytes": took["memory"]}))


if __name__ == "__main__":
    main()
