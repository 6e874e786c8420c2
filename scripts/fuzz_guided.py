"""Fuzzes readers, formats and templates in one process, led by the code that inputs reach (atheris, Python 3.11 to 3.13).

    pip install -e '.[fuzz]'; python scripts/fuzz_guided.py --assets ../shared/assets --seconds 600

An input is a file of some kind, a row, or a chat template; inputs begin as rows of all shapes in files of all kinds, and as
the built-in templates. What may come out is what scripts/fuzz_data.py allows: examples, RowError, UserError. The same is
found to be wrong, and written to --failures; the run goes on, and ends with exit code 1. Only sft_jax.data is
instrumented.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("scripts/fuzz_guided.py needs atheris, which is not installed: pip install -e '.[fuzz]'; scripts/fuzz_data.py needs nothing.")

with atheris.instrument_imports(include=["sft_jax.data"]):
    from fuzz_files import FILES, break_bytes
    from fuzz_findings import Findings, TooLong, deadline
    from fuzz_properties import Builder, try_file, try_rows
    from fuzz_rows import COLUMNS, SHAPES, mutate
    from fuzz_workers import HOSTILE

    from sft_jax.data.chats.chat import RowBuilder
    from sft_jax.data.chats.templates import TEMPLATES, ChatTemplate
    from sft_jax.data.examples import RowError
    from sft_jax.data.sources.json_rows import parse_row
    from sft_jax.data.tokenizers.tokens import load_tokenizer
    from sft_jax.errors import UserError

ROW_SECONDS = 5.0
MEMORY = 1 << 30  # bytes that a template may take
LONGEST = 20_000  # bytes of an input


@contextlib.contextmanager
def memory_limit(extra: int):
    """Raises MemoryError in what takes `extra` bytes of address space more than there are in use."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Targets:
    """What inputs go to: the first byte of an input says which, the second one with which template and columns."""

    def __init__(self, assets: Path, folder: Path):
        self._tokenizer = load_tokenizer(assets / "models" / "stories260k")
        qwen = (assets / "chat_templates" / "stock" / "Qwen-Qwen3-0.6B.jinja").read_text()
        sources = {"plain": None, **{name: TEMPLATES[name] for name in ("chatml", "llama2")}, "qwen3": qwen}
        self._ways = [self._way(name, source) for name, source in sources.items()]
        self._folder = folder
        self.outcomes: Counter[str] = Counter()
        self._all: list[Callable[[bytes, int], None]] = [self._template, self._row]
        self._all += [lambda data, choice, suffix=suffix: self._file(suffix, data, choice) for suffix in FILES]

    def _way(self, name: str, source: str | None) -> Builder:
        template = source and ChatTemplate(source, self._tokenizer.special_tokens, name=name)
        return Builder(name, RowBuilder(self._tokenizer, template), self._tokenizer)

    def seeds(self) -> list[bytes]:
        """Returns the inputs to begin with."""
        files = [FILES[suffix](SHAPES[place::4]) for suffix in FILES for place in range(2)]
        kinds = [number for number in range(2, len(self._all)) for _ in range(2)]
        found = [bytes([kind, place]) + data for place, (kind, data) in enumerate(zip(kinds, files, strict=True))]
        found += [bytes([1, place]) + json.dumps(row).encode() for place, row in enumerate(SHAPES)]
        return found + [b"\0\0" + source.encode() for source in [*TEMPLATES.values(), *HOSTILE]]

    def vary(self, data: bytes, longest: int, seed: int) -> bytes:
        """Returns another input: rows with changed fields, files with changed bytes, or what libFuzzer makes of it."""
        choose = random.Random(seed)
        if len(data) > 2 and choose.random() < 0.5:
            kind, head, rest = data[0] % len(self._all), data[:2], data[2:]
            if kind == 1:
                try:
                    return (head + json.dumps(mutate(json.loads(rest), choose), default=str).encode(errors="replace"))[:longest]
                except (ValueError, AttributeError, RecursionError):  # no row any more
                    pass
            elif kind > 1:
                return (head + break_bytes(rest, choose))[:longest]
        return atheris.Mutate(data, longest)

    def take(self, data: bytes) -> None:
        """Tries an input. Raises what may not come out."""
        if len(data) >= 2:
            self._all[data[0] % len(self._all)](data[2:], data[1])

    def _built(self, rows: list, choice: int) -> None:
        columns = COLUMNS[choice // len(self._ways) % len(COLUMNS)]
        with deadline(ROW_SECONDS * len(rows)):
            self.outcomes.update(try_rows(rows, self._ways[choice % len(self._ways)], columns))

    def _row(self, data: bytes, choice: int) -> None:
        try:
            row = parse_row(data)
        except RowError:
            self.outcomes["unreadable"] += 1
            return
        self._built([row], choice)

    def _file(self, suffix: str, data: bytes, choice: int) -> None:
        path = self._folder / f"rows{suffix}"
        path.write_bytes(data)
        with deadline(ROW_SECONDS):
            rows, outcomes = try_file(path)
        self.outcomes.update(outcomes)
        if rows:
            self._built(rows[:20], choice)

    def _template(self, data: bytes, _: int) -> None:
        """A template may loop or eat memory: in the package a process is watched for that, here it is stopped."""
        try:
            with deadline(0.5), memory_limit(MEMORY):
                way = self._way("fuzzed", data.decode(errors="replace"))
                self.outcomes.update(try_rows(SHAPES[:4], way, COLUMNS[0]))
        except (TooLong, MemoryError):
            self.outcomes["template stopped"] += 1
        except UserError:
            self.outcomes["template refused"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with models and chat_templates")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--failures", type=Path, default=Path("fuzz_failures"), help="folder for what was found")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz_guided_"))
    targets, findings, begun, tried = Targets(args.assets, folder), Findings(args.failures), time.monotonic(), 0
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(targets.seeds()):
        (corpus / str(number)).write_bytes(data)

    def take(data: bytes) -> None:
        nonlocal tried
        try:
            targets.take(data)
        except (Exception, TooLong) as error:
            findings.add(error, data)
        tried += 1
        if time.monotonic() - begun > args.seconds:
            outcomes = dict(targets.outcomes.most_common(40))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            summary = {"inputs": tried, "peak_mb": peak, "outcomes": outcomes, "found": dict(findings.counts)}
            print(json.dumps(summary, indent=1), flush=True)
            os._exit(bool(findings.counts))  # libFuzzer would go on, and would not come back

    # libFuzzer writes inputs that it finds slow into the working directory, unless told otherwise.
    flags = [f"-artifact_prefix={corpus}/", f"-seed={args.seed}", f"-max_len={LONGEST}", "-timeout=0", "-rss_limit_mb=0", "-handle_segv=0"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], take, custom_mutator=targets.vary)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
