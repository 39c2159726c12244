"""A stand-in for the model hub on 127.0.0.1: the requests that huggingface_hub makes to list and download files."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

Folders = Mapping[str, Mapping[str, Path]]


class Hub:
    """Serves folders as repositories.

    Args:
        repos: `org/name` -> revision (a branch, `tags/v1`, or `refs/pr/1`) -> folder with its files.

    Attributes:
        downloads: names of the files that were given out.
        requests: the paths that were asked for.
    """

    def __init__(self, repos: Folders) -> None:
        self.repos = repos
        self.downloads: list[str] = []
        self.requests: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of what is at a path."""
        self.requests.append(path)
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
            status, headers, body = hub.answer(unquote(urlsplit(self.path).path))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
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
