"""data_report.json: what was read, what is used, what was left out and why, and what the rows look like."""

import re
from typing import Any

import numpy as np

from sft_jax.data.packing.corpus import Corpus
from sft_jax.data.packing.overlength import Documents, OverlengthCounts, supervised_targets
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.data.stores.store import Store

_FIRST = 3  # rows that are named for each reason
PERCENTILES = (0, 25, 50, 75, 90, 95, 99, 100)


def describe_set(
    corpus: Corpus, index: int, documents: Documents, counts: OverlengthCounts, beyond_cap: int
) -> dict[str, Any]:
    """Returns the counts of one data set, before and after the over-length policy and the cap.

    `documents` are those that are left, `beyond_cap` the rows that the cap left out.
    """
    store = corpus.stores[index]
    first, end = corpus.bases[index : index + 2].tolist()
    zeros = np.zeros(end - first, np.int64)
    whole = Documents(np.arange(first, end), zeros, zeros, corpus.lengths[first:end])
    tokens, supervised = int(whole.lengths.sum()), int(supervised_targets(corpus, whole).sum())
    percentiles = np.percentile(store.lengths, PERCENTILES, method="inverted_cdf")
    meta = store.meta
    return {
        "files": list(store.file_names),
        "format": meta["format"],
        "rows_read": meta["rows"],
        "rows_used": meta["used_rows"],
        "rows_left_out": {"total": len(store.bad_rows), "reasons": group_reasons(store)},
        "unused_fields": meta["unused_fields"],
        "more_unused_fields": meta["more_unused_fields"],
        "examples": len(store),
        "seam_cuts": meta["kinds"].get("cut", 0),
        "per_turn": meta["kinds"].get("per_turn", 0),
        "kinds": meta["kinds"],
        "added_tokens": meta["added_tokens"],
        "counts": meta["counts"],
        "over_length": counts.as_dict(),
        "rows_beyond_cap": beyond_cap,
        "documents": len(documents),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": supervised / tokens,
        "length_percentiles": {str(p): int(v) for p, v in zip(PERCENTILES, percentiles, strict=True)},
        "mean_length": float(store.lengths.mean()),
        "used_tokens": int(documents.lengths.sum()),
        "used_supervised_tokens": int(supervised_targets(corpus, documents).sum()),
    }  # fmt: skip


def describe_stream(stream: RowStream) -> dict[str, Any]:
    """Returns the totals of a stream of rows, and what it holds of each set."""
    epochs = stream.epochs_of_sets()
    sets = {name: {**counts._asdict(), "epochs": epochs[name]} for name, counts in stream.set_counts(stream.total_rows).items()}
    return {
        "rows": stream.total_rows,
        "max_length": stream.max_length,
        "max_segments": stream.max_segments,
        "rows_of_each_epoch": list(stream.epoch_rows),
        "documents": stream.examples,
        "sets": sets,
        "tokens": stream.real_tokens,
        "supervised_tokens": stream.supervised_tokens,
        "supervised_share": stream.supervised_tokens / stream.real_tokens,
        "packing_efficiency": stream.real_tokens / (stream.total_rows * stream.max_length),
        "documents_per_row": stream.examples / stream.total_rows,
        "plan_hash": stream.plan_hash,
    }


def group_reasons(store: Store) -> list[dict[str, Any]]:
    """Returns the reasons for bad rows, most frequent first: how many, and the first rows with the full reason.

    Reasons are counted as the same when they differ only in numbers and in what they quote.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in store.bad_rows:
        key = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", entry["reason"])
        groups.setdefault(key, []).append(entry)
    found = []
    for entries in sorted(groups.values(), key=len, reverse=True):
        first = [f"{store.file_names[entry['file']]}:{entry['line']}" for entry in entries[:_FIRST]]
        found.append({"reason": entries[0]["reason"], "rows": len(entries), "first": first})
    return found
