"""A small Hugging Face hub: the part of its HTTP interface that huggingface_hub uses to download models.

Repositories have commits, branches, and may be gated or private; files of weights are answered by a redirect to another
address, as those in large-file storage are. Everything is in memory. What is not known is refused with 400.

https://huggingface.co/docs/hub/api
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.local_server import LocalServer

TOKEN = "hf_of_a_test"
_LARGE = (".safetensors", ".bin", ".pth")


@dataclasses.dataclass
class Repository:
    """Files by path of each commit, commits by the names of branches and tags; access is public, gated or private."""

    access: str = "public"
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)


class Refused(Exception):
    """An answer that is an error: status, the hub's code of the error, message."""


class HubEmulator(LocalServer):
    """Serves repositories at `url` while it is open; `requests` are those it got, as "GET /path"."""

    def __init__(self):
        super().__init__(_Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.breaks_off = False  # in the middle of large files
        self.when_asked: Callable[[], object] = lambda: None  # called once, when a file of a branch was sent

    def commit(self, name: str, files: Mapping[str, bytes], branch: str = "main", access: str = "public") -> str:
        """Makes a commit that consists of these files; returns its hash."""
        repository = self.repositories.setdefault(name, Repository(access))
        content = b"".join(path.encode() + data for path, data in sorted(files.items()))
        commit = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        return commit

    def upload(self, name: str, directory: Path, **options: str) -> str:
        """Makes a commit of all files below a directory."""
        paths = [path for path in directory.rglob("*") if path.is_file()]
        return self.commit(name, {str(path.relative_to(directory)): path.read_bytes() for path in paths}, **options)

    def find(self, name: str, revision: str, token: str) -> tuple[str, dict[str, bytes]]:
        """(commit, its files), if the token gives access."""
        repository = self.repositories.get(name)
        allowed = token == f"Bearer {TOKEN}"
        if repository is None or (repository.access == "private" and not allowed):
            raise Refused(404 if allowed else 401, "RepoNotFound", "Repository not found")
        if repository.access == "gated" and not allowed:
            raise Refused(401, "GatedRepo", f"Access to model {name} is restricted.")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]


class _Handler(BaseHTTPRequestHandler):
    server: HubEmulator
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is two writes: the second would wait for the other side

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {unquote(path)}")
        routes = (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            (r"/large/([^/]+/[^/]+)/([^/]+)/(.+)", self._large),
        )
        try:
            for pattern, method in routes:
                if match := re.fullmatch(pattern, path):
                    method(*(unquote(group or "main") for group in match.groups()))
                    return
            raise Refused(400, "BadRequest", f"{self.command} {self.path} is not emulated")
        except Refused as refused:
            status, code, message, *commit = refused.args
            found = {"X-Repo-Commit": commit[0]} if commit else {}
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message, **found})

    do_GET = do_HEAD = _answer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        return self.server.find(name, revision, self.headers.get("Authorization", ""))

    def _info(self, name: str, revision: str) -> None:
        commit, files = self._find(name, revision)
        siblings = [{"rfilename": path} for path in files]
        known = {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings}
        self._send(200, json.dumps({**known, "tags": [], "downloads": 0, "likes": 0}).encode(), {})

    def _tree(self, name: str, revision: str) -> None:
        _, files = self._find(name, revision)
        tree = [{"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in files.items()]
        self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, path: str) -> tuple[str, bytes]:
        commit, files = self._find(name, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}", commit)
        return commit, files[path]

    def _resolve(self, name: str, revision: str, path: str) -> None:
        commit, data = self._file(name, revision, path)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(data)}"'}
        if not path.endswith(_LARGE):
            self._send(200, data, headers)
            if self.command == "GET" and revision != commit:
                self.server.when_asked, when_asked = lambda: None, self.server.when_asked
                when_asked()
            return
        headers |= {"X-Linked-Etag": headers.pop("ETag"), "X-Linked-Size": str(len(data))}
        self._send(
            302,
            b"",
            {**headers, "Location": f"http://localhost:{self.server.server_port}/large/{name}/{commit}/{path}"},
        )

    def _large(self, name: str, commit: str, path: str) -> None:
        """The content, or a range of it, where the redirect leads; the address alone gives access, as a signed one."""
        data = self.server.repositories[name].commits[commit][path]
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        part = data[int(begin[1]) if begin else 0 :]
        if self.server.breaks_off:
            self._send(200, part[: len(part) // 2], {"Content-Length": str(len(part))})
            self.close_connection = True
            return
        spans = {"Content-Range": f"bytes {begin[1]}-{len(data) - 1}/{len(data)}"} if begin else {}
        self._send(206 if begin else 200, part, {"ETag": f'"{_etag(data)}"', **spans})


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
