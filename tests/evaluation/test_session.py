import pytest

from sft_jax.errors import UserError
from sft_jax.evaluation.generate import generate
from sft_jax.evaluation.session import ChatSession
from sft_jax.hf.load import load


@pytest.fixture(scope="module")
def stories(assets):
    return load(assets / "models" / "stories260k")


def chat(stories, **options):
    return ChatSession(*stories, **{"chat_template": "chatml", "max_new_tokens": 6, **options})


def test_answers_are_those_of_generate_and_go_into_the_history(stories):
    session = chat(stories, system="Be kind.")
    pieces = list(session.answer("Hi"))
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    first = generate(*stories, [asked], max_new_tokens=6, chat_template="chatml")[0]
    assert len(pieces) > 2 and "".join(pieces) == first
    assert session.turns == [*asked, {"role": "assistant", "content": first}] and not session.finished
    second = "".join(session.answer("And?"))
    history = [*session.turns[:3], {"role": "user", "content": "And?"}]
    assert [second] == generate(*stories, [history], max_new_tokens=6, chat_template="chatml")
    session.clear()
    assert session.turns == asked[:1]


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(stories):
    whole = "".join(chat(stories, chat_template="auto", max_new_tokens=40).answer("Once upon a time"))
    stop = whole[20:26]  # in the middle of the answer, over several tokens
    session = chat(stories, max_new_tokens=40, chat_template="auto", stop=["never said", stop])
    answer = "".join(session.answer("Once upon a time"))
    assert answer == whole[: whole.index(stop)] and session.finished
    assert [answer] == generate(*stories, ["Once upon a time"], max_new_tokens=40, stop=["never said", stop])


def test_what_was_said_of_an_answer_that_is_cut_off_stays(stories):
    session = chat(stories, system="Be kind.")
    answer = session.answer("Hi")
    given = next(answer) + next(answer)
    answer.close()
    assert session.turns[1:] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": given}]


def test_without_a_template_a_text_goes_on(stories):
    session = chat(stories, chat_template="auto", max_new_tokens=24)
    assert not session.is_chat
    assert "".join(session.answer("Once upon a time")).startswith(", there was") and session.turns == []


def test_a_message_that_cannot_be_answered_leaves_the_chat_as_it_was(stories):
    session = chat(stories)
    assert session.context == 512
    with pytest.raises(UserError, match=r"context is 512"):
        next(session.answer("many words " * 100))
    with pytest.raises(UserError, match="the message: .*surrogate"):
        next(session.answer("\ud800"))
    assert session.turns == []


def test_an_answer_ends_where_the_context_does(stories):
    session = chat(stories, chat_template="auto", max_new_tokens=100)
    session.context = 26
    tokens = stories[1].encode("".join(session.answer("Once upon a time")))
    assert 0 < len(tokens) <= 26 - len(stories[1].encode("Once upon a time")) and not session.finished


@pytest.mark.parametrize(
    ("options", "message"),
    [({"system": "a", "chat_template": "auto"}, "^system:"), ({"max_new_tokens": 0}, "^max_new_tokens:")],
)
def test_options_that_make_no_sense_are_named(stories, options, message):
    with pytest.raises(UserError, match=message):
        chat(stories, **options)


def test_a_chat_passes_the_arguments_of_its_template(stories, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:"
        "{% if brief %} In short,{% endif %}{% endif %}"
    )
    asked = [{"role": "user", "content": "Hi"}]
    options = {"max_new_tokens": 6, "chat_template": str(template)}
    expected = [generate(*stories, [asked], chat_template_kwargs={"brief": brief}, **options)[0] for brief in (True, False)]
    given = ["".join(chat(stories, chat_template_kwargs={"brief": brief}, **options).answer("Hi")) for brief in (True, False)]
    assert given == expected and given[0] != given[1]
