"""A server that speaks as an OpenAI-compatible endpoint; a test decides every answer."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handled:
    """What one request was; `reply` answers it, once."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self.handler = handler
        size = int(handler.headers["Content-Length"])
        self.body: dict[str, Any] = json.loads(handler.rfile.read(size))
        self.asked: str = self.body["messages"][-1]["content"]
        self.headers, self.path = handler.headers, handler.path

    def reply(self, text: str, finish: str = "stop", usage: tuple[int, int] | None = (100, 50)):
        answer: dict[str, Any] = {
            "choices": [
                {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
            ]
        }
        if usage:
            answer["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
        self.raw(200, json.dumps(answer))

    def prompts(self, listed: list[Any]) -> None:
        self.reply(json.dumps({"prompts": listed}))

    def raw(self, status: int, text: str, **headers: str) -> None:
        content = text.encode()
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Content-Length", str(len(content)))
        self.handler.end_headers()
        self.handler.wfile.write(content)


@contextmanager
def serving(answer: Callable[[Handled, int], None]) -> Iterator[str]:
    """The address of a server; `answer` gets each request and its number, from 0."""
    lock, count = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with lock:
                number, count[0] = count[0], count[0] + 1
            # The client gives up waiting where a test wants it.
            with suppress(BrokenPipeError, ConnectionResetError):
                answer(Handled(self), number)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
