"""A small stand-in for the Hub on this machine: serves one model and one data set at their pinned commits."""

from __future__ import annotations

import hashlib
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class HubHandler(BaseHTTPRequestHandler):
    """repos: {("models" | "datasets", name): (commit, folder)}; log: the paths that were asked for.

    damaged: names of files that arrive with one bit flipped, under the ETag of what they should be; stalls: a part of a
    path on which nothing is answered, or after "body:" only the first half of the body; later: headers of "too many
    requests", which is all that is answered.
    """

    repos: dict[tuple[str, str], tuple[str, Path]] = {}
    log: list[str] = []
    damaged: set[str] = set()
    stalls: str | None = None
    later: dict[str, str] | None = None

    def log_message(self, *args):
        pass

    def _reply(self, status, body=b"", headers=None, content_type="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            stalls = self.stalls and self.stalls.startswith("body:") and self.stalls[5:] in self.path
            self.wfile.write(body[: len(body) // 2] if stalls else body)
            self.wfile.flush()
            if stalls:
                time.sleep(60)

    def _missing(self):
        self._reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _handle(self):
        path = self.path.split("?")[0]
        self.log.append(f"{self.command} {path}")
        if self.stalls and self.stalls in path:
            time.sleep(60)
        if self.later:
            return self._reply(429, headers=self.later)
        for (kind, name), (commit, folder) in self.repos.items():
            files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            api = f"/api/{kind}/{name}"
            if path in (api, f"{api}/revision/{commit}"):
                info = {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files], "tags": []}
                return self._reply(200, json.dumps(info).encode())
            if path.startswith((f"{api}/tree/{commit}", f"{api}/paths-info/{commit}")):
                wanted = files
                if "paths-info" in path:
                    body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                    wanted = [f for f in files if f in body]
                below = path.partition(f"/tree/{commit}")[2].strip("/")
                tree = [
                    {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": _etag(folder / f)}
                    for f in wanted
                    if f.startswith(below)
                ]
                return self._reply(200, json.dumps(tree).encode())
            prefix = f"/{name}/resolve/{commit}/" if kind == "models" else f"/datasets/{name}/resolve/{commit}/"
            if path.startswith(prefix):
                file = folder / path[len(prefix) :]
                if not file.is_file():
                    return self._missing()
                headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(file)}"', "Accept-Ranges": "bytes"}
                content = bytearray(file.read_bytes())
                content[-3] ^= file.name in self.damaged
                return self._reply(200, bytes(content), headers, "application/octet-stream")
        return self._missing()

    do_GET = do_HEAD = do_POST = _handle


def _etag(file: Path) -> str:
    """As the Hub has it: of a large file the sha256, of others git's sha1. Its cache names them so."""
    content = file.read_bytes()
    if file.suffix in (".safetensors", ".gz", ".parquet"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def start(repos) -> ThreadingHTTPServer:
    handler = type("Handler", (HubHandler,), {"repos": repos, "log": [], "damaged": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False  # a thread that stalls
    return server
