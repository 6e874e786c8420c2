"""One row of every kind of fault in a set without any: each is found where it is, and nothing else is."""

import json

import pytest
from doctor_data import MAIL, configure, row, rows, sentence
from row_files import lines, write

from sft_jax.doctor.check import diagnose
from sft_jax.doctor.checks import CHECKS

HELD_OUT = rows(10, 200)


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _near(seed):
    """Returns a row that differs from another one in one word."""
    near = row(seed)
    return {**near, "prompt": near["prompt"].replace(near["prompt"].split()[8], "changed", 1)}


# kind -> the row that has it, among the rows 0 to 59 (and 100 to 129 as chats)
PLANTED = {
    "unreadable": {"prompt": "And nothing else?"},
    "role_order": chat(("user", row(60)["prompt"]), ("user", row(61)["prompt"]), ("assistant", sentence(61))),
    "empty_answer": row(62, completion=" "),
    "duplicate": row(3),
    "overlap": HELD_OUT[4],
    "invalid_json": row(63, completion='{"value": 6'),
    "template_markup": row(64, completion=f"{sentence(64)}<|im_end|>"),
    "near_duplicate": _near(5),
    "conflicting_answers": row(6, completion=sentence("another")),
    "mojibake": row(65, completion=f"Itâ€™s so: {sentence(65)}"),
    "wrong_language": row(66, completion="Il faisait si beau que tout le monde est allé au bord du lac cet après-midi, et personne n'est rentré avant la nuit tombée."),
    "cut_answer": row(67, completion=f"{sentence(67)} There are many kinds of these, for example apples, pears,"),
    "one_word_answer": row(68, completion="Yes."),
    "refusal": row(69, completion="I'm sorry, but I can't help with that."),
    "boilerplate": row(70, completion=f"{sentence(70)} As an AI language model, I have no garden."),
    "unbalanced_fences": row(71, completion=f"{sentence(71)}\n```\nx = 1"),
    "repeats_prompt": row(72, completion=row(72)["prompt"] + " " + sentence(72)),
    "personal_data": row(73, completion=f"{sentence(73)} Write to {MAIL}."),
    "length_outlier": row(74, completion=sentence(74, 900)),
}
CHATS, JSON = ("role_order",), ("invalid_json",)  # those that need a set of another kind


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """Returns what is found of three sets, and {kind: (file, line) of the row that has it}."""
    folder = tmp_path_factory.mktemp("planted")
    others = [kind for kind in PLANTED if kind not in (*CHATS, *JSON)]
    clean = [row(seed) for seed in range(60)]
    sets = {
        "pairs": [*clean, *(PLANTED[kind] for kind in others)],
        "chats": [
            *(chat(("user", each["prompt"]), ("assistant", each["completion"])) for each in rows(30, 100)), *(PLANTED[kind] for kind in CHATS)
        ],
        "json": [*(row(seed, completion=json.dumps({"value": sentence(f"j{seed}", 10)})) for seed in range(300, 330)), *(PLANTED[kind] for kind in JSON)],
    }  # fmt: skip
    paths = {name: write(folder, f"{name}.jsonl", lines(*content)) for name, content in sets.items()}
    planted = {kind: (paths["pairs"], 61 + place) for place, kind in enumerate(others)}
    planted |= {"role_order": (paths["chats"], 31), "invalid_json": (paths["json"], 31)}
    config = configure(folder, rows(1), HELD_OUT, train={name: {"path": path} for name, path in paths.items()})
    return diagnose(config.data), planted


def test_every_kind_is_planted():
    assert set(PLANTED) == set(CHECKS)


@pytest.mark.parametrize("kind", CHECKS)
def test_what_is_planted_is_found_where_it_is_and_nothing_else(examined, kind):
    diagnosis, planted = examined
    assert [(each.file, each.line) for each in diagnosis.findings[kind]] == [planted[kind]]
    assert diagnosis.kinds[kind].rows == 1
