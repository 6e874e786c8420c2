"""The data report as lines for a reader."""

import math
from collections.abc import Iterator
from typing import Any


def report_lines(report: dict[str, Any], batch_size: int, steps: int = 0) -> Iterator[str]:
    """Yields the lines of a data report, see sft_jax.data.data_report.

    Args:
        batch_size: rows of an optimizer step.
        steps: of the run, where these decide its length; 0 = epochs do.
    """
    train = report["train"]
    for name, values in train["sets"].items():
        yield from _set_lines(f"data.train '{name}'", values)
        planned = train["stream"]["sets"][name]
        share = planned["supervised_tokens"] / train["stream"]["supervised_tokens"]
        yield (
            f"  in the run: {planned['documents']:,} documents, {planned['epochs']:g} of each on average, "
            f"{share:.1%} of the supervised tokens"
        )
    yield from _stream_lines(train["stream"], batch_size, steps)
    for name, values in report["eval"].items():
        yield from _set_lines(f"data.eval '{name}'", values)
        yield f"  rows of {values['stream']['max_length']:,}: {values['stream']['rows']:,}, {_fill(values['stream'])}"


def _set_lines(title: str, values: dict[str, Any]) -> Iterator[str]:
    left_out = values["rows_left_out"]
    yield (
        f"{title}: {values['rows_read']:,} rows of format '{values['format']}' read, {values['rows_used']:,} used, "
        f"{left_out['total']:,} left out"
    )
    for group in left_out["reasons"]:
        yield f"  left out: {group['rows']:,} ({', '.join(group['first'])}): {group['reason']}"
    unused = [f"{name} ({rows:,})" for name, rows in values["unused_fields"].items()]
    if unused:
        more = f" and {values['more_unused_fields']:,} more" if values["more_unused_fields"] else ""
        yield f"  fields that nothing reads, with their rows: {', '.join(unused)}{more}"
    counted = {"cut at an answer's border": values["seam_cuts"], "by turn": values["per_turn"], **values["counts"]}
    if any(counted.values()):
        yield f"  rows {', '.join(f'{name}: {count:,}' for name, count in counted.items() if count)}"
    over = values["over_length"]
    if over["over_length"]:
        yield (
            f"  over length ('{over['policy']}'): {over['over_length']:,} examples, {over['dropped']:,} dropped, {over['cut']:,} cut, "
            f"{over['split']:,} split; {over['tokens_lost']:,} tokens lost, {over['supervised_tokens_lost']:,} of them supervised"
        )
    if values["rows_beyond_cap"]:
        yield f"  beyond the cap: {values['rows_beyond_cap']:,} rows"
    used, supervised = values["used_tokens"], values["used_supervised_tokens"]
    yield (
        f"  used: {values['documents']:,} documents, {used:,} tokens, {supervised:,} supervised ({supervised / used:.1%}); "
        f"an example has {values['mean_length']:,.0f} tokens on average, {values['length_percentiles']['100']:,} at most"
    )


def _stream_lines(stream: dict[str, Any], batch_size: int, steps: int) -> Iterator[str]:
    epochs = stream["rows_of_each_epoch"]
    rows = sorted({min(epochs), max(epochs)})
    yield (
        f"Rows of {stream['max_length']:,}: {' to '.join(f'{count:,}' for count in rows)} an epoch, {stream['rows']:,} in the run, "
        f"{_fill(stream)}, {stream['supervised_share']:.1%} of the tokens supervised"
    )
    yield (
        f"Steps of {batch_size:,} rows: {' to '.join(f'{count / batch_size:,.1f}' for count in rows)} an epoch, "
        f"{steps or math.ceil(stream['rows'] / batch_size):,} in the run"
    )


def _fill(stream: dict[str, Any]) -> str:
    return f"{stream['packing_efficiency']:.1%} filled with {stream['documents_per_row']:.1f} documents each"
