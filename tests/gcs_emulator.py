"""A small Google Cloud Storage: the part of its JSON API that gcsfs, google-cloud-storage and tensorstore use.

Objects have generations, which writes and reads may depend on; listings know prefixes, delimiters and pages; reads know
ranges; uploads come whole, in two parts or in pieces. Everything is in memory. What is not known is refused with 400,
which no client tries again.

https://cloud.google.com/storage/docs/json_api/v1
"""

import base64
import dataclasses
import datetime
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.local_server import LocalServer

_GENERATIONS = itertools.count(1_700_000_000_000_000)  # every write of any object has a number of its own
_PAGE = 1000  # of a listing, at most


@dataclasses.dataclass(frozen=True)
class Blob:
    """One generation of an object."""

    name: str
    bucket: str
    data: bytes
    content_type: str = "application/octet-stream"
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    generation: int = dataclasses.field(default_factory=lambda: next(_GENERATIONS))
    time: str = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    )

    def resource(self) -> dict[str, Any]:
        return {
            "kind": "storage#object",
            "name": self.name,
            "bucket": self.bucket,
            "generation": str(self.generation),
            "metageneration": "1",
            "contentType": self.content_type,
            "size": str(len(self.data)),
            "timeCreated": self.time,
            "updated": self.time,
            "metadata": self.metadata,
            "md5Hash": base64.b64encode(hashlib.md5(self.data, usedforsecurity=False).digest()).decode(),
        }


class Refused(Exception):
    """An answer that is an error: the status, the message."""


class GcsEmulator(LocalServer):
    """Serves buckets at `url` while it is open: `buckets` hold objects by name, in `forbidden` ones all is refused."""

    request_queue_size = 128  # Orbax opens many connections at once; beyond it the kernel drops them

    def __init__(self, buckets: Iterable[str], forbidden: Iterable[str] = ()):
        super().__init__(_Handler)
        self.buckets: dict[str, dict[str, Blob]] = {name: {} for name in buckets}
        self.forbidden = frozenset(forbidden)
        self.uploads: dict[str, tuple[dict[str, str], dict[str, Any], bytearray]] = {}  # begun: query, resource, data
        self.before_write: Callable[[str, bytes], object] = lambda name, data: None  # is told of every write first
        self.lock = threading.RLock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the server."""

    def download(self, bucket: str, prefix: str, directory: Path) -> Path:
        """Copies what is below `prefix` to a directory on the disk."""
        for name, blob in self.buckets[bucket].copy().items():
            if name.startswith(f"{prefix}/"):
                path = directory / name.removeprefix(f"{prefix}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(blob.data)
        return directory

    def objects(self, bucket: str) -> dict[str, Blob]:
        if bucket in self.forbidden:
            raise Refused(403, f"test does not have storage.objects access to {bucket}.")
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self.buckets[bucket]

    def find(self, bucket: str, name: str) -> Blob:
        found = self.objects(bucket).get(name)
        if found is None:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return found

    def put(self, bucket: str, name: str, data: bytes, query: dict[str, str], **fields: Any) -> Blob:
        """A new generation, if the preconditions hold."""
        self.before_write(name, data)
        with self.lock:
            objects = self.objects(bucket)
            _check_generation(objects.get(name), query)
            objects[name] = Blob(name, bucket, data, **fields)
            return objects[name]

    def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        """One page: objects, and what their names have in common up to the delimiter."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first = max(query.get("startOffset", ""), query.get("pageToken", ""))
        items, prefixes, limit = [], [], min(int(query.get("maxResults", _PAGE)), _PAGE)
        with self.lock:
            names = sorted(self.objects(bucket))
        page: dict[str, Any] = {"kind": "storage#objects"}
        for name in names:
            if not name.startswith(prefix) or name < first or name >= query.get("endOffset", "\U0010ffff"):
                continue
            head, found, _ = name.removeprefix(prefix).partition(delimiter) if delimiter else (name, "", "")
            common = prefix + head + found if found else None
            if common is not None and common in prefixes[-1:]:
                continue
            if len(items) + len(prefixes) == limit:
                page["nextPageToken"] = name
                break
            if common is not None:
                prefixes.append(common)
            elif (blob := self.buckets[bucket].get(name)) is not None:
                items.append(blob.resource())
        return {**page, **({"items": items} if items else {}), **({"prefixes": prefixes} if prefixes else {})}


def _check_generation(blob: Blob | None, query: dict[str, str]) -> None:
    """A generation of 0 stands for an object that does not exist."""
    generation = str(blob.generation if blob is not None else 0)
    if query.get("generation", generation) != generation:
        raise Refused(404, f"No such generation: {query['generation']}")  # buckets here keep no versions
    if query.get("ifGenerationMatch", generation) != generation:
        raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
    if query.get("ifGenerationNotMatch") == generation:
        raise Refused(304, "")


class _Handler(BaseHTTPRequestHandler):
    server: GcsEmulator
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is two writes: the second would wait for the other side

    def _answer(self) -> None:
        """Calls the method for the request's path; each path is of one resource."""
        split = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        query = dict(parse_qsl(split.query, keep_blank_values=True))
        routes = (
            (r"GET /storage/v1/b/([^/]+)", self._bucket),
            (r"GET /storage/v1/b/([^/]+)/o", self._list),
            (r"GET (?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", self._get),
            (r"DELETE /storage/v1/b/([^/]+)/o/([^/]+)", self._delete),
            (r"POST /storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", self._move),
            (r"(?:POST|PUT) /upload/(?:resumable/)?storage/v1/b/([^/]+)/o", self._upload),
        )
        try:
            for pattern, method in routes:
                if match := re.fullmatch(pattern, f"{self.command} {split.path}"):
                    method(query, body, *map(unquote, match.groups()))
                    return
            raise Refused(400, f"{self.command} {self.path} is not emulated")
        except Refused as refused:
            status, message = refused.args
            self._send(status, {"error": {"code": status, "message": message, "errors": [{"message": message}]}})

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def _send(self, status: int, content: dict[str, Any] | bytes = b"", headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode() if isinstance(content, dict) else content
        data = b"" if status in (204, 304) else data
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _bucket(self, query: dict[str, str], body: bytes, bucket: str) -> None:
        self.server.objects(bucket)
        self._send(200, {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"})

    def _list(self, query: dict[str, str], body: bytes, bucket: str) -> None:
        self._send(200, self.server.list(bucket, query))

    def _get(self, query: dict[str, str], body: bytes, bucket: str, name: str) -> None:
        """The object's resource, or with alt=media its content or a range of it."""
        blob = self.server.find(bucket, name)
        _check_generation(blob, query)
        if query.get("alt") != "media":
            self._send(200, blob.resource())
            return
        headers = {"x-goog-generation": str(blob.generation)}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not span:
            self._send(200, blob.data, headers)
            return
        size, (first, last) = len(blob.data), span.groups()
        begin, end = (int(first), int(last or size) + 1) if first else (max(size - int(last), 0), size)
        end = min(end, size)
        if begin >= end:
            raise Refused(416, "Request range not satisfiable")
        self._send(206, blob.data[begin:end], {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{size}"})

    def _delete(self, query: dict[str, str], body: bytes, bucket: str, name: str) -> None:
        with self.server.lock:
            _check_generation(self.server.find(bucket, name), query)
            del self.server.buckets[bucket][name]
        self._send(204)

    def _move(self, query: dict[str, str], body: bytes, bucket: str, name: str, to_name: str) -> None:
        with self.server.lock:
            blob = self.server.find(bucket, name)
            fields = {"content_type": blob.content_type, "metadata": blob.metadata}
            moved = self.server.put(bucket, to_name, blob.data, query, **fields)
            del self.server.buckets[bucket][name]
        self._send(200, moved.resource())

    def _upload(self, query: dict[str, str], body: bytes, bucket: str) -> None:
        if "upload_id" in query:
            self._piece(query["upload_id"], body, bucket)
        elif query.get("uploadType") == "media":
            blob = self.server.put(bucket, query["name"], body, query, content_type=self.headers["Content-Type"])
            self._send(200, blob.resource())
        elif query.get("uploadType") == "multipart":
            boundary = re.escape(self.headers.get_boundary("").encode())
            _, known, content, _ = re.split(rb"(?:^|\r?\n)--" + boundary, body)
            known, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (known, content))
            self._send(200, self._store(bucket, query, json.loads(known), content).resource())
        elif query.get("uploadType") == "resumable":
            self.server.objects(bucket)
            number = str(next(_GENERATIONS))
            self.server.uploads[number] = (query, json.loads(body or b"{}"), bytearray())
            self._send(200, {}, {"Location": f"{self.server.url}{self.path}&upload_id={number}"})
        else:
            raise Refused(400, f"{self.path} is not emulated")

    def _piece(self, number: str, body: bytes, bucket: str) -> None:
        """Part of an upload; `Content-Range: bytes 0-99/*` says that there is more to come."""
        query, known, received = self.server.uploads[number]
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        if span and span[1]:
            del received[int(span[1]) :]
        received += body
        if span and span[2] != str(len(received)):
            self._send(308, {}, {"Range": f"bytes=0-{len(received) - 1}"} if received else {})
            return
        self._send(200, self._store(bucket, query, known, bytes(received)).resource())

    def _store(self, bucket: str, query: dict[str, str], known: dict[str, Any], content: bytes) -> Blob:
        fields = {"content_type": known.get("contentType", "application/octet-stream")}
        name = query.get("name") or known["name"]
        return self.server.put(bucket, name, content, query, **fields, metadata=known.get("metadata", {}))
