"""Real tokenizers for tests of rows; modules that test others have their own."""

import pytest
from chat_cases import shared_tokenizer


@pytest.fixture(scope="package")
def qwen(assets):
    return shared_tokenizer(assets / "tokenizers" / "qwen3")


@pytest.fixture(scope="package")
def llama(assets):
    """SentencePiece, BOS, and a padding token that is EOS."""
    return shared_tokenizer(assets / "tokenizers" / "llama2")


@pytest.fixture(scope="package")
def tiny(assets):
    return shared_tokenizer(assets / "models" / "stories260k")


@pytest.fixture(scope="package")
def stock(assets):
    return {path.stem: path.read_text() for path in (assets / "chat_templates" / "stock").glob("*.jinja")}
