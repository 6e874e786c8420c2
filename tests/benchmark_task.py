"""A benchmark of lm-evaluation-harness in a file, with its data beside it."""

import json
from pathlib import Path

_TASK = """
task: %s
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
num_fewshot: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""


def write_task(folder: Path, name: str, rows: list[dict]) -> Path:
    """Writes the task and its rows of "text", "choices" and "label", the number of the right choice; returns its file."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(_TASK % (name, folder / "rows.jsonl"))
    return folder / f"{name}.yaml"
