"""The page as text: content is only ever text, scripts are its own, numbers are those of the data."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inspected_rows import PLAIN, ROWS

from sft_jax.errors import UserError
from sft_jax.inspection.filters import Filters
from sft_jax.inspection.markup import escape
from sft_jax.inspection.page import Section, page, write_page
from sft_jax.inspection.plots import grouped_bars, length_histogram, share_histogram

HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>\"' onmouseover=alert(1) <!-- ]]> &lt;\x1b\u202e"
PAGE_TAGS = set(
    "html head meta title style body header h1 nav a main section h2 h3 dl div dt dd p table thead tbody tr th td figure "
    "figcaption svg rect line text span i form input select option article pre details summary script".split()
)  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes, and the text of each article and of the whole."""

    VOID = {"meta", "input"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.scripts, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line",):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data


def written_page(tmp_path, subject, filters=None, **options):
    path = tmp_path / "page.html"
    said = write_page(path, subject, filters or Filters(), **{"most_examples": 500, "most_rows": 20, **options})
    text = path.read_text(encoding="utf-8")
    return text, Page(text), said


@pytest.fixture
def hostile(inspected, written):
    rows = [{"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]}]
    bad = ['{"messages": "' + HOSTILE.replace('"', "").replace("\x1b", "") + '"}', '{"<script>alert(1)</script>": 1}']
    train = {
        "<script>alert(2)</script>\"'": written(rows + bad, "</script><b>.jsonl".replace("/", "")),
        "chats": written(ROWS, "chats.jsonl"),
    }
    return inspected(train)


def test_content_is_only_ever_text(tmp_path, hostile):
    text, parsed, _ = written_page(tmp_path, hostile)
    assert parsed.open == [] and set(parsed.tags) <= PAGE_TAGS
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.tags.count("script") == 1 and "alert" not in parsed.scripts[0]
    assert "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>" in parsed.text
    assert "\x1b" not in text and "\u202e" not in text
    assert r"\x1b" in text and r"\u202e" in text


def test_nothing_is_loaded_and_no_other_script_may_run(tmp_path, hostile):
    _, parsed, _ = written_page(tmp_path, hostile)
    links = [value for _, name, value in parsed.attributes if name in ("src", "href", "action", "srcset")]
    assert links and all(link.startswith("#") for link in links)
    (policy,) = [
        value for tag, name, value in parsed.attributes if tag == "meta" and name == "content" and "default-src" in value
    ]
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[0].encode()).digest()).decode()
    assert (
        policy
        == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_all_problems_and_examples_are_there_without_scripts(tmp_path, inspected, written):
    subject = inspected(written(ROWS))
    _, parsed, said = written_page(tmp_path, subject)
    assert (
        parsed.text.count("is not valid JSON (Expecting value at column 15); correct or remove it.") == 2
    )  # table and example
    assert "2 rows cannot be used, 0 examples do not fit a row. 2 in all." in parsed.text
    assert said.endswith("page.html: The page holds all 6 examples of the 5 rows.")
    assert parsed.tags.count("article") == 6 + subject.data.train.total_rows
    assert "It says 9." in parsed.text and "second" in parsed.text
    classes = [value for tag, name, value in parsed.attributes if tag == "span" and name == "class" and value.startswith("w ")]
    assert {"w one", "w less", "w more"} <= set(classes)


def test_rows_beyond_a_cap_are_counted_apart(tmp_path, inspected, written):
    rows = [{"prompt": f"What says fox {i}?", "completion": " It says 9."} for i in range(20)]
    text, parsed, _ = written_page(tmp_path, inspected([{"path": written(rows), "cap": 5}]))
    assert "<dt>beyond the cap</dt><dd>15</dd>" in text and "<dt>problems</dt><dd>0</dd>" in text
    assert "None: every row can be used, and every example that is used fits a row." in parsed.text and "do not fit" not in parsed.text
    assert parsed.text.count("beyond the cap: it is not in the sample of 5 rows of its set.") == 15
    assert len(re.findall(r'data-is="[^"]*\bbeyond-cap\b', text)) == 15 and 'data-is="plain problem' not in text


def test_many_examples_are_spread_over_all_rows_and_that_is_said(tmp_path, inspected, written):
    rows = [{"prompt": f"What says fox {i}?", "completion": " It says 9."} for i in range(300)]
    text, parsed, said = written_page(tmp_path, inspected(written(rows)), most_examples=10)
    assert said.endswith("The page holds 10 examples: those of 10 of all 300 rows, evenly spread over each set.")
    assert [int(line) for line in re.findall(r"train.jsonl:(\d+)</h3>", text)] == list(range(1, 300, 30))
    assert "300" in parsed.text


def test_a_page_of_filtered_examples_says_which(tmp_path, inspected, written):
    subject = inspected(written(PLAIN))
    text, _, said = written_page(tmp_path, subject, Filters(search="fox 1"))
    assert said.endswith("The page holds all 3 examples that match --search=fox 1.")
    assert len(re.findall('<article class="example"', text)) == 3
    _, _, said = written_page(tmp_path, subject, Filters(search="fox"), most_examples=4)
    assert said.endswith("The page holds the first 4 of 12 examples that match --search=fox.")


def test_what_does_not_fit_is_in_the_table(tmp_path, inspected, written):
    _, parsed, _ = written_page(tmp_path, inspected(written(PLAIN), max_length=40))
    assert "data.max_length 40 has room for 41: data.overlength=error stops the run." in parsed.text
    assert "a run stops at it; packed rows are shown here as with data.overlength=split." in parsed.text


def test_a_file_that_cannot_be_written_is_named(tmp_path, inspected, written):
    path = tmp_path / "nowhere" / "page.html"
    with pytest.raises(UserError) as error:
        write_page(path, inspected(written(PLAIN)), Filters(), most_examples=1, most_rows=1)
    assert (
        str(error.value)
        == f"--html: {path} cannot be written (No such file or directory); name a file in a folder that is there."
    )


def test_sections_can_be_added():
    parsed = Page(page("A <title>", [Section("mine", "Heading <b>", "<p>body</p>")]))
    assert (
        "Heading <b>" in parsed.text
        and ("section", "id", "mine") in parsed.attributes
        and ("a", "href", "#mine") in parsed.attributes
    )


@given(st.text())
def test_escaped_text_opens_no_tag_and_ends_no_attribute(text):
    assert not set(escape(text)) & set("<>\"'\x1b\u202e")


def bars(svg):
    return [int(count.replace(",", "")) for count in re.findall(r": ([\d,]+) (?:examples|rows)</title>", svg)]


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=60), st.integers(3, 10_000))
def test_every_example_is_in_one_bar_of_the_lengths(lengths, limit):
    svg = length_histogram(np.array(lengths), limit, "set")
    assert sum(bars(svg)) == len(lengths)
    assert svg.count('class="limit"') == 1 and f"longest that fits: {limit:,}" in svg
    for label in ("tokens of an example (logarithmic)", ">examples<", 'role="img"'):
        assert label in svg
    places = [float(x) for x in re.findall(r'(?:x|x1|x2)="([-\d.]+)"', svg)]
    assert min(places) >= 0 and max(places) <= 460


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_every_share_is_in_one_bar(shares):
    assert sum(bars(share_histogram(np.array(shares), "title", "x", "rows"))) == len(shares)


def test_bars_are_shares_of_their_group():
    svg = grouped_bars(["a", "<b>"], [("documents", np.array([30, 10])), ("tokens", np.array([0, 0]))], "title", "x")
    assert "a: 75.0% of documents (30)" in svg and "&lt;b&gt;: 25.0% of documents (10)" in svg and "0.0% of tokens (0)" in svg
