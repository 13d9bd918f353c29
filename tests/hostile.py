"""A chat-completions server on loopback that misbehaves as told: what it does next stands in a script."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.faults.said import count

MISBEHAVIOUR = {
    "garbage": "replies that are no JSON",
    "html": "replies that are a web page",
    "empty": "replies without a choice",
    "half": "replies cut in the middle",
    "drop": "dropped connections",
    "hang": "requests that hung",
    "bytes": "replies out of bounds or of wrong types",
    "drip": "replies sent slowly",
    "redirect": "redirects",
    "error": "errors in JSON",
    "page": "errors that are a web page",
    "reply": "completions of unusual form",
    "stream": "streams that were not requested",
}
Behaviour = str | tuple[str, Any]


class Hostile(ThreadingHTTPServer):
    """Answers each question by `answer`, after it has gone through the behaviours of its script, one per try.

    `429` (with seconds of Retry-After), a status, `garbage`, `html`, `empty`, `half`, `drop`, `hang` (seconds), `bytes`
    (a body and its headers), `error` (status and JSON), `page` (status and HTML), `reply` (a completion as JSON), `stream`
    (events of a stream), `drip` (seconds between bytes, and whether they are the header's), `redirect` (status and
    target).
    """

    daemon_threads = True

    def __init__(self, script: dict[str, list[Behaviour]], answer: Callable[[dict[str, Any]], str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = {text: list(steps) for text, steps in script.items()}
        self.answer = answer
        self.tries: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.paid: Counter[str] = Counter()
        self.headers_seen: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.models = ["tiny-chat", "other"]
        self.paths: list[str] = []
        self.rule: Callable[[dict[str, Any]], Behaviour | None] | None = None
        """A behaviour for every request of some kind, before the script; None where there is none."""
        self.most_at_once = self.at_once = self.given_up = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Hostile
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"]
        with server.lock:
            server.tries[said] += 1
            server.times.setdefault(said, []).append(time.monotonic())
            server.headers_seen.append(str(self.headers))
            server.bodies.append(body)
            server.paths.append(self.path)
            steps = server.script.get(said, [])
            step = server.rule(body) if server.rule else None
            if step is None:
                step = steps.pop(0) if steps else "answer"
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            self._behave(step, body, said)
        finally:
            with server.lock:
                server.at_once -= 1

    def _behave(self, step: Behaviour, body: dict[str, Any], said: str) -> None:
        name, value = step if isinstance(step, tuple) else (step, None)
        if name != "answer":
            count(f"server: {MISBEHAVIOUR.get(name, f'status {name}')}")
        if name.isdigit():
            told = {} if value is None else {"Retry-After": str(value)}
            shown = f"status {name} for you with {self.headers.get('Authorization')}"  # careless servers echo the key
            self._send(int(name), {"error": {"message": shown, "type": "test"}}, told)
        elif name == "garbage":
            self._send_bytes(200, b'{"choices": [{"mess', "application/json")
        elif name == "html":
            self._send_bytes(200, b"<html>Bad gateway, but politely</html>", "text/html")
        elif name == "empty":
            self._send(200, {"id": "x", "object": "chat.completion", "choices": []})
        elif name == "half":
            whole = self._completion(body, said)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[: len(whole) // 2])
            self.close_connection = True
        elif name == "drop":
            self.close_connection = True
        elif name == "bytes":
            data, headers = value
            self._send_bytes(200, data, "application/json", headers)
        elif name == "error":
            self._send(*value)
        elif name == "page":
            self._send_bytes(value[0], value[1].encode(), "text/html")
        elif name == "reply":
            with self.server.lock:
                self.server.paid[said] += 1
            self._send(200, value)
        elif name == "stream":
            self._send_bytes(200, "".join(f"data: {event}\n\n" for event in value).encode(), "text/event-stream")
        elif name == "drip":
            self._drip(*value, self._completion(body, said))
        elif name == "redirect":
            self._send(value[0], {}, {"Location": value[1]})
        elif name == "hang":
            time.sleep(value)
        else:
            with self.server.lock:
                self.server.paid[said] += 1
            if value:
                time.sleep(value)
            self._send_bytes(200, self._completion(body, said), "application/json")

    def _drip(self, seconds: float, in_header: bool, data: bytes) -> None:
        """A byte at a time until the client gives up."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.wfile.write(b"X-Slow: " if in_header else f"Content-Length: {len(data)}\r\n\r\n".encode())
        try:
            for byte in data:
                self.wfile.write(bytes([byte]) if not in_header else b"x")
                time.sleep(seconds)
        except OSError:
            self.server.given_up += 1
        self.close_connection = True

    def _completion(self, body: dict[str, Any], said: str) -> bytes:
        text = self.server.answer(body)
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": len(said), "completion_tokens": len(text), "total_tokens": len(said) + len(text)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        return json.dumps({**whole, "usage": usage}).encode()

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(value).encode(), "application/json", headers)

    def _send_bytes(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def hostile(
    script: dict[str, list[Behaviour]] | None = None, answer: Callable[[dict[str, Any]], str] | None = None
) -> Iterator[Hostile]:
    """A running server; `answer` makes a text of a request's body, by default the question in brackets."""
    server = Hostile(script or {}, answer or (lambda body: f"<{body['messages'][-1]['content']}>"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
