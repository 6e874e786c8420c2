"""One sound run for all tests of the report."""

import pytest
from planted_runs import train


@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    """A run of the quickstart on 500 of its rows, with an export."""
    return train(tmp_path_factory.mktemp("runs"), "healthy")
