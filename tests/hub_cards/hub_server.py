"""A Hub for tests, in memory: what of the real one's HTTP interface `huggingface_hub` needs to push, `from_pretrained`
and `load_dataset` to load. It refuses what the real one refuses (tokens, metadata, parents that are not the head), and
fails where a test wants it to.

    with HubServer() as hub:
        hub.fail("POST", "/commit/", status=500)
        ...  # with HF_ENDPOINT=hub.url and HF_TOKEN=hub.token
"""

import hashlib
import json
import re
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import DatasetCardData, ModelCardData

LARGE = (".safetensors", ".parquet", ".bin", ".png")
FRONT_MATTER = re.compile(r"^---\n(.*?)\n---\n", re.DOTALL)
REPO = r"/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"


class Blob:
    def __init__(self, content, is_large):
        self.content, self.is_large = content, is_large
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def oid(self):
        return self.sha256 if self.is_large else self.sha1


class Repo:
    """Branches of commits; a commit is its number, message and files (path -> Blob)."""

    def __init__(self, private):
        self.private, self.branches, self.commits = private, {}, {}
        self.commit("main", "initial commit", {})

    def commit(self, branch, message, files):
        sha = hashlib.sha1(f"{id(self)}{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = (message, files)
        self.branches[branch] = [*self.branches.get(branch, self.branches.get("main", [])), sha]
        return sha

    def head(self, revision="main"):
        if revision in self.commits:
            return revision
        return self.branches[revision][-1] if revision in self.branches else None

    def files(self, revision="main"):
        return self.commits[self.head(revision)][1]

    def messages(self, branch="main"):
        return [self.commits[sha][0] for sha in self.branches[branch]]


class Refusal(Exception):
    def __init__(self, status, message, code=None, **more):
        self.status, self.code, self.content = status, code, {"error": message, **more}


class HubServer:
    """`repos` is {(kind, id): Repo}; `requests` lists "METHOD path"; `uploads` counts files that were stored."""

    def __init__(self):
        self.token, self.reader_token = "hf_" + "w" * 34, "hf_" + "r" * 34
        self.repos, self.large, self.faults, self.requests, self.uploads = {}, {}, [], [], 0
        self.lock = threading.Lock()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method, pattern, status=500, times=1, when="before"):
        """Answer the next requests like this with a status, or, for `status=None`, by closing the connection in the
        middle; `when="after"` does what was asked for first."""
        self.faults.append([method, re.compile(pattern), status, times, when])

    def fault(self, method, path, when):
        with self.lock:
            for fault in self.faults:
                if fault[0] == method and fault[1].search(path) and fault[3] > 0 and fault[4] == when:
                    fault[3] -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version, hub = "HTTP/1.1", None

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path, hub = unquote(urlsplit(self.path).path), self.hub
        length = int(self.headers.get("Content-Length") or 0)
        hub.requests.append(f"{self.command} {path}")
        if (fault := hub.fault(self.command, path, "before")) and fault[2] is None:
            self.rfile.read(length // 2)
            self.connection.close()
            return
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        try:
            if fault:
                raise Refusal(fault[2], "The server is ill.")
            with hub.lock:
                answer = self._route(path, body)
            if fault := hub.fault(self.command, path, "after"):
                raise Refusal(fault[2], "The server fell ill.")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            self._send(refusal.status, json.dumps(refusal.content).encode(), headers)
        else:
            content, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
            self._send(200, content, headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, path, body):
        for method, pattern, function in ROUTES:
            if self.command in method.split("|") and (match := re.fullmatch(pattern, path)):
                data = match.groupdict()
                if data.get("kind"):
                    data["kind"] = data["kind"].strip("/")
                return function(self, body=body, **data)
        raise Refusal(404, f"There is no {self.command} {path}.")

    def _may(self, write=False):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if write and token == self.hub.reader_token:
            raise Refusal(403, "This token may read, but not write.")
        if token not in (self.hub.token, self.hub.reader_token):
            if write:
                raise Refusal(401, "Invalid credentials in Authorization header")
            return False
        return True

    def _repo(self, kind, id, revision="main", write=False):
        may, repo = self._may(write), self.hub.repos.get((kind or "models", id))
        if repo is None or (repo.private and not may):
            raise Refusal(404 if may else 401, "Repository not found", "RepoNotFound")
        if repo.head(revision) is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo

    def create(self, body):
        self._may(write=True)
        request = json.loads(body)
        owner = request.get("organization") or "user"
        key = (request.get("type", "model") + "s", f"{owner}/{request['name']}")
        if key in self.hub.repos:
            raise Refusal(409, "You already created this repo", url=f"{self.hub.url}/{key[1]}")
        self.hub.repos[key] = Repo(request.get("visibility") == "private" or bool(request.get("private")))
        return {"url": f"{self.hub.url}/{key[1]}"}

    def branch(self, kind, id, branch, body):
        repo = self._repo(kind, id, write=True)
        if branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[branch] = [repo.head()]
        return {}

    def preupload(self, kind, id, revision, body):
        files = self._repo(kind, id, revision, write=True).files(revision)
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            answer = {"path": path, "shouldIgnore": False, "uploadMode": "lfs" if path.endswith(LARGE) else "regular"}
            answers.append(answer | ({"oid": files[path].oid} if path in files else {}))
        return {"files": answers}

    def batch(self, id, body, kind=None):
        self._repo(kind, id, write=True)
        objects = json.loads(body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.large:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{each['oid']}"}}
        answer = {"transfer": "basic", "objects": objects}
        return json.dumps(answer).encode(), {"Content-Type": "application/vnd.git-lfs+json"}

    def store(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "Content does not match its hash")
        self.hub.large[oid] = Blob(body, True)
        self.hub.uploads += 1
        return {}

    def commit(self, kind, id, revision, body):
        repo = self._repo(kind, id, revision, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        header, files = lines[0]["value"], dict(repo.files(revision))
        if header.get("parentCommit", repo.head(revision)) != repo.head(revision):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"Unknown operation {line['key']}")
        is_proposal = "create_pr" in parse_qs(urlsplit(self.path).query)
        number = sum(name.startswith("refs/pr/") for name in repo.branches) + 1
        branch = f"refs/pr/{number}" if is_proposal else revision
        sha = repo.commit(branch, header["summary"], files)
        answer = {"commitUrl": f"{self.hub.url}/{id}/commit/{sha}", "commitOid": sha, "success": True}
        return answer | ({"pullRequestUrl": f"{self.hub.url}/{id}/discussions/{number}"} if is_proposal else {})

    def validate(self, body):
        request = json.loads(body)
        match = FRONT_MATTER.match(request["content"])
        try:
            data = yaml.safe_load(match.group(1)) if match else {}
            card_data = {"model": ModelCardData, "dataset": DatasetCardData}[request["repoType"]](**data)
            errors = [
                name for name in ("license", "pipeline_tag", "library_name") if not _is_word(card_data.get(name))
            ]
        except Exception as error:
            errors = [error]
        if errors:
            messages = [{"message": str(error)} for error in errors]
            raise Refusal(400, "Invalid metadata", errors=messages, warnings=[])
        return {"errors": [], "warnings": []}

    def info(self, kind, id, body, revision="main"):
        repo = self._repo(kind, id, revision or "main")
        sha, files = repo.head(revision or "main"), repo.files(revision or "main")
        card = FRONT_MATTER.match(files["README.md"].content.decode()) if "README.md" in files else None
        return {
            "id": id, "sha": sha, "private": repo.private, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": path} for path in sorted(files)],
            "cardData": yaml.safe_load(card.group(1)) if card else None,
        }  # fmt: skip

    def tree(self, kind, id, revision, body, path=None):
        files, prefix = self._repo(kind, id, revision).files(revision), f"{path}/" if path else ""
        is_recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        inside = {name: blob for name, blob in files.items() if name.startswith(prefix)}
        if path and not inside:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        folders = {name[: i + len(prefix)] for name in inside for i, c in enumerate(name[len(prefix) :]) if c == "/"}
        entries = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
        entries += [_entry(name, blob) for name, blob in sorted(inside.items())]
        return [each for each in entries if is_recursive or "/" not in each["path"][len(prefix) :]]

    def paths(self, kind, id, revision, body):
        files = self._repo(kind, id, revision).files(revision)
        wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
        found = [_entry(path, files[path]) for path in wanted if path in files]
        folders = [path for path in wanted if any(name.startswith(f"{path}/") for name in files)]
        return found + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]

    def refs(self, kind, id, body):
        repo = self._repo(kind, id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": shas[-1]}
            for name, shas in repo.branches.items()
        ]
        return {"branches": branches, "tags": [], "converts": []}

    def resolve(self, id, revision, path, body, kind=None):
        repo = self._repo(kind, id, revision)
        if path not in (files := repo.files(revision)):
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{files[path].oid}"', "X-Repo-Commit": repo.head(revision)}
        return files[path].content, headers | {"Content-Type": "application/octet-stream"}


def _is_word(value):
    return value is None or (isinstance(value, str) and re.fullmatch(r"[a-z0-9.+\-_]+", value))


def _entry(path, blob):
    entry = {"type": "file", "path": path, "oid": blob.sha1, "size": len(blob.content)}
    if blob.is_large:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
    return entry


REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api{REPO}/branch/(?P<branch>.+)", _Handler.branch),
    ("POST", f"/api{REPO}/preupload/{REVISION}", _Handler.preupload),
    ("POST", r"(?P<kind>/datasets|/models)?/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/storage/(?P<oid>[0-9a-f]+)", _Handler.store),
    ("POST", f"/api{REPO}/commit/{REVISION}", _Handler.commit),
    ("GET", f"/api{REPO}", _Handler.info),
    ("GET", f"/api{REPO}/revision/{REVISION}", _Handler.info),
    ("GET", f"/api{REPO}/tree/{REVISION}(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", f"/api{REPO}/paths-info/{REVISION}", _Handler.paths),
    ("GET", f"/api{REPO}/refs", _Handler.refs),
    ("GET|HEAD", rf"(?P<kind>/datasets)?/(?P<id>[^/]+/[^/]+)/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
)
