"""A stand-in for the Hub on this machine: what huggingface_hub asks of it to make a repository, push and pull."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


USER, TOKEN = "someone", "hf_secret"


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes | dict | list = b"", **headers: str):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub, path = self.server, self.path.split("?")[0]
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            repo = f"{USER}/{json.loads(body)['name']}"
            known = repo in hub.repos
            hub.repos.setdefault(repo, {})
            return self.answer(409 if known else 200, {"url": f"{hub.url}/{repo}"})
        if path == "/api/validate-yaml":
            problems = metadata_problems(json.loads(body)["content"])
            errors = [{"message": problem} for problem in problems]
            return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        if hub.broken:
            return self.answer(403, {"error": "the Hub is being repaired"})
        repo, action = re.fullmatch(r"/api/models/(.+/.+)/(preupload|commit)/main", path).groups()
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        operations = [json.loads(line) for line in body.splitlines()]
        hub.messages.append(operations[0]["value"]["summary"])
        for operation in operations[1:]:
            assert operation["key"] == "file"
            hub.repos[repo][operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
        self.answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        match = re.fullmatch(r"/api/models/(.+/.+?)(/revision/main)?", path)
        if match and match[1] in hub.repos:
            files = [{"rfilename": name} for name in hub.repos[match[1]]]
            return self.answer(200, {"id": match[1], "modelId": match[1], "sha": "0" * 40, "siblings": files})
        match = re.fullmatch(r"/api/models/(.+/.+?)/tree/[^/]+", path)
        if match and match[1] in hub.repos:
            return self.answer(200, [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in hub.repos[match[1]].items()
            ])  # fmt: skip
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if match and match[2] in hub.repos.get(match[1], {}):
            content = hub.repos[match[1]][match[2]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(200, content, ETag=etag, X_Repo_Commit="0" * 40)
        self.answer(404, {"error": "not found"}, X_Error_Code="EntryNotFound" if match else "RepoNotFound")

    do_HEAD = do_GET


def metadata_problems(card: str) -> list[str]:
    """What the Hub finds wrong with the metadata of a card."""
    metadata = yaml.safe_load(card.split("---")[1])
    problems = []
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", metadata.get("base_model", "a/model")):
        problems.append('"base_model" must be a valid model id')
    if not isinstance(metadata.get("license", ""), str):
        problems.append('"license" must be a string')
    return problems


@contextmanager
def serve_hub():
    """Runs the stand-in on a free port. `repos` are its files, `messages` of its commits; `broken`: it takes none."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repos, server.messages, server.broken = {}, [], False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
