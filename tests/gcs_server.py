"""A Cloud Storage server for tests: the emulator with preconditions, several threads and faults.

    python tests/gcs_server.py

It prints its port. The emulator ignores `ifGenerationMatch`, on which locks and checkpoints rely;
here it is checked. It forgets complete uploads, whose answers are kept here. Buckets named
`forbidden` and `expired` answer 403 and 401. What PUT /_faults sets is injected: shares of 503s, of
bodies that are cut, of stalls; with `lost_removals`, the first answer to the removal of each object
gets lost; a removal waits `slow_removals` seconds. GET /_faults counts the requests, and those with
a fault.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from functools import partial
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage

REFUSING = {"forbidden": 403, "expired": 401}
ALONE = threading.RLock()
FAULTS: dict[str, float] = {}
COUNTS: Counter[str] = Counter()
UPLOADS: dict[str, bytes] = {}  # complete resumable ones, and what was answered
REMOVED: set[str] = set()  # those whose answers got lost
RANDOM = random.Random(0)


class Handler(RequestHandler):
    """Answers one request as a whole, so that a part of the answer can be withheld."""

    def _answer(self, method: str) -> None:
        url = urlparse(self.path)
        if url.path == "/_faults":
            self._control(method)
            return
        fault = self._fault()
        COUNTS[method] += 1
        COUNTS["requests"] += 1
        socket, self.wfile = self.wfile, io.BytesIO()
        self._generation = None
        if method == "DELETE":
            time.sleep(FAULTS.get("slow_removals", 0))
        with ALONE:
            refusal = 503 if fault == "unavailable" else self._refusal(method, url)
            if refusal:
                self._read_body()
                self._error(refusal)
            else:
                self._handle(method, url)
        answer, self.wfile = self.wfile.getvalue(), socket
        if method == "GET" and (wanted := self.headers.get("Range")):
            answer = ranged(answer, wanted)
        if method == "DELETE" and FAULTS.get("lost_removals") and url.path not in REMOVED:
            REMOVED.add(url.path)
            COUNTS["lost_removals"] += 1
            answer = b""
        if fault == "cut":
            head, gap, body = answer.partition(b"\r\n\r\n")
            # Of an answer without a body nothing comes at all.
            answer = head + gap + body[: len(body) // 2] if body else b""
        with contextlib.suppress(ConnectionError):  # a client may have read enough
            self.wfile.write(answer)
        self.close_connection = True

    def _handle(self, method: str, url) -> None:
        """Lets the emulator answer; an upload that is complete is answered as before.

        The emulator has forgotten it, and says 404 to a client that did not get the first answer.
        """
        upload = parse_qs(url.query).get("upload_id", [""])[0]
        if upload in UPLOADS:
            self._read_body()
            self.wfile.write(UPLOADS[upload])
            return
        Router(self).handle(method)
        answer = self.wfile.getvalue()
        if upload and answer.split(b" ", 2)[1] == b"200":
            UPLOADS[upload] = answer

    def _fault(self) -> str:
        with ALONE:
            draw = RANDOM.random()
            stalls = RANDOM.random() < FAULTS.get("stall", 0)
        if stalls:
            COUNTS["stall"] += 1
            time.sleep(FAULTS.get("seconds", 1))
        for kind in ("unavailable", "cut"):
            if draw < FAULTS.get(kind, 0):
                COUNTS[kind] += 1
                return kind
            draw -= FAULTS.get(kind, 0)
        return ""

    def _refusal(self, method: str, url) -> int:
        found = re.search(r"/b/([^/?]+)(?:/o/([^?]+))?", url.path)
        if not found:
            return 0
        bucket, query = unquote(found[1]), parse_qs(url.query)
        if bucket in REFUSING:
            return REFUSING[bucket]
        name = query["name"][0] if "name" in query else unquote(found[2] or "")
        try:
            self._generation = self.storage.get_file_obj(bucket, name).get("generation")
        except NotFound:
            self._generation = None
        wanted = query.get("ifGenerationMatch", [None])[0]
        if method != "GET" and wanted not in (None, self._generation or "0"):
            COUNTS["precondition"] += 1
            return 412
        return 0

    def _error(self, status: int) -> None:
        words = {401: "Invalid Credentials", 403: "does not have storage.objects access"}
        text = words.get(status, "injected" if status == 503 else "precondition failed")
        body = json.dumps({"error": {"code": status, "message": text}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _control(self, method: str) -> None:
        if method == "PUT":
            FAULTS.clear()
            FAULTS.update(json.loads(self._read_body()))
        body = json.dumps(COUNTS).encode()
        if method == "PUT":
            COUNTS.clear()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        if getattr(self, "_generation", None) and self.command == "GET":
            self.send_header("x-goog-generation", self._generation)
        super().end_headers()

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def do_DELETE(self):
        self._answer("DELETE")

    def do_PATCH(self):
        self._answer("PATCH")

    def log_message(self, format, *args):
        pass


def ranged(answer: bytes, wanted: str) -> bytes:
    """Returns the part of an answer that a Range header asks for; the emulator ignores it."""
    head, gap, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    if not found or b" 200 " not in status + b" " or not body:
        return answer
    first, last = found.groups()
    start = int(first) if first else max(0, len(body) - int(last))
    stop = min(int(last) + 1, len(body)) if first and last else len(body)
    part = body[start:stop]
    lines = [line for line in lines if not line.lower().startswith(b"content-length:")]
    lines += [b"Content-Length: %d" % len(part)]
    lines += [b"Content-Range: bytes %d-%d/%d" % (start, stop - 1, len(body))]
    status = status.partition(b" ")[0] + b" 206 Partial Content"
    if start >= len(body):
        status, part = status.partition(b" ")[0] + b" 416 Range Not Satisfiable", b""
        lines[-2:] = [b"Content-Length: 0"]
    return b"\r\n".join([status, *lines]) + gap + part


def main() -> None:
    storage = Storage(use_memory_fs=True)
    for bucket in ("bucket", *REFUSING):
        buckets.create_bucket(bucket, storage)
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, storage))
    print(server.server_address[1], flush=True)
    threading.Thread(
        target=lambda: (sys.stdin.buffer.readline(), server.shutdown()), daemon=True
    ).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
