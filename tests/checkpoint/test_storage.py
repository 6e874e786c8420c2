"""What goes wrong between here and an object store: what launchers start again for, and what the user must mend."""

import pytest

from sft_jax.checkpoint import storage
from sft_jax.errors import Unreachable, UserError

aiohttp, exceptions = pytest.importorskip("aiohttp"), pytest.importorskip("google.auth.exceptions")
HttpError = pytest.importorskip("gcsfs.retry").HttpError


@pytest.mark.parametrize(
    "error, again",
    [
        (ValueError("UNAVAILABLE: Connection reset by peer"), True), (ValueError("DEADLINE_EXCEEDED: no answer"), True),
        (ValueError("PERMISSION_DENIED: no rights"), False), (ValueError("NOT_FOUND: no bucket"), False),
        (HttpError({"code": 503, "message": "busy"}), True), (HttpError({"code": 429, "message": "slower"}), True),
        (HttpError({"code": 400, "message": "no such thing"}), False), (PermissionError("Forbidden"), False),
        (aiohttp.ClientConnectionError("no route"), True), (ConnectionResetError(104, "reset"), True), (TimeoutError("no answer"), True),
        (exceptions.TransportError("no route"), True), (exceptions.DefaultCredentialsError("no login"), False),
    ],
    ids=repr,
)  # fmt: skip
def test_launchers_start_again_where_only_the_network_is_at_fault(error, again):
    with pytest.raises(UserError, match="gs://bucket/run: the object store") as raised, storage.reachable("gs://bucket/run"):
        raise error
    assert isinstance(raised.value, Unreachable) is again
