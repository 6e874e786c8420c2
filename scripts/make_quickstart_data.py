"""Writes the quickstart task: free-text requests and the JSON command that each asks for.

    python scripts/make_quickstart_data.py [--out data/quickstart]

makes `train.jsonl` and `held_out.jsonl` with one chat a line:

    {"messages": [{"role": "user", "content": "Could you wake me at quarter past seven in the evening?"},
                  {"role": "assistant", "content": "{\\"action\\":\\"set_alarm\\",\\"time\\":\\"19:15\\"}"}]}

The two share no request and no command: a hash of the command decides the side, so every held-out answer is a text
that was never trained on. The files are a function of the seed; they are in the repository as this script writes them.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from nano_world import World, pick, polite

TRAIN, HELD_OUT, SEED = 8000, 256, 20240501
HELD_OUT_SHARE = 0.06  # of all commands


@dataclass(frozen=True)
class Intent:
    """One command and the ways to ask for it.

    fields: field of the command -> slot that holds its value ("duration#a!minutes"), or "=constant".
    orders: imperatives, which take a polite frame; says: requests that stand as they are.
    """

    action: str
    fields: dict[str, str]
    orders: tuple[str, ...]
    says: tuple[str, ...] = ()


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


INTENTS = (
    Intent("set_timer", {"minutes": "duration#a!minutes"}, _lines("""
        set a timer for {duration#a}
        start a timer for {duration#a}
        put {duration#a} on the timer
        count down {duration#a}
        let me know in {duration#a}
        time {duration#a}
        """), _lines("""
        I need a timer for {duration#a}.
        Timer for {duration#a}.
        {duration#a} on the clock, please.
        """)),
    Intent("set_timer", {"minutes": "duration#a!minutes", "label": "label#a"}, _lines("""
        set a {label#a} timer for {duration#a}
        start a timer for the {label#a}, {duration#a}
        set a timer for {duration#a} for the {label#a}
        time the {label#a} for {duration#a}
        count down {duration#a} for the {label#a}
        """), _lines("""
        The {label#a} needs {duration#a}, start a timer.
        I need a {label#a} timer for {duration#a}.
        """)),
    Intent("set_alarm", {"time": "time#a!clock"}, _lines("""
        wake me at {time#a}
        wake me up at {time#a}
        set an alarm for {time#a}
        set the alarm clock to {time#a}
        get me out of bed at {time#a}
        """), _lines("""
        I have to get up at {time#a}.
        Alarm at {time#a}, please.
        I want to sleep until {time#a}.
        """)),
    Intent("set_alarm", {"time": "time#a!clock", "day": "day#a!key"}, _lines("""
        wake me {day#a} at {time#a}
        wake me up at {time#a} {day#a}
        set an alarm for {day#a!bare} at {time#a}
        set an alarm {day#a}, {time#a}
        """), _lines("""
        I have to get up at {time#a} {day#a}.
        {day#a} I want to sleep until {time#a}.
        """)),
    Intent("set_light", {"room": "room#a", "state": "=on"}, _lines("""
        turn on the light in the {room#a}
        switch the {room#a} light on
        put the light on in the {room#a}
        light up the {room#a}
        """), _lines("""
        It is dark in the {room#a}.
        I need light in the {room#a}.
        Lights on in the {room#a}!
        """)),
    Intent("set_light", {"room": "room#a", "state": "=off"}, _lines("""
        turn off the light in the {room#a}
        switch the {room#a} light off
        put the light out in the {room#a}
        make it dark in the {room#a}
        """), _lines("""
        Nobody is in the {room#a}, no light needed.
        Lights off in the {room#a}!
        """)),
    Intent("set_light", {"room": "room#a", "brightness": "percent#a!digits"}, _lines("""
        dim the {room#a} light to {percent#a} percent
        set the light in the {room#a} to {percent#a} percent
        bring the {room#a} lights to {percent#a!digits}%
        set the brightness in the {room#a} to {percent#a}
        """), _lines("""
        {percent#a} percent light in the {room#a} would be enough.
        I want the {room#a} light at {percent#a!digits}%.
        """)),
    Intent("set_light", {"room": "room#a", "color": "color#a"}, _lines("""
        make the {room#a} light {color#a}
        turn the light in the {room#a} {color#a}
        switch the {room#a} to {color#a} light
        """), _lines("""
        I would like {color#a} light in the {room#a}.
        """)),
    Intent("set_heating", {"room": "room#a", "degrees": "degrees#a!digits"}, _lines("""
        heat the {room#a} to {degrees#a} degrees
        set the heating in the {room#a} to {degrees#a}
        make the {room#a} {degrees#a} degrees
        set the {room#a} thermostat to {degrees#a}
        """), _lines("""
        I want {degrees#a} degrees in the {room#a}.
        The {room#a} should be {degrees#a} degrees.
        """)),
    Intent("send_message", {"to": "name#a", "text": "statement#a"}, _lines("""
        tell {name#a} that {statement#a}
        text {name#a}: {statement#a}
        write to {name#a} that {statement#a}
        send {name#a} a message saying {statement#a}
        let {name#a} know that {statement#a}
        """), _lines("""
        {name#a} should know that {statement#a}.
        """)),
    Intent("send_message", {"to": "name#a", "text": "wish#a"}, _lines("""
        text {name#a}: {wish#a}
        write to {name#a}: {wish#a}
        send {name#a} the words "{wish#a}"
        """)),
    Intent("call", {"name": "name#a"}, _lines("""
        call {name#a}
        ring {name#a}
        phone {name#a}
        get {name#a} on the phone
        give {name#a} a call
        """), _lines("""
        I want to talk to {name#a}.
        I need to speak with {name#a}.
        """)),
    Intent("call", {"name": "name#a", "time": "time#a!clock"}, _lines("""
        call {name#a} at {time#a}
        give {name#a} a call at {time#a}
        plan a call with {name#a} for {time#a}
        """), _lines("""
        At {time#a} I want to talk to {name#a}.
        """)),
    Intent("add_event", {"title": "event#a", "day": "day#a!key", "time": "time#a!clock"}, _lines("""
        put the {event#a} in my calendar for {day#a!bare} at {time#a}
        add a {event#a} {day#a} at {time#a}
        schedule the {event#a} for {time#a} {day#a}
        note down the {event#a}, {day#a!bare}, {time#a}
        """), _lines("""
        I have a {event#a} {day#a} at {time#a}.
        The {event#a} is {day#a} at {time#a}.
        {day#a} at {time#a} is the {event#a}.
        """)),
    Intent("add_event", {"title": "event#a", "with": "name#a", "day": "day#a!key"}, _lines("""
        add a {event#a} with {name#a} {day#a}
        plan the {event#a} with {name#a} for {day#a!bare}
        """), _lines("""
        {name#a} and I have a {event#a} {day#a}.
        """)),
    Intent("add_reminder", {"text": "chore#a", "time": "time#a!clock"}, _lines("""
        remind me to {chore#a} at {time#a}
        remind me at {time#a} to {chore#a}
        set a reminder for {time#a} to {chore#a}
        """), _lines("""
        At {time#a} I have to {chore#a}.
        I must not forget to {chore#a} at {time#a}.
        """)),
    Intent("add_reminder", {"text": "chore#a", "day": "day#a!key"}, _lines("""
        remind me to {chore#a} {day#a}
        remind me {day#a} to {chore#a}
        """), _lines("""
        {day#a} I have to {chore#a}.
        """)),
    Intent("add_to_list", {"items": "goods#a!list"}, _lines("""
        add {goods#a} to the shopping list
        put {goods#a} on the list
        write down {goods#a} for the store
        buy {goods#a}
        """), _lines("""
        We need {goods#a}.
        We are out of {goods#a}.
        I want to buy {goods#a}.
        There is no more {goods#a} at home.
        """)),
    Intent("play_music", {"artist": "band#a"}, _lines("""
        play {band#a}
        play something by {band#a}
        put on {band#a}
        """), _lines("""
        I want to hear {band#a}.
        """)),
    Intent("play_music", {"genre": "genre#a", "room": "room#a"}, _lines("""
        play {genre#a} in the {room#a}
        put on some {genre#a} in the {room#a}
        """), _lines("""
        Some {genre#a} in the {room#a} would be nice.
        """)),
    Intent("get_weather", {"city": "city#a", "day": "day#a!key"}, _lines("""
        tell me the weather in {city#a} {day#a}
        check the weather for {day#a!bare} in {city#a}
        """), _lines("""
        What will the weather be like in {city#a} {day#a}?
        Will it rain in {city#a} {day#a}?
        Do I need an umbrella in {city#a} {day#a}?
        How cold will it be {day#a} in {city#a}?
        """)),
    Intent("find_train", {"from": "city#a", "to": "city#b", "day": "day#a!key", "time": "time#a!clock"}, _lines("""
        find a train from {city#a} to {city#b} {day#a} at {time#a}
        look up trains from {city#a} to {city#b}, {day#a!bare} at {time#a}
        find me a train to {city#b} {day#a}, leaving {city#a} at {time#a}
        """), _lines("""
        I have to go from {city#a} to {city#b} {day#a} at {time#a}.
        {day#a} I leave {city#a} at {time#a}, which train goes to {city#b}?
        """)),
    Intent("set_volume", {"room": "room#a", "level": "percent#a!digits"}, _lines("""
        set the volume in the {room#a} to {percent#a}
        turn the music in the {room#a} to {percent#a} percent
        play the music in the {room#a} at {percent#a!digits}%
        """), _lines("""
        The music in the {room#a} should be at {percent#a} percent.
        """)),
)  # fmt: skip

def draw(rng: Random) -> tuple[str, dict[str, Any]]:
    """Returns a request and the command it asks for."""
    intent, world = pick(rng, INTENTS), World(rng)
    index = int(rng.random() * (len(intent.orders) + len(intent.says)))
    if index < len(intent.orders):
        request = polite(world.fill(intent.orders[index]), rng)
    else:
        request = world.fill(intent.says[index - len(intent.orders)])
    if rng.random() < 0.7:
        request = request[0].upper() + request[1:]
    fields = {name: slot[1:] if slot[0] == "=" else world.value(slot) for name, slot in intent.fields.items()}
    return request, {"action": intent.action, **fields}


def dump(command: dict[str, Any]) -> str:
    """Returns the answer that is trained and scored: JSON without spaces, fields in the order of the intent."""
    return json.dumps(command, ensure_ascii=False, separators=(",", ":"))


def normalise(request: str) -> str:
    """Returns what makes two requests the same: letters and digits, lower case."""
    return " ".join("".join(char if char.isalnum() else " " for char in request.lower()).split())


def is_held_out(answer: str) -> bool:
    """Returns the side on which a command lies, whatever the request for it."""
    return int.from_bytes(hashlib.sha256(answer.encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


def make(train: int = TRAIN, held_out: int = HELD_OUT, seed: int = SEED) -> tuple[list[dict], list[dict]]:
    """Returns training and held-out rows: distinct requests on both sides, distinct commands in the held-out ones."""
    rng, rows, wanted = Random(seed), {False: [], True: []}, {False: train, True: held_out}
    requests, answers = set(), set()
    while any(len(rows[side]) < wanted[side] for side in rows):
        request, command = draw(rng)
        answer, key = dump(command), normalise(request)
        side = is_held_out(answer)
        if len(rows[side]) == wanted[side] or key in requests or side and answer in answers:
            continue
        requests.add(key)
        answers.add(answer)
        rows[side].append({"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]})
    return rows[False], rows[True]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "data" / "quickstart")
    parser.add_argument("--train", type=int, default=TRAIN)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "held_out"), make(args.train, args.held_out, args.seed)):
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
