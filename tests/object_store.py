"""A stand-in for Google Cloud Storage, for as long as a test runs: the part of its JSON API that gcsfs, TensorStore and Orbax use.

Objects appear whole, have a generation that each write raises, and are written only if it is the one that the writer expects
(ifGenerationMatch), on which TensorStore's databases rely. https://cloud.google.com/storage/docs/json_api/v1
"""

import base64
import contextlib
import email.parser
import hashlib
import http.server
import importlib.util
import itertools
import json
import os
import threading
import urllib.parse
from typing import NamedTuple

import pytest

BUCKET = "bucket"


class _Object(NamedTuple):
    content: bytes
    generation: int


class _Store(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # TensorStore opens many connections at once

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, _Object] = {}
        self.uploads: dict[str, bytes] = {}  # resumable ones that are under way
        self.generations = itertools.count(1000)
        self.lock = threading.Lock()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Store

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        path, query = self._request()
        name = self._name(path)
        if path.startswith("/storage/v1/b/") and not path.startswith(f"/storage/v1/b/{BUCKET}"):
            self._answer(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
        elif name is None and path.endswith("/o"):
            self._list(query)
        elif name is None:
            self._answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET, "location": "US", "locationType": "region"})
        elif (found := self.server.objects.get(name)) is None:
            self._answer(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
        elif query.get("alt") == "media" or path.startswith("/download/"):
            if query.get("ifGenerationNotMatch") == str(found.generation):
                self._answer(304, None)
            else:
                self._send(found)
        else:
            self._answer(200, self._metadata(name, found))

    def do_POST(self) -> None:
        path, query = self._request()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/rewriteTo/" in path:
            source, _, target = path.partition("/rewriteTo/")
            found, name = self.server.objects.get(self._name(source)), self._name(f"/{target}")
            if found is None:
                self._answer(404, {"error": {"code": 404, "message": f"No such object: {source}"}})
            else:
                self._write(name, found.content, {}, lambda metadata: {"done": True, "resource": metadata})
        elif query.get("uploadType") == "resumable":
            self._continue(query, body)
        elif query.get("uploadType") == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            described, content = email.parser.BytesParser().parsebytes(head + body).get_payload()
            self._write(json.loads(described.get_payload())["name"], content.get_payload(decode=True), query)
        else:
            self._write(query["name"], body, query)

    def _continue(self, query: dict[str, str], body: bytes) -> None:
        """Begins a resumable upload, or takes the next part of one, which "bytes 0-9/*" or, of the last, "bytes 10-12/13" describes."""
        if "upload_id" not in query:
            number = str(next(self.server.generations))
            self.server.uploads[number] = b""
            host, path = self.headers["Host"], urllib.parse.quote(query["name"], safe="")
            self._answer(200, None, {"Location": f"http://{host}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&name={path}&upload_id={number}"})
            return
        content = self.server.uploads[query["upload_id"]] + body
        self.server.uploads[query["upload_id"]] = content
        if self.headers["Content-Range"].endswith("/*"):
            self._answer(308, None, {"Range": f"bytes=0-{len(content) - 1}"})
        else:
            self._write(query["name"], content, {})

    def do_DELETE(self) -> None:
        path, _ = self._request()
        with self.server.lock:
            gone = self.server.objects.pop(self._name(path), None)
        self._answer(404 if gone is None else 204, None)

    def _request(self) -> tuple[str, dict[str, str]]:
        parts = urllib.parse.urlsplit(self.path)
        return parts.path, dict(urllib.parse.parse_qsl(parts.query))

    def _name(self, path: str) -> str | None:
        return urllib.parse.unquote(path.partition("/o/")[2]) or None

    def _write(self, name: str, content: bytes, query: dict[str, str], answer=lambda metadata: metadata) -> None:
        with self.server.lock:
            before = self.server.objects.get(name)
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != (before.generation if before else 0):
                self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
                return
            written = self.server.objects[name] = _Object(content, next(self.server.generations))
        self._answer(200, answer(self._metadata(name, written)))

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        with self.server.lock:
            objects = sorted(self.server.objects.items())
        for name, found in objects:
            inside = name.startswith(prefix) and query.get("startOffset", "") <= name and not name >= query.get("endOffset", "\U0010ffff")
            rest = name[len(prefix) :]
            if inside and delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            elif inside:
                items.append(self._metadata(name, found))
        self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _metadata(self, name: str, found: _Object) -> dict[str, str]:
        digest = base64.b64encode(hashlib.md5(found.content).digest()).decode()
        return {"kind": "storage#object", "name": name, "bucket": BUCKET, "size": str(len(found.content)), "md5Hash": digest, "etag": digest,
                "generation": str(found.generation), "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z"}  # fmt: skip

    def _send(self, found: _Object) -> None:
        content, status = found.content, 200
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin = int(first) if first else max(len(content) - int(last), 0)
            end = min(int(last) + 1 if first and last else len(content), len(content))
            if begin >= len(content) > 0:
                self._answer(416, None)
                return
            content, status = content[begin:end], 206
            extra = {"Content-Range": f"bytes {begin}-{end - 1}/{len(found.content)}"}
        self._answer(status, content, {"x-goog-generation": str(found.generation), **(extra if status == 206 else {})})

    def _answer(self, status: int, body, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def object_store():
    """Starts a store with the empty bucket gs://bucket and yields the variables with which a process uses it; skips without gcsfs."""
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("gcsfs is not installed; pip install 'sft_jax[remote]'")
    server = _Store()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    variables = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_CLOUD_PROJECT": "none"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield variables
    finally:
        server.shutdown()
        server.server_close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
