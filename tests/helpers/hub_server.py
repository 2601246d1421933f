"""
A Hugging Face Hub on loopback, in memory: what the stock `huggingface_hub` client needs to create a model repository, to
push to it (preupload, LFS batch API, commit) and to load from it. Clients find it by `HF_ENDPOINT`; the Xet protocol is not
spoken, so they need `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


USER, TOKEN = "user", "hf_" + "thetokenofthisverytestserver" + "0123456789"
LFS_SUFFIXES = (".safetensors", ".png", ".bin")
BREAK_AFTER = 1000  # bytes of an upload that is to break off


@dataclass(frozen=True)
class File:
    """A file of a commit. `oid` is the SHA-256 of an LFS file, else git's SHA-1."""

    oid: str
    size: int
    is_lfs: bool


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # by id, in order
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        described = json.dumps([len(self.commits), sorted((path, file.oid) for path, file in files.items())])
        oid = hashlib.sha1(described.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid


class HubServer(ThreadingHTTPServer):
    """
    Attributes:
        repositories (`dict[str, Repository]`): By id.
        blobs (`dict[str, bytes]`): Contents by oid.
        uploads (`list[str]`): The oid of each LFS upload that was begun.
        broken (`set[str]`): Oids whose uploads break off.
        requests (`list[str]`): Method and path of each request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}"  # another host, which must not be sent the token
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.broken: set[str] = set()
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that goes away is no error
            super().handle_error(request, client_address)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of one revision, by path."""
        repository = self.repositories[repo_id]
        commit = repository.commits[repository.branches.get(revision, revision)]
        return {path: self.blobs[file.oid] for path, file in commit.items()}


class RefusalError(Exception):
    """Becomes a response with the Hub's error headers."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        """Nothing: the server keeps `requests`."""

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
        try:
            if path.startswith("/storage/") and "Authorization" in self.headers:
                raise RefusalError(400, "Only one auth mechanism allowed")  # as S3 does
            if self.command == "PUT" and (match := re.fullmatch(r"/storage/(\w{64})", path)):
                return self._store(match.group(1))
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            with self.server.lock:
                for method, pattern, action in ROUTES:
                    if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                        return action(self, body, **match.groupdict())
            raise RefusalError(404, f"no route for {self.command} {path}")
        except RefusalError as refusal:
            headers = {"X-Error-Message": str(refusal)}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._send_json({"error": str(refusal)}, refusal.status, headers)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _is_user(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return given is not None

    def _writer(self, namespace: str = USER) -> None:
        if not self._is_user():
            raise RefusalError(401, "Invalid username or password.")
        if namespace != USER:
            raise RefusalError(403, f"You don't have the rights to write to the namespace {namespace!r}")

    def _repository(self, repo_id: str) -> Repository:
        is_user = self._is_user()
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and not is_user):
            raise RefusalError(404 if is_user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _revision(self, repository: Repository, revision: str) -> str:
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # What follows is one action a route

    def whoami(self, body: bytes) -> None:
        self._writer()
        self._send_json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        given = json.loads(body)
        namespace = given.get("organization") or USER
        self._writer(namespace)
        repo_id = f"{namespace}/{given['name']}"
        url = {"url": f"{self.server.endpoint}/{repo_id}"}
        if repo_id in self.server.repositories:
            return self._send_json({"error": "You already created this model repo", **url}, 409)
        repository = self.server.repositories[repo_id] = Repository(given.get("visibility") == "private")
        repository.commit("main", {})
        self._send_json(url)

    def branch(self, body: bytes, repo_id: str, branch: str) -> None:
        self._writer(repo_id.split("/")[0])
        repository = self._repository(repo_id)
        if branch in repository.branches:
            raise RefusalError(409, f"Reference {branch!r} already exists")
        repository.branches[branch] = repository.branches["main"]
        self._send_json({})

    def validate_yaml(self, body: bytes) -> None:
        if not json.loads(body)["content"].startswith("---\n"):
            return self._send_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        self._send_json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        self._writer(repo_id.split("/")[0])
        repository = self._repository(repo_id)
        files = repository.commits[self._revision(repository, revision)]
        answer = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": files[one["path"]].oid if one["path"] in files else None,
            }
            for one in json.loads(body)["files"]
        ]
        self._send_json({"files": answer})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        self._writer(repo_id.split("/")[0])
        self._repository(repo_id)
        objects = []
        for one in json.loads(body)["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.server.blobs:  # what is there needs no action
                answer["actions"] = {
                    "upload": {"href": f"{self.server.storage}/storage/{one['oid']}", "header": {}},
                    "verify": {"href": f"{self.server.endpoint}/{repo_id}.git/info/lfs/objects/verify", "header": {}},
                }
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_verify(self, body: bytes, repo_id: str) -> None:
        self._writer(repo_id.split("/")[0])
        given = json.loads(body)
        if len(self.server.blobs.get(given["oid"], b"")) != given["size"]:
            raise RefusalError(404, f"Object {given['oid']} is not there")
        self._send_json({})

    def _store(self, oid: str) -> None:
        """An upload to the storage, which asks for no token: the address is the permission."""
        with self.server.lock:
            self.server.uploads.append(oid)
            is_broken = oid in self.server.broken
        if is_broken:
            self.rfile.read(BREAK_AFTER)
            self.close_connection = True
            return self.connection.close()
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers["Content-Length"]))
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusalError(400, f"The content's SHA-256 is not {oid}")
        with self.server.lock:
            self.server.blobs[oid] = content
        self._send(b"")

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        self._writer(repo_id.split("/")[0])
        repository = self._repository(repo_id)
        if revision not in repository.branches:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = dict(repository.commits[repository.branches[revision]])
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.server.blobs[oid] = content
                files[value["path"]] = File(oid, len(content), is_lfs=False)
            elif kind == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise RefusalError(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                files[value["path"]] = File(value["oid"], value["size"], is_lfs=True)
            elif kind == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(revision, files)
        self._send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{oid}"})

    def model_info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        repository = self._repository(repo_id)
        oid = self._revision(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
        self._send_json(
            {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": oid, "private": repository.private, "siblings": siblings}
            | {"tags": [], "downloads": 0, "likes": 0}
        )

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str | None = None) -> None:
        repository = self._repository(repo_id)
        files = repository.commits[self._revision(repository, revision)]
        prefix = folder.strip("/") + "/" if folder else ""
        entries = []
        for path, file in sorted(files.items()):
            if path.startswith(prefix):
                entry = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
                if file.is_lfs:
                    entry["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 0}
                entries.append(entry)
        if prefix and not entries:
            raise RefusalError(404, f"{folder} does not exist", "EntryNotFound")
        self._send_json(entries)

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        repository = self._repository(repo_id)
        oid = self._revision(repository, revision)
        file = repository.commits[oid].get(path)
        if file is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        if not file.is_lfs:
            return self._send(self.server.blobs[file.oid], headers={"X-Repo-Commit": oid, "ETag": f'"{file.oid}"'})
        headers = {"X-Repo-Commit": oid, "X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
        self._send(b"", 302, {**headers, "Location": f"{self.server.storage}/storage/{file.oid}"})

    def download(self, body: bytes, oid: str) -> None:
        if oid not in self.server.blobs:
            raise RefusalError(404, f"Object {oid} is not there")
        self._send(self.server.blobs[oid], headers={"ETag": f'"{oid}"'})


REPOSITORY = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{REPOSITORY}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/verify", Handler.lfs_verify),
    ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>.+)", Handler.commit),
    ("GET", rf"/api/models/{REPOSITORY}", Handler.model_info),
    ("GET", rf"/api/models/{REPOSITORY}/revision/(?P<revision>.+)", Handler.model_info),
    ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", Handler.tree),
    ("GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("GET", r"/storage/(?P<oid>\w{64})", Handler.download),
]


@contextmanager
def serve() -> Iterator[HubServer]:
    """A server that runs in a thread of this process."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
