"""The small world that the embedded model reads about: people, places, things, and how English says times and amounts.

`make_nano_corpus.py` writes plain text about it and `make_quickstart_data.py` requests with their commands. Both fill
templates in which a slot is `{kind}`, `{kind#tag}` or `{kind#tag!form}`. Within one `World` slots with the same tag hold
the same value; without a tag each draws its own. The form says how the value is written (a kind's first if none is named):

    >>> world = World(Random(2))
    >>> world.fill("Wake me at {time#a}: {time#a!clock}.")
    'Wake me at five past four in the afternoon: 16:05.'
    >>> world.value("time#a!clock")
    '16:05'

All randomness is drawn from `random.Random.random`, the one method whose sequence Python guarantees across versions.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

NAMES = """Adam Agnes Alice Amira Anders Andrea Anna Anton Arjun Astrid Ayumi Beatriz Ben Bianca Boris Bruno Camila
Carlos Carmen Cecilia Chloe Clara Dalia Daniel Darius David Diego Dora Edith Elena Elias Elif Emil Emma Erik Esther
Eva Fatima Felix Fiona Frank Freya George Gita Greta Gustav Hana Hannah Harold Hassan Heidi Helen Henry Hugo Ida Igor
Ines Ingrid Irene Isaac Ivan Jack James Jana Jasmin Joel Johan Jonas Julia Kai Karim Karl Katya Kenji Kofi Lars Laura
Lea Leila Leo Lina Linus Louis Lucia Lukas Maja Malik Marco Maria Marta Martin Mateo Max Maya Mei Mila Mina Mohamed
Nadia Naomi Nina Noah Nora Olga Oliver Omar Oscar Otto Pablo Paula Pavel Pedro Petra Priya Rafael Ravi Rita Robert
Rosa Ruben Ruth Samir Sandra Sara Selma Simon Sofia Stefan Sven Tara Tessa Theo Thomas Tim Tomas Uma Vera Victor
Viola Walter Wanda Wei Yara Yusuf Zoe""".split()

CITIES = """Amsterdam Ankara Antwerp Athens Barcelona Basel Belgrade Bergen Berlin Bern Bilbao Bologna Bordeaux Boston
Bremen Brussels Budapest Cairo Chicago Cologne Cork Delhi Denver Dresden Dublin Dundee Florence Frankfurt Geneva Genoa
Ghent Glasgow Graz Hamburg Helsinki Istanbul Kyoto Lagos Leeds Leipzig Lima Lisbon London Lyon Madrid Malmo Marseille
Milan Montreal Munich Nairobi Nantes Naples Osaka Oslo Ottawa Oxford Palermo Paris Porto Prague Quito Riga Rome Salzburg
Seattle Seoul Seville Split Stockholm Sydney Tallinn Tokyo Toronto Trieste Turin Utrecht Valencia Venice Vienna Vilnius
Warsaw York Zagreb Zurich""".split()

ROOMS = ["kitchen", "bedroom", "bathroom", "living room", "dining room", "office", "hallway", "garage", "cellar", "attic",
         "guest room", "nursery", "library", "laundry room", "studio", "workshop", "pantry", "veranda"]  # fmt: skip

GOODS = """milk eggs bread butter rice pasta flour sugar salt pepper honey jam tea coffee cocoa cheese yogurt cream apples
pears bananas lemons oranges grapes plums cherries berries melons tomatoes potatoes carrots onions garlic leeks spinach
cabbage lettuce beans lentils peas corn mushrooms celery parsley basil mint ginger cinnamon walnuts almonds raisins oats
crackers noodles tofu fish shrimp chicken ham sausages mustard vinegar ketchup soap shampoo toothpaste napkins candles
batteries matches sponges bleach foil string""".split()
GOODS += ["olive oil", "orange juice", "dish soap", "paper towels", "light bulbs", "cat food", "brown rice", "green tea",
          "oat milk", "rye bread", "sour cream", "peanut butter", "trash bags", "apple juice", "sea salt"]  # fmt: skip

GENRES = """jazz rock folk blues soul funk reggae techno opera disco punk country swing salsa samba tango classical
ambient gospel""".split()
BAND_ADJECTIVES = """Blue Silent Golden Broken Paper Electric Distant Velvet Hollow Wild Crystal Lonely Northern Hidden
Burning Frozen Little Midnight Painted Restless""".split()
BAND_NOUNS = """Lanterns Rivers Foxes Engines Mirrors Harbors Sparrows Gardens Wolves Comets Ladders Anchors Shadows
Pilots Orchards Tigers Bridges Oceans Clocks Dancers""".split()

COLORS = "red green blue yellow orange purple pink white violet turquoise".split()
LABELS = """pasta rice eggs tea bread pizza laundry oven soup cake dough stew dryer workout meditation homework nap
reading parking bath""".split()  # what a timer is for
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
DAYS = [*WEEKDAYS, "today", "tomorrow"]
EVENTS = """dentist appointment|team meeting|yoga class|piano lesson|parent evening|book club|choir practice|doctor visit
|budget review|job interview|haircut|swimming lesson|tennis match|board meeting|house viewing|car service|chess club
|french course|garden party|birthday dinner|blood test|sales call|staff lunch|dance class|school play|wine tasting"""
EVENTS = [" ".join(event.split()) for event in EVENTS.split("|")]

CHORES = {  # verb -> objects; a reminder is one of the pairs
    "water": "the plants|the roses|the garden|the tomatoes|the lawn",
    "pay": "the rent|the electric bill|the phone bill|the plumber|the tax",
    "call": "the bank|the plumber|the school|the landlord|the doctor|grandma",
    "feed": "the cat|the dog|the fish|the birds|the rabbits",
    "clean": "the oven|the windows|the fridge|the bathroom|the car|the gutters",
    "pick up": "the parcel|the kids|the laundry|the tickets|the cake|the keys",
    "return": "the library books|the drill|the shoes|the rental car|the ladder",
    "charge": "the phone|the camera|the bike|the laptop|the car",
    "take out": "the trash|the recycling|the dog|the bins",
    "book": "the flights|the hotel|a table|the dentist|a taxi",
    "send": "the invoice|the report|the letter|the photos|the contract",
    "check": "the mail|the tires|the smoke alarm|the heating|the calendar",
    "buy": "a birthday card|new shoes|stamps|flowers|a present|train tickets",
    "fix": "the lamp|the door|the bike|the printer|the tap",
}

MESSAGE_SUBJECTS = """the train|the bus|the meeting|the package|the doctor|the taxi|the concert|the plumber|the flight
|the movie|the class|the delivery|the guest|the choir|the landlord"""
MESSAGE_SUBJECTS = [" ".join(subject.split()) for subject in MESSAGE_SUBJECTS.split("|")]
MESSAGE_STATES = ["is late", "is early", "is here", "is on time", "has arrived", "has left", "was great", "was long",
                  "is almost over", "will be late", "starts soon", "is at the door", "needs your help"]  # fmt: skip
STATEMENTS = """dinner is ready|I am on my way|I will be late|I miss you|the keys are under the mat|the lift is broken
|I left the umbrella at home|we need more milk|I am at the station|the soup is in the fridge|we are stuck in traffic
|the cat is outside|I found your scarf|my phone is almost empty|the tickets are booked|lunch was lovely|the door is locked
|the game is on|I got the job|it is raining here|we won the game|the car is fixed|I will bring the cake
|the dog is hungry|your coat is here|I cannot come|we are almost home"""
STATEMENTS = [" ".join(clause.split()) for clause in STATEMENTS.split("|")]
WISHES = """see you soon|happy birthday|good luck|well done|please call me back|do not wait for me|good night|save me a seat
|thank you for the flowers|bring a warm coat|have a nice day|get well soon|call me when you are home|open the window
|take your time|sleep well"""
WISHES = [" ".join(clause.split()) for clause in WISHES.split("|")]

# How an order is put to somebody.
FRAMES = (
    "{}", "{}.", "{}.", "{}!", "please {}", "please {}.", "{}, please.", "{} please", "{}, thanks.", "could you {}?",
    "can you {}?", "can you please {}?", "could you please {}?", "would you {}?", "I'd like you to {}.",
    "I need you to {}.", "hey, {}.", "hi, can you {}?", "okay, now {}.", "don't forget to {}.", "now {}.",
)  # fmt: skip

UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen""".split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
TIME_MINUTES = (0, 0, 0, 15, 30, 30, 45, 5, 10, 20, 25, 35, 40, 50, 55)


def pick(rng: Random, items: Sequence) -> Any:
    """Returns one of `items`, all equally likely."""
    return items[int(rng.random() * len(items))]


def polite(order: str, rng: Random) -> str:
    """Returns the order in one of the frames: "call Mia" -> "could you call Mia?"."""
    return pick(rng, FRAMES).format(order)


def number_words(number: int) -> str:
    """Returns 0 to 100 in words: 47 -> "forty seven"."""
    if number == 100:
        return "a hundred"
    if number < 20:
        return UNITS[number]
    return TENS[number // 10] + (f" {UNITS[number % 10]}" if number % 10 else "")


def say_number(number: int, rng: Random) -> str:
    return number_words(number) if rng.random() < 0.4 else str(number)


def clock(time: tuple[int, int]) -> str:
    return f"{time[0]:02d}:{time[1]:02d}"


def part_of_day(hour: int) -> str:
    """Returns the words that make a twelve-hour time unambiguous; 5 to 23 o'clock."""
    return "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening" if hour < 21 else "at night"


def time_words(time: tuple[int, int], rng: Random) -> str:
    """Returns a time in words: (19, 15) -> "quarter past seven in the evening" or "seven fifteen in the evening"."""
    hour, minute = time
    if time == (12, 0):
        return "noon"
    if time == (0, 0):
        return "midnight"
    this, following = UNITS[(hour - 1) % 12 + 1], UNITS[hour % 12 + 1]
    if minute == 0:
        words = f"{this} o'clock" if rng.random() < 0.3 else this
    elif minute % 5 or rng.random() < 0.25:
        words = f"{this} oh {UNITS[minute]}" if minute < 10 else f"{this} {number_words(minute)}"
    elif minute <= 30:
        words = f"{({15: 'quarter', 30: 'half'}.get(minute) or number_words(minute))} past {this}"
    else:
        words = f"{({45: 'quarter'}.get(minute) or number_words(60 - minute))} to {following}"
    return f"{words} {part_of_day(hour)}"


def say_time(time: tuple[int, int], rng: Random) -> str:
    """Returns a time as people write it: "19:15", "7:15 pm", "quarter past seven in the evening"."""
    draw, (hour, minute) = rng.random(), time
    if draw < 0.2:
        return clock(time)
    if draw < 0.45 and time not in ((0, 0), (12, 0)):
        suffix = "am" if hour < 12 else "pm"
        return f"{(hour - 1) % 12 + 1}" + (f":{minute:02d}" if minute else "") + f" {suffix}"
    return time_words(time, rng)


def draw_time(rng: Random) -> tuple[int, int]:
    if rng.random() < 0.04:
        return (12, 0) if rng.random() < 0.6 else (0, 0)
    return 5 + int(rng.random() * 19), pick(rng, TIME_MINUTES)


def duration_words(minutes: int, rng: Random) -> str:
    """Returns a duration in words: 90 -> "an hour and a half", "ninety minutes" or "one hour and thirty minutes"."""
    idioms = {15: "a quarter of an hour", 30: "half an hour", 45: "three quarters of an hour", 60: "an hour",
              75: "an hour and a quarter", 90: "an hour and a half", 150: "two and a half hours"}  # fmt: skip
    if minutes in idioms and rng.random() < 0.6:
        return idioms[minutes]
    if minutes <= 100 and (minutes < 60 or rng.random() < 0.3):
        return f"{number_words(minutes)} minute" + "s" * (minutes > 1)
    hours, rest = divmod(minutes, 60)
    words = pick(rng, ["one hour", "an hour"]) if hours == 1 else f"{UNITS[hours]} hours"
    return words + (f" and {number_words(rest)} minute" + "s" * (rest > 1) if rest else "")


def say_duration(minutes: int, rng: Random) -> str:
    return f"{minutes} minute" + "s" * (minutes > 1) if rng.random() < 0.35 else duration_words(minutes, rng)


def draw_duration(rng: Random) -> int:
    draw = rng.random()
    if draw < 0.35:
        return pick(rng, (15, 30, 45, 60, 75, 90, 120, 150, 180, 240))
    return 1 + int(rng.random() * 59) if draw < 0.8 else 60 + 5 * int(rng.random() * 36)


def join_words(items: Sequence[str], rng: Random | None = None) -> str:
    """Returns "milk", "milk and eggs" or "milk, eggs and bread"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def draw_goods(rng: Random) -> tuple[str, ...]:
    goods: list[str] = []
    for _ in range(pick(rng, (1, 1, 2, 2, 2, 3, 3))):
        goods.append(pick(rng, [item for item in GOODS if item not in goods]))
    return tuple(goods)


def draw_chore(rng: Random) -> str:
    verb = pick(rng, list(CHORES))
    return f"{verb} {pick(rng, CHORES[verb].split('|'))}"


def draw_statement(rng: Random) -> str:
    if rng.random() < 0.4:
        return pick(rng, STATEMENTS)
    return f"{pick(rng, MESSAGE_SUBJECTS)} {pick(rng, MESSAGE_STATES)}"


@dataclass(frozen=True)
class Kind:
    """What a slot can hold: how a value is drawn, and the forms in which it is written, the usual one first."""

    draw: Callable[[Random], Any]
    forms: dict[str, Callable[[Any, Random], Any]]


def _choice(items: Sequence[str]) -> Kind:
    return Kind(lambda rng: pick(rng, items), {"said": lambda value, rng: value})


def _integer(low: int, high: int, step: int = 1) -> Kind:
    return Kind(
        lambda rng: low + step * int(rng.random() * ((high - low) // step + 1)),
        {"said": say_number, "digits": lambda value, rng: value, "words": lambda value, rng: number_words(value)},
    )


KINDS: dict[str, Kind] = {
    "name": _choice(NAMES),
    "city": _choice(CITIES),
    "room": _choice(ROOMS),
    "item": _choice(GOODS),
    "genre": _choice(GENRES),
    "band": Kind(lambda rng: f"The {pick(rng, BAND_ADJECTIVES)} {pick(rng, BAND_NOUNS)}", {"said": lambda value, rng: value}),
    "color": _choice(COLORS),
    "label": _choice(LABELS),
    "event": _choice(EVENTS),
    "chore": Kind(draw_chore, {"said": lambda value, rng: value}),
    "statement": Kind(draw_statement, {"said": lambda value, rng: value}),
    "wish": _choice(WISHES),
    "goods": Kind(draw_goods, {"said": join_words, "list": lambda value, rng: list(value), "commas": lambda value, rng: ", ".join(value)}),
    "time": Kind(draw_time, {"said": say_time, "words": time_words, "clock": lambda value, rng: clock(value)}),
    "duration": Kind(draw_duration, {"said": say_duration, "words": duration_words, "minutes": lambda value, rng: value}),
    "day": Kind(
        lambda rng: pick(rng, DAYS),
        {
            "on": lambda value, rng: f"on {value}" if value in WEEKDAYS else value,
            "bare": lambda value, rng: value,
            "key": lambda value, rng: value.lower(),
        },
    ),
    "weekday": _choice(WEEKDAYS),
    "percent": _integer(5, 95, 5),
    "degrees": _integer(14, 27),
    "small": _integer(2, 12),
    "number": _integer(1, 99),
}

SLOT = re.compile(r"\{(\w+)(?:#(\w+))?(?:!(\w+))?\}")


class World:
    """One document's or one request's values by slot; values of a kind differ between tags."""

    def __init__(self, rng: Random):
        self.rng = rng
        self._values: dict[tuple[str, str], Any] = {}

    def fill(self, template: str) -> str:
        """Returns `template` with every slot written out. Raises KeyError for an unknown kind or form."""
        return SLOT.sub(lambda match: str(self._write(*match.groups())), template)

    def value(self, slot: str) -> Any:
        """Returns what the slot ("time#a!clock") stands for, as a string, number or list."""
        return self._write(*SLOT.fullmatch(f"{{{slot}}}").groups())

    def _write(self, kind: str, tag: str | None, form: str | None) -> Any:
        known, key = KINDS[kind], (kind, tag)
        if tag is None or key not in self._values:
            taken = [value for (other, _), value in self._values.items() if other == kind]
            value = known.draw(self.rng)
            while value in taken:
                value = known.draw(self.rng)
            self._values[key] = value
        return known.forms[form or next(iter(known.forms))](self._values[key], self.rng)
