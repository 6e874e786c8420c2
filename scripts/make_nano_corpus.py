"""Writes the text that the embedded base model is pre-trained on: notes, talks and records of a small world.

    python scripts/make_nano_corpus.py [--out runs/nano_corpus]

makes `train.jsonl` and `held_out.jsonl`, one {"text": ...} a line. The text holds no commands and no pairs of a request
and its command (the task of the quickstart): people talk to people, and records describe what is. It is a function of the seed.
"""

import argparse
import json
from pathlib import Path
from random import Random

from nano_topic import Topic
from nano_topics_home import HOME
from nano_topics_people import PEOPLE
from nano_world import World, pick, polite

TRAIN, HELD_OUT, SEED = 100_000, 500, 7
MAX_CHARACTERS = 400  # so that a document fits a row of 256 tokens
TOPICS = {**HOME, **PEOPLE}
RECORD_TITLES = ("Record", "Card", "File", "From the file", "As data", "In the book", "Entry", "Saved as")


def _sentence(text: str) -> str:
    """Returns `text` with its first letter as at the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def _sample(rng: Random, items: tuple, count: int) -> list:
    """Returns `count` different items in random order, or all of them."""
    items = list(items)
    return [items.pop(int(rng.random() * len(items))) for _ in range(min(count, len(items)))]


def write_note(world: World, topic: Topic) -> str:
    """Returns two to four sentences on the topic."""
    return " ".join(_sentence(world.fill(line)) for line in _sample(world.rng, topic.prose, pick(world.rng, (2, 3, 4))))


def write_talk(world: World, topic: Topic) -> str:
    """Returns one to three exchanges between two people, one line each."""
    speakers = world.fill("{name#x}"), world.fill("{name#y}")
    lines = [line for pair in _sample(world.rng, topic.talk, pick(world.rng, (1, 2, 3))) for line in pair]
    spoken = [polite(world.fill(line[1:]), world.rng) if line[0] == "~" else world.fill(line) for line in lines]
    return "\n".join(f"{speakers[i % 2]}: {_sentence(line)}" for i, line in enumerate(spoken))


def write_record(world: World, topic: Topic) -> str:
    """Returns one or two JSON objects, one a line."""
    return "\n".join(world.fill(line) for line in _sample(world.rng, topic.records, pick(world.rng, (1, 1, 2))))


def write_document(rng: Random) -> str:
    """Returns one document of at most `MAX_CHARACTERS`."""
    while len(text := _draft(rng)) > MAX_CHARACTERS:
        pass
    return text


def _draft(rng: Random) -> str:
    """Returns a note, a talk, a note with its record, a record with its note, or a talk and a note."""
    topic, world, kind = TOPICS[pick(rng, list(TOPICS))], World(rng), rng.random()
    if kind < 0.3:
        return write_note(world, topic)
    if kind < 0.5:
        return write_talk(world, topic)
    if kind < 0.8:
        return f"{write_note(world, topic)}\n{pick(rng, RECORD_TITLES)}: {write_record(world, topic)}"
    if kind < 0.9:
        return f"{write_record(world, topic)}\n{write_note(world, topic)}"
    return f"{write_talk(world, topic)}\n{write_note(world, topic)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "runs" / "nano_corpus")
    parser.add_argument("--train", type=int, default=TRAIN)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = Random(args.seed)
    for name, count in (("held_out", args.held_out), ("train", args.train)):
        path = args.out / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for _ in range(count):
                file.write(json.dumps({"text": write_document(rng)}, ensure_ascii=False) + "\n")
        print(f"{path}: {count} documents")


if __name__ == "__main__":
    main()
