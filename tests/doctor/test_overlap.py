"""Training rows that hold what held-out rows or a benchmark ask."""

from doctor_data import changed, examine, found, row, rows, sentence
from row_files import lines, write

from sft_jax.doctor.texts import words


def test_training_rows_that_hold_held_out_text_overlap(tmp_path):
    held = rows(10, 100)
    passage = " ".join(held[3]["completion"].split()[5:20])
    near = {**held[6], "completion": changed(held[6]["completion"], 1)}
    train = [
        *rows(30),
        row(50, completion=f"{sentence('x', 10)} {passage.upper()}, {sentence('y', 10)}"),  # 15 words of an answer
        row(51, completion=" ".join(held[4]["completion"].split()[:12]) + " " + sentence("z", 10)),  # 12 are too few
        {"prompt": held[5]["prompt"], "completion": "Something else."},
        near,
    ]
    diagnosis = examine(tmp_path, train, held)
    details = found(diagnosis, "overlap")
    file = tmp_path / "eval.jsonl"
    assert list(details) == [31, 33, 34]
    assert details[31] == f'shares "{" ".join(words(passage)[:13])}" with {file}:4 (15 words)'
    assert details[33] == f"has the same prompt as {file}:6"
    assert details[34].startswith(f"has the same prompt as {file}:7; is nearly {file}:7, with a similarity of 0.")


def test_short_prompts_overlap_as_a_whole_in_both_directions(tmp_path):
    question = "Which of the rivers runs through the old harbour?"  # 9 words
    other = "Who of them brought a lantern to the yellow castle?"
    held = [
        *rows(10, 100),
        {"prompt": question, "completion": "The first."},
        {"prompt": f"Read this. {sentence('a')} {other} Say a name.", "completion": "Ann."},
    ]
    train = [
        *rows(30),
        {"prompt": f"{sentence('b')} {question} {sentence('c')}", "completion": "None of them."},
        {"prompt": other, "completion": "It was Ann."},
        {"prompt": "Which of the rivers runs?", "completion": "Yes, it was the first."},
        {"prompt": "Hello there!", "completion": "Hi, and what is it?"},
    ]
    diagnosis = examine(tmp_path, train, held)
    file = tmp_path / "eval.jsonl"
    assert found(diagnosis, "overlap") == {
        31: f"holds the whole prompt of {file}:11",
        32: f"has a prompt that is part of {file}:12",
    }


def test_a_phrase_of_many_training_rows_is_no_overlap(tmp_path):
    phrase = "Read the following text and answer the question that comes after it in one sentence: "
    held = [row(seed, prompt=phrase + row(seed)["prompt"]) for seed in range(100, 110)]
    train = [row(seed, prompt=phrase + row(seed)["prompt"]) for seed in range(30)]
    train.append(row(40, prompt=phrase + " ".join(held[3]["prompt"].removeprefix(phrase).split()[:12])))  # beside a leak
    assert list(found(examine(tmp_path, train, held), "overlap")) == [31]


def test_a_prompt_of_many_rows_on_both_sides_is_no_overlap_but_with_the_same_answer(tmp_path):
    joke = {"prompt": "Tell me a joke."}
    train = [{**joke, "completion": sentence(seed)} for seed in range(30)]
    held = [{**joke, "completion": sentence(seed)} for seed in (100, 101, 7)]
    details = found(examine(tmp_path, train, held), "overlap")
    assert list(details) == [8] and details[8].startswith(f"has the same prompt as {tmp_path / 'eval.jsonl'}:1")
    assert len(found(examine(tmp_path, train, held[:1]), "overlap")) == 30  # many answers to one held-out question


def test_a_run_that_is_mostly_arithmetic_is_no_overlap(tmp_path):
    steps = "so 3 + 4 = 7 and 7 * 5 = 35 and 35 - 1 = 34 and 34 / 2 = 17 all"
    diagnosis = examine(
        tmp_path,
        [*rows(30), row(40, completion=f"{sentence('a', 10)} {steps}.")],
        [row(50, completion=f"{sentence('b', 10)} {steps}.")],
    )
    assert found(diagnosis, "overlap") == {}


def test_a_benchmark_may_have_any_fields(tmp_path):
    passage = sentence("benchmark", 20)
    benchmark = write(
        tmp_path,
        "bench.jsonl",
        lines({"id": 7, "question": f"{passage} Why?", "choices": ["a", "b"]}, {"id": 8, "question": row(3)["prompt"]}),
    )
    train = [*rows(30), row(60, completion=f"{sentence('x', 10)} {passage}")]
    details = found(examine(tmp_path, train, benchmark=[benchmark]), "overlap")
    assert list(details) == [4, 31]
    assert details[4] == f"has the same prompt as {benchmark}:2" and f"with {benchmark}:1 (" in details[31]


def test_rows_of_a_benchmark_that_cannot_be_read_are_counted(tmp_path):
    benchmark = write(tmp_path, "bench.jsonl", '{"question": "a"}\n{"question": \n')
    diagnosis = examine(tmp_path, rows(10), benchmark=[benchmark])
    assert diagnosis.notes == ("1 rows of the benchmark cannot be read and were compared with nothing.",)
    assert diagnosis.kinds["unreadable"].rows == 0


def test_rows_of_tokens_are_compared_with_held_out_ones(tmp_path):
    held = [{"input_ids": [seed, 5, 6]} for seed in range(10)]
    train = [{"input_ids": [seed, 7, 8]} for seed in range(10)] + held
    diagnosis = examine(tmp_path, train, held)
    file = tmp_path / "eval.jsonl"
    assert found(diagnosis, "overlap") == {11 + seed: f"is the same as {file}:{1 + seed}" for seed in range(10)}
    assert {kind for kind, result in diagnosis.kinds.items() if result.rows} == {"overlap"}


def test_rows_without_words_are_compared_with_held_out_ones(tmp_path):
    smiles = {"prompt": "🙂?", "completion": "🙃!"}
    assert list(found(examine(tmp_path, [*rows(5), smiles], [smiles]), "overlap")) == [6]
