"""The page in a browser: no errors, nothing of the content runs, filters work, also from the address."""

import re
import subprocess

import pytest
from inspected_rows import ROWS, write

from sft_jax.inspection.filters import Filters
from sft_jax.inspection.page import write_page

pytestmark = pytest.mark.browser
HOSTILE = "</pre></script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"


@pytest.fixture(scope="module")
def browse(chromium, tmp_path_factory):
    """Opens a page and returns what it has become and what the console was told."""
    profile = tmp_path_factory.mktemp("profile")

    def go(address, *options):
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={profile}", "--window-size=1200,900", *(options or ["--dump-dom"]), address,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return go


@pytest.fixture(scope="module")
def address(tmp_path_factory, inspected):
    folder = tmp_path_factory.mktemp("data")
    hostile = [{"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]}]
    plain = [{"prompt": f"What says fox {i}?", "completion": " It says 9." * (1 + 199 * (i == 3))} for i in range(8)]
    pairs = {"path": write(folder / "pairs.jsonl", plain)}
    train = {"chats": write(folder / "chats.jsonl", ROWS + hostile), "pairs & <more>": pairs}
    path = folder / "page.html"
    write_page(path, inspected(train, max_length=400), Filters(), most_examples=500, most_rows=3)
    return path.as_uri()


def visible(dom):
    """Returns the lines of the examples that are shown."""
    articles = re.findall(r'<article class="example"([^>]*)>.*?<h3>[^<]*/(\w+\.jsonl:\d+)</h3>', dom)
    return [where for attributes, where in articles if "hidden" not in attributes]


def test_the_page_has_no_errors_and_runs_nothing_of_its_content(browse, address):
    dom, console = browse(address)
    assert console == []
    assert "<title>What is trained on</title>" in dom
    assert len(visible(dom)) == 15 and '<span id="status" role="status">15 of 15 shown</span>' in dom
    assert re.search(r'<form id="filters" role="search">', dom)  # shown by the script


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("search=FOX%205", ["pairs.jsonl:6"]),
        ("search=%3Cscript%3E", ["chats.jsonl:6"]),
        ("set=chats", [f"chats.jsonl:{line}" for line in (1, 2, 3, 4, 4, 5, 6)]),
        ("set=pairs+%26+%3Cmore%3E&search=fox+7", ["pairs.jsonl:8"]),
        ("only=problem", ["chats.jsonl:3", "chats.jsonl:5", "pairs.jsonl:4"]),
        ("only=per-turn", ["chats.jsonl:4", "chats.jsonl:4"]),
        ("only=too-long", ["pairs.jsonl:4"]),
        ("only=untrained&set=chats", ["chats.jsonl:3", "chats.jsonl:5"]),
        ("search=there is no such text", []),
    ],
)
def test_filters_in_the_address_choose_examples(browse, address, asked, expected):
    dom, console = browse(f"{address}#{asked}")
    assert (visible(dom), console) == (expected, [])
    assert f"{len(expected)} of 15 shown" in dom


@pytest.mark.parametrize("dark", [False, True])
def test_a_picture_of_the_page_can_be_taken(browse, address, tmp_path, dark):
    picture = tmp_path / "page.png"
    _, console = browse(address, f"--screenshot={picture}", *(["--blink-settings=preferredColorScheme=0"] if dark else []))
    assert console == [] and picture.stat().st_size > 20_000
