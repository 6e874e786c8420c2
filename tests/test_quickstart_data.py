"""The quickstart task: its files are what the script writes, the answers are right, and the two sides share nothing."""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import make_quickstart_data as task  # noqa: E402
import nano_world as world  # noqa: E402

FOLDER = ROOT / "data" / "quickstart"


def read(name: str) -> list[tuple[str, str]]:
    rows = [json.loads(line)["messages"] for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    return [(row[0]["content"], row[1]["content"]) for row in rows]


@pytest.fixture(scope="module")
def train() -> list[tuple[str, str]]:
    return read("train.jsonl")


@pytest.fixture(scope="module")
def held_out() -> list[tuple[str, str]]:
    return read("held_out.jsonl")


def test_files_are_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_quickstart_data.py", "--out", str(tmp_path)])
    task.main()
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_files_are_large_enough_and_small_enough(train, held_out):
    assert len(train) >= 2000 and len(held_out) >= 200
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2 * 2**20


def letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def test_sides_share_no_request_and_no_command(train, held_out):
    requests = [[letters(request) for request, _ in side] for side in (train, held_out)]
    assert not set(requests[0]) & set(requests[1])
    assert all(len(set(side)) == len(side) for side in requests)
    assert not {answer for _, answer in train} & {answer for _, answer in held_out}
    assert len({answer for _, answer in held_out}) == len(held_out)


def test_every_action_and_every_set_of_fields_is_on_both_sides(train, held_out):
    shapes = [{(command["action"], *sorted(command)) for command in map(json.loads, answers)} for answers in (
        [answer for _, answer in train], [answer for _, answer in held_out])]  # fmt: skip
    assert shapes[0] == shapes[1] == {(intent.action, *sorted(["action", *intent.fields])) for intent in task.INTENTS}


def test_answers_are_compact_json_with_typed_values(train, held_out):
    for _, answer in train + held_out:
        command = json.loads(answer)
        assert json.dumps(command, separators=(",", ":")) == answer
        assert next(iter(command)) == "action"
        for name, value in command.items():
            if name in ("minutes", "degrees", "brightness", "level"):
                assert type(value) is int and value > 0
            elif name == "items":
                assert 1 <= len(value) <= 3 and len(set(value)) == len(value)
            elif name == "time":
                assert re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value)
            else:
                assert type(value) is str and value


def test_words_of_the_answer_are_in_the_request(train, held_out):
    for request, answer in train + held_out:
        for name, value in json.loads(answer).items():
            if name in ("to", "from", "name", "with", "title", "text", "room", "label", "city", "artist", "genre", "color", "day"):
                assert value.lower() in request.lower(), (request, answer)
            if name == "items":
                assert all(item in request for item in value), (request, answer)


NUMBERS = {**{word: i for i, word in enumerate(world.UNITS)}, **{word: 10 * i for i, word in enumerate(world.TENS) if i > 1}}


def parse_number(words: str) -> int:
    """An independent reading of "47", "forty seven" and "a hundred"."""
    if words.isdigit():
        return int(words)
    return 100 if words == "a hundred" else sum(NUMBERS[word] for word in words.split())


def parse_time(text: str) -> str:
    """An independent reading of a time as `say_time` writes it."""
    if text in ("noon", "midnight"):
        return {"noon": "12:00", "midnight": "00:00"}[text]
    if re.fullmatch(r"\d\d:\d\d", text):
        return text
    if match := re.fullmatch(r"(\d+)(?::(\d\d))? ([ap])m", text):
        return f"{int(match[1]) % 12 + 12 * (match[3] == 'p'):02d}:{match[2] or '00'}"
    words, part = re.fullmatch(r"(.*) (in the morning|in the afternoon|in the evening|at night)", text).groups()
    words = words.replace("quarter", "fifteen").replace("half", "thirty").replace(" oh ", " ").replace(" o'clock", "")
    if " past " in words:
        minute, hour = map(parse_number, words.split(" past "))
    elif " to " in words:
        minute, hour = map(parse_number, words.split(" to "))
        minute, hour = 60 - minute, hour - 1
    else:
        first, _, rest = words.partition(" ")
        hour, minute = parse_number(first), parse_number(rest) if rest else 0
    hour %= 12
    return f"{hour + 12 * (part != 'in the morning'):02d}:{minute:02d}"


def parse_duration(text: str) -> int:
    """An independent reading of a duration as `say_duration` writes it, in minutes."""
    idioms = {"a quarter of an hour": 15, "half an hour": 30, "three quarters of an hour": 45,
              "an hour and a quarter": 75, "an hour and a half": 90, "two and a half hours": 150}  # fmt: skip
    if text in idioms:
        return idioms[text]
    total = 0
    for part in text.split(" and "):
        amount, unit = part.rsplit(" ", 1)
        total += (1 if amount in ("an", "one") else parse_number(amount)) * (60 if unit.startswith("hour") else 1)
    return total


def test_times_are_read_back_as_they_were_written():
    rng = Random(0)
    times = [(hour, minute) for hour in range(5, 24) for minute in range(60)] + [(0, 0)]
    for time in times:
        for _ in range(8):
            for text in (world.say_time(time, rng), world.time_words(time, rng)):
                assert parse_time(text) == f"{time[0]:02d}:{time[1]:02d}", text


def test_durations_and_numbers_are_read_back_as_they_were_written():
    rng = Random(0)
    for minutes in range(1, 300):
        for _ in range(8):
            assert parse_duration(world.say_duration(minutes, rng)) == minutes
    for number in range(101):
        assert parse_number(world.number_words(number)) == number
        assert parse_number(world.say_number(number, rng)) == number


def test_drawn_values_are_within_what_the_readings_cover():
    rng = Random(3)
    for _ in range(5000):
        hour, minute = world.draw_time(rng)
        assert 5 <= hour <= 23 and 0 <= minute < 60 or (hour, minute) == (0, 0)
        assert 1 <= world.draw_duration(rng) < 300


def test_a_request_has_one_answer():
    """No request can be meant in two ways, also among those that no file holds."""
    rng, answers = Random(11), defaultdict(set)
    for _ in range(30_000):
        request, command = task.draw(rng)
        answers[task.normalise(request)].add(task.dump(command))
    assert len(answers) < 30_000  # some requests did come twice, or nothing was tested
    assert [(request, found) for request, found in answers.items() if len(found) > 1] == []


def test_slots_with_a_tag_keep_their_value_and_others_differ():
    for seed in range(200):
        filled = world.World(Random(seed)).fill("{name#a} {name#b} {name#a} {time#a!clock} {time#a!clock}")
        first, second, third, early, late = filled.split()
        assert first == third != second and early == late
    with pytest.raises(KeyError):
        world.World(Random(0)).fill("{nobody}")
