"""A hub in the test process: what huggingface_hub asks for when it downloads a snapshot.

Commits are kept, as on the real one: `push` moves a branch, and older commits can still be read.
"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf")  # kept under their sha256, like git-lfs files
API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>.+)")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Repo:
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """Listens on a free port of this machine while it is used as a context."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos: dict[str, Repo] = {}
        self.fail: dict[str, int] = {}  # status to answer with, by repository
        self.asked: list[str] = []  # "METHOD /path" of every request

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def push(
        self, repo: str, files: Mapping[str, bytes], *, ref: str = "main", gated: bool = False
    ) -> str:
        """Commit exactly these files under a ref; the commit."""
        made = self.repos.setdefault(repo, Repo())
        made.gated |= gated
        content = repr((len(made.commits), sorted(files.items()))).encode()
        commit = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        made.commits[commit] = dict(files)
        made.refs[ref] = commit
        return commit


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        asked = API.fullmatch(path) or FILE.fullmatch(path)
        if not asked:
            return self.refuse(404, "EntryNotFound")
        if status := self.server.fail.get(asked["repo"]):
            return self.refuse(status, "")
        repo = self.server.repos.get(asked["repo"])
        if not repo:
            return self.refuse(401, "RepoNotFound")
        commit = repo.refs.get(asked["revision"], asked["revision"])
        if commit not in repo.commits:
            return self.refuse(404, "RevisionNotFound")
        files = repo.commits[commit]
        if "file" in asked.groupdict():
            return self.file(files, asked["file"], commit, gated=repo.gated)
        if asked["what"] == "tree":
            # The real one lists what a gated repository has, and keeps the files.
            return self.json([entry(n, data) for n, data in files.items()])
        named = [{"rfilename": n} for n in files]
        return self.json({"id": asked["repo"], "sha": commit, "siblings": named})

    def file(self, files: Mapping[str, bytes], name: str, commit: str, *, gated: bool):
        if gated:
            return self.refuse(401, "GatedRepo")
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        data, status, extra = files[name], 200, {}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(found[1]), min(int(found[2] or len(data)) + 1, len(data))
            status, extra = 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            data = data[start:stop]
        etag = {"ETag": f'"{digest(name, files[name])}"', "X-Repo-Commit": commit}
        return self.answer(status, data, {**etag, **extra})

    def json(self, value):
        return self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str):
        said = {"X-Error-Code": code, "X-Error-Message": code or HTTPStatus(status).phrase}
        return self.answer(status, b"", said)

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def digest(name: str, data: bytes) -> str:
    """What the hub names a file by: its sha256 if it is large, else its git id."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    blob = b"blob %d\0" % len(data) + data
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def entry(name: str, data: bytes) -> dict:
    """How a listing shows a file."""
    lfs = {"oid": digest(name, data), "size": len(data), "pointerSize": 134}
    oid = digest(name + ".txt", data)
    large = {"lfs": lfs} if name.endswith(LARGE) else {}
    return {"type": "file", "path": name, "size": len(data), "oid": oid, **large}
