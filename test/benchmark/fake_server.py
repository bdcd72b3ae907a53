"""A server that is not SGLang: it answers what a test says."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Callable, Dict, Optional


class _Handler(BaseHTTPRequestHandler):
    def reply(self, body: Optional[Dict]) -> None:
        self.send_response(500 if body is None else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body or {}).encode())

    def do_GET(self):
        self.reply(self.server.info)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(self.server.answer(self.server, self.path, body))

    def log_message(self, *_):
        pass


class FakeServer(ThreadingHTTPServer):
    """Runs while the context is open.

    Args:
        answer: answer(server, path, body) gives what a POST is answered; None is an error of the server.
        state: attributes, for `answer` and the test; `info` is what every GET is answered.
    """

    def __init__(self, answer: Callable, **state):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answer, self.info = answer, {}
        vars(self).update(state)

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()
