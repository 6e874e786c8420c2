"""A whole comparison of tiny models: prompts are those of training and inference, answers those of evaluation, counts and costs those of a loop."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_run import make_base, tiny_config

from sft_jax import fit
from sft_jax.comparison.asking import Respondent
from sft_jax.comparison.contenders import Contender, Examples, make_contenders
from sft_jax.comparison.prompts import Shelf
from sft_jax.comparison.questions import read_questions
from sft_jax.comparison.results import Price
from sft_jax.comparison.run import Request, compare, form_of
from sft_jax.comparison.systems import System
from sft_jax.config_parsing import parse_config
from sft_jax.data.tokenizers.tokens import load_tokenizer
from sft_jax.errors import UserError
from sft_jax.evaluation.generate import generate
from sft_jax.evaluation.offline import Subject, evaluate_model, open_decoder
from sft_jax.evaluation.prompts import PromptReader
from sft_jax.evaluation.samples import Decoding
from sft_jax.evaluation.scoring import Scorer
from sft_jax.hf.source import run_and_step
from sft_jax.model.sharding import make_mesh

NEW = 12  # tokens of an answer
ROWS = 8  # as many as slots, so that few programs are compiled
TERSE = System("terse", "rain\nrain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    make_base(folder)
    config = tiny_config(
        folder, model__path=str(folder / "base"), model__init="checkpoint", adapter__name="lora", train__steps=2, train__export=True,
        optim__learning_rate=0.3,
    )  # fmt: skip
    fit(config, folder / "run")
    return folder


def config_of(folder, **changes):
    values = tiny_config(folder, model__path=str(folder / "base"), data__eval={"held": str(folder / "held_out.jsonl")}, **changes)
    return parse_config(values, needs_data=False)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, 1, jax.devices()[:1])


@pytest.fixture(scope="module")
def models(folder):
    return [str(folder / name) for name in ("base", "run/checkpoints/2", "run/adapter")]


@pytest.fixture(scope="module")
def comparison(folder, models, mesh):
    contenders = make_contenders(models, [Examples(2), Examples(2, nearest=True)], [TERSE])
    prices = {models[0]: Price(3.0, 5.0, 1.0), models[1]: Price(30.0, 50.0), models[2]: Price(0.0, 7.0)}
    request = Request(
        {name: Subject(*run_and_step(name)) for name in models}, contenders, ("token_f1", "exact_match"), Decoding(NEW, 8), count=ROWS, timed=1,
        prices=prices,
    )  # fmt: skip
    return compare(request, config_of(folder), mesh, log=lambda line: None)


def rows(folder, name):
    return [json.loads(line)["messages"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_without_examples_the_answers_are_those_of_evaluate(folder, comparison, mesh):
    config = config_of(folder, eval__generate=ROWS, eval__max_new_tokens=NEW, eval__scorers=["token_f1"])
    expected = evaluate_model(Subject(str(folder / "base")), config, mesh, log=lambda line: None).records()
    ours = [record for record in comparison.records() if record["contender"] == str(folder / "base")]
    keys = ("prompt", "reference", "generation", "finished", "token_f1")
    assert len(ours) == ROWS and [[record[key] for key in keys] for record in ours] == [[record[key] for key in keys] for record in expected]


def test_with_examples_a_model_is_asked_what_a_server_would_feed(folder, comparison, mesh):
    """The same chat as messages, through the reader and the generation of inference."""
    train, held_out = rows(folder, "train"), rows(folder, "held_out")
    model = open_decoder(Subject(str(folder / "base")), config_of(folder), mesh)
    tokenizer = load_tokenizer(folder / "base")
    reader = PromptReader(tokenizer)
    for each in comparison.answered[:6]:
        chats = []
        for question, shown in zip(comparison.questions, each.asked.shown, strict=True):
            chat = [{"role": "system", "content": TERSE.text}] if each.contender.system is not None else []
            for shot in shown:
                chat += train[shot.where.line - 1]
            chats.append(chat + held_out[question.where.line - 1][:-1])
        assert [item.prompt_ids for item in each.asked.items] == [reader.ids(chat) for chat in chats]
        assert each.prompt_tokens == [len(reader.ids(chat)) for chat in chats]
        texts = generate(model, tokenizer, chats, max_new_tokens=NEW, batch_size=8)
        assert [answer.generation for answer in each.answers] == texts
        assert all(len(shown) == (0 if each.contender.examples is None else 2) for shown in each.asked.shown)


def test_a_checkpoint_and_the_adapter_that_it_became_answer_alike_and_not_as_the_base_does(comparison):
    base, *_, checkpoint, adapter = comparison.answered
    texts = [[answer.generation for answer in each.answers] for each in (base, checkpoint, adapter)]
    assert texts[0] != texts[1] == texts[2]
    assert [each.contender.examples for each in (base, checkpoint, adapter)] == [None] * 3
    found = comparison.to_dict()
    assert found["contenders"][0]["model_fingerprint"] != found["contenders"][-1]["model_fingerprint"]


def test_tokens_and_prices_add_up(comparison):
    for each, described in zip(comparison.answered, comparison.to_dict()["contenders"], strict=True):
        answers = [len(made.ids) + made.finished for made in each.generations]
        assert described["answer_tokens"] == pytest.approx(np.mean(answers))
        assert described["prompt_tokens"] == pytest.approx(np.mean(each.prompt_tokens))
        prompts = [item.prompt_ids for item in each.asked.items]
        shared = 0
        while len({tuple(ids[: shared + 1]) for ids in prompts}) == 1:
            shared += 1
        assert described["shared_tokens"] == shared
        price = comparison.prices[each.contender.model]
        cached = price.prompt if price.shared is None else price.shared
        millionths = [
            shared * cached + (len(ids) - shared) * price.prompt + size * price.answer for ids, size in zip(prompts, answers, strict=True)
        ]
        assert described["cost_per_1000"] == pytest.approx(np.mean(millionths) / 1000)
        assert described["latency"]["prompts"] == 1 and 0 < described["latency"]["median"] <= described["latency"]["p90"]
    drawn, near = comparison.to_dict()["contenders"][1:3]
    assert drawn["shared_tokens"] > near["shared_tokens"]  # the same examples for all, or others for each


def test_scores_and_pairs_follow_from_the_records(comparison):
    found, records = comparison.to_dict(), comparison.records()
    json.dumps([found, records], allow_nan=False)
    names = [each["name"] for each in found["contenders"]]
    assert [record["contender"] for record in records] == names * ROWS  # in the order of the data, then of the contenders
    assert [record["example"]["line"] for record in records] == sorted(record["example"]["line"] for record in records)
    scores = {name: np.array([record["token_f1"] for record in records if record["contender"] == name]) for name in names}
    for each in found["contenders"]:
        assert each["scores"]["token_f1"]["value"] == pytest.approx(scores[each["name"]].mean())
    assert len(found["pairs"]) == len(names) * (len(names) - 1) // 2
    for pair in found["pairs"]:
        difference, judged = scores[pair["first"]] - scores[pair["second"]], pair["scores"]["token_f1"]
        assert judged["difference"] == pytest.approx(difference.mean()) and judged["p_holm"] >= judged["p"]
        assert (judged["wins"], judged["losses"], judged["ties"]) == ((difference > 0).sum(), (difference < 0).sum(), (difference == 0).sum())
    assert found["advice"]["choice"] in names and found["rows"] == ROWS and found["set"] == "held"


@pytest.fixture(scope="module")
def respond(folder, mesh):
    """Returns what asks the base, in a context of so many tokens, with a scorer."""
    config = config_of(folder)
    subject = Subject(str(folder / "base"))
    decoder = open_decoder(subject, config, mesh)
    questions = read_questions(config.data, set_name="", count=6, validation=6, pool=1000, seed=0, log=lambda line: None)

    def go(context=None, scorer=None, pool=questions.pool[:4]):
        form = dataclasses.replace(form_of(subject, config), context=context)
        scorer = scorer or Scorer(lambda answer: (float(bool(answer.generation)), 1.0))
        return Respondent(decoder, form, questions, Shelf(pool), {"s": scorer}, Decoding(4, 8), lambda *done: None), questions

    return go


def test_a_prompt_that_does_not_fit_is_named_and_answered_with_nothing(respond):
    respondent, questions = respond()
    contender = Contender("base", examples=Examples(3))
    sizes = [len(item.prompt_ids) for item in respondent.ask(contender, questions.scored).items]
    respondent, _ = respond(context=sorted(sizes)[3] + 4)
    asked = respondent.ask(contender, questions.scored)
    assert asked.fits == [size <= sorted(sizes)[3] for size in sizes] and not all(asked.fits)
    first = questions.scored[asked.fits.index(False)].where
    assert f"{asked.fits.count(False)} of 6 prompts do not fit the model's context" in asked.notes[0] and str(first) in asked.notes[0]
    answered = respondent.answer(contender, asked, questions.scored)
    for fits, answer, generation, size in zip(asked.fits, answered.answers, answered.generations, answered.answer_tokens, strict=True):
        assert fits or (answer.generation, generation.ids, size) == ("", [], 0)
        assert answer.reference
    assert answered.scored["s"].counted == 6


def shown_in(prompt):
    return prompt.count("<|assistant|>")


@pytest.mark.parametrize(("best", "chosen"), [(2, 2), (None, 0)])
def test_the_number_of_examples_is_chosen_on_validation_rows_and_of_equal_ones_the_fewest(respond, best, chosen):
    """The scorer sees how many turns a prompt has: it is planted which number is good."""
    asked = set()
    respondent, questions = respond()
    turns = {question.asked: len(question.conversation.messages) // 2 for question in (*questions.pool, *questions.validation)}

    def statistics(answer):
        asked.add(answer.reference)
        before = sum(turns[question.asked] for question in questions.pool[:2])
        own = next(turns[question.asked] for question in questions.validation if question.conversation.messages[-1].content == answer.reference)
        return (float(best is None or shown_in(answer.prompt) == own + before), 1.0)

    respondent, _ = respond(scorer=Scorer(statistics))
    contender, told = respondent.choose(Contender("base", examples=Examples("auto")))
    assert (contender.examples.count if contender.examples else 0) == chosen
    assert f"{chosen} chosen by s on 6 training rows that are neither shown nor scored (0: " in told
    assert asked == {question.conversation.messages[-1].content for question in questions.validation}


def test_numbers_of_examples_with_which_a_prompt_does_not_fit_are_not_tried(respond):
    respondent, questions = respond()
    two = Contender("base", examples=Examples(2))
    sizes = [len(item.prompt_ids) for part in (questions.scored, questions.validation) for item in respondent.ask(two, part).items]
    respondent, _ = respond(context=max(sizes) + 4)
    _, told = respondent.choose(Contender("base", examples=Examples("auto")))
    assert "(0: 1.0000, 1: 1.0000, 2: 1.0000; 4, 8, 16, 32 would not fit" in told
    respondent, _ = respond(pool=questions.pool[:1])
    _, told = respondent.choose(Contender("base", examples=Examples("auto", nearest=True)))
    assert "(0: 1.0000, 1: 1.0000; 2, 4, 8, 16, 32 would not fit, or are more than there are)" in told
    with pytest.raises(UserError, match="--retrieve: asks for 2 examples, and 1 training rows can be shown"):
        respondent.ask(Contender("base", examples=Examples(2, nearest=True)), questions.scored)


def request_of(folder, *names, examples=(), systems=(), scorers=("exact_match",), **more):
    names = [str(folder / name) for name in names]
    return Request({name: Subject(name) for name in names}, make_contenders(names, examples, systems), scorers, Decoding(4, 8), count=4, **more)


def test_a_system_prompt_that_the_template_leaves_out_is_refused(folder, mesh):
    template = folder / "deaf.jinja"
    template.write_text(
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    config = config_of(folder, data__chat_template=str(template))
    with pytest.raises(UserError, match="--system: .*system terse is asked exactly what .*base is"):
        compare(request_of(folder, "base", systems=[TERSE]), config, mesh, log=lambda line: None)


def test_each_model_is_asked_in_the_form_that_it_knows(folder):
    """The run was trained with the template of its base; chatml is what the configuration says."""
    config = config_of(folder, data__chat_template="chatml", data__chat_template_kwargs={"a": 1})
    base, run = Subject(str(folder / "base")), Subject(str(folder / "run"))
    own = load_tokenizer(folder / "base").chat_template
    assert "im_start" in form_of(base, config).template.source and form_of(base, config).template_kwargs == {"a": 1}
    assert form_of(base, config, of_run=True).template.source == own
    assert (form_of(run, config).template.source, form_of(run, config).template_kwargs, form_of(run, config).context) == (own, {}, 512)
    bare = config_of(folder, data__chat_template="none")
    assert form_of(base, bare, of_run=True).template is None and form_of(run, bare).template.source == own


def test_choices_by_likelihood_are_refused(folder, mesh):
    with pytest.raises(UserError, match="--scorer: choice:options judges likelihoods"):
        compare(request_of(folder, "base", examples=[Examples(1)], scorers=["choice:options"]), config_of(folder), mesh, log=lambda line: None)


def test_a_chosen_number_that_takes_part_already_is_no_further_contender(folder, mesh):
    """All answers are wrong, so no number of examples is better than none."""
    request = request_of(folder, "base", examples=[Examples("auto"), Examples(1)], validation=4, pool=2)
    found = compare(request, config_of(folder), mesh, log=lambda line: None)
    base = str(folder / "base")
    assert [each.contender.name for each in found.answered] == [base, f"{base}, 1 example"]
    assert f"That is {base}, which takes part already." in " ".join(found.notes)


def test_plain_prompts_have_examples_in_front_and_end_at_the_gap(folder, mesh, monkeypatch):
    for name, count in (("pairs", 20), ("asked", 5)):
        lines = (json.dumps({"prompt": f"{name} number {n} is", "completion": f" seven rain {n}"}) + "\n" for n in range(count))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    values = tiny_config(
        folder, model__path=str(folder / "base"), data__train=str(folder / "pairs.jsonl"), data__eval=str(folder / "asked.jsonl"),
        data__chat_template="none",
    )  # fmt: skip
    config = parse_config(values)
    request = request_of(folder, "base", examples=[Examples(2)])
    found = compare(request, config, mesh, log=lambda line: None)
    plain, shown = found.answered
    tokenizer = load_tokenizer(folder / "base")
    for question, item, shots in zip(found.questions, shown.asked.items, shown.asked.shown, strict=True):
        front = "".join(f"{shot.row['prompt']}{shot.row['completion']}\n\n" for shot in shots)
        assert item.prompt_ids == [*tokenizer.plain_prefix, *tokenizer.encode(front + question.row["prompt"])]
    # what a random model says is no gap, so something that it does say is taken for one
    for place, each in enumerate(found.answered):
        said = [answer.generation for answer in each.answers]
        gap = next(sign for sign in "".join(said) if sign not in " sevenrain0123456789")
        monkeypatch.setattr("sft_jax.comparison.asking.GAP", gap)
        again = compare(request, config, mesh, log=lambda line: None).answered[place]
        assert [answer.generation for answer in again.answers] == ([text.split(gap)[0] for text in said] if each is shown else said)
        assert [answer.reference for answer in again.answers] == [answer.reference for answer in plain.answers]
