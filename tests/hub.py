"""A stand-in for the model hub on 127.0.0.1: the requests of huggingface_hub that list, download and push files."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

Folders = Mapping[str, Mapping[str, Path]]


@dataclass
class Pushed:
    """A repository that was made by a push."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Hub:
    """Serves folders as repositories, and keeps what is pushed to others.

    Args:
        repos: `org/name` -> revision (a branch, `tags/v1`, or `refs/pr/1`) -> folder with its files.

    Attributes:
        downloads: names of the files that were given out.
        requests: the paths that were asked for.
        pushed: `org/name` -> what was pushed there.
        role: of the user's token, "write" or "read".
        full: whether pushes are refused.
    """

    def __init__(self, repos: Folders) -> None:
        self.repos = repos
        self.downloads: list[str] = []
        self.requests: list[str] = []
        self.pushed: dict[str, Pushed] = {}
        self.role, self.full = "write", False

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of what is at a path."""
        self.requests.append(path)
        if path == "/api/whoami-v2":
            return found({"name": "me", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": self.role}}})
        for repo, known in self.pushed.items():
            if path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
                siblings = [{"rfilename": name} for name in known.files]
                return found({"id": repo, "private": known.private, "siblings": siblings, "tags": []})
            if path == f"/api/models/{repo}/tree/main":
                return found([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in known.files])
        for repo, revisions in self.repos.items():
            for known, folder in revisions.items():
                for name in (known.removeprefix("tags/"), commit(repo, known)):
                    if path == f"/api/models/{repo}/revision/{name}" or (name, path) == ("main", f"/api/models/{repo}"):
                        return found({"id": repo, "sha": commit(repo, known), "siblings": [], "tags": []})
                    if path == f"/api/models/{repo}/tree/{name}":
                        return found([entry(folder, file) for file in files(folder)])
                    if path.startswith(start := f"/{repo}/resolve/{name}/"):
                        file = folder / path.removeprefix(start)
                        body = file.read_bytes()
                        return 200, {"ETag": f'"{digest(body)}"', "X-Repo-Commit": commit(repo, known)}, body
            if path == f"/api/models/{repo}/refs":
                return found(refs(repo, list(revisions)))
            if path.startswith((f"/api/models/{repo}/", f"/{repo}/")):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def take(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to what is sent to a path."""
        self.requests.append(path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            _, headers, address = found({"url": f"http://127.0.0.1/{repo}"})
            if repo in self.pushed:
                return 409, headers, address
            self.pushed[repo] = Pushed(asked["visibility"] == "private")
            return 200, headers, address
        if path == "/api/validate-yaml":
            return found({"errors": [], "warnings": []})
        repo, _, rest = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if rest == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return found({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        if self.full:
            return 403, {}, json.dumps({"error": "storage is full"}).encode()
        self._commit(self.pushed[repo], [json.loads(line) for line in body.splitlines()])
        return found({"commitUrl": f"/{repo}/commit/0", "commitOid": "0", "success": True})

    @staticmethod
    def _commit(repo: Pushed, lines: list[dict[str, dict[str, str]]]) -> None:
        for line in lines:
            match line:
                case {"key": "header", "value": {"summary": summary}}:
                    repo.commits.append(summary)
                case {"key": "file", "value": {"path": name, "content": content}}:
                    repo.files[name] = base64.b64decode(content)
                case {"key": "deletedFile", "value": {"path": name}}:
                    del repo.files[name]


def found(answer: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


def commit(repo: str, revision: str) -> str:
    return digest(f"{repo}@{revision}".encode())


def digest(text: bytes) -> str:
    return hashlib.sha1(text).hexdigest()


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def entry(folder: Path, file: Path) -> dict[str, object]:
    size, name = file.stat().st_size, str(file.relative_to(folder))
    return {"type": "file", "path": name, "size": size, "oid": digest(file.read_bytes())}


def refs(repo: str, names: list[str]) -> dict[str, list[dict[str, str]]]:
    def one(name: str, ref: str, revision: str) -> dict[str, str]:
        return {"name": name, "ref": ref, "targetCommit": commit(repo, revision)}

    tags = [name for name in names if name.startswith("tags/")]
    requests = [name for name in names if name.startswith("refs/pr/")]
    branches = [name for name in names if name not in (*tags, *requests)]
    return {
        "branches": [one(name, f"refs/heads/{name}", name) for name in branches],
        "converts": [],
        "tags": [one(name.removeprefix("tags/"), f"refs/{name}", name) for name in tags],
        "pullRequests": [one(name.rpartition("/")[2], name, name) for name in requests],
    }


@contextmanager
def serving(repos: Folders, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Inside, huggingface_hub asks a stand-in that holds `repos`, with an empty cache."""
    hub = Hub(repos)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(*hub.answer(unquote(urlsplit(self.path).path)))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(*hub.take(unquote(urlsplit(self.path).path), body))

        def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
                hub.downloads += [Path(self.path).name] if "/resolve/" in self.path and status == 200 else []

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            """Is silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
