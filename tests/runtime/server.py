"""An OpenAI-compatible server on 127.0.0.1 that answers what a test gives it, with its faults.

with Server() as server:
    server.answer = completion("2")
"""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """What it answers, and what it was asked.

    Args:
        answer: the text of the body, or bytes.
        delay: seconds before it answers; drip: seconds between the bytes of the body.
    """

    def __init__(self):
        self.answer: str | bytes = completion("NO_TRADE")
        self.status, self.delay, self.drip = 200, 0.0, 0.0
        self.models, self.date = json.dumps({"data": [{"id": "tuned"}]}), None
        self.requests: list[tuple[str, str | None, dict]] = []  # path, Authorization, body
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"its": self}))
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # who asked has hung up
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    its: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def date_time_string(self, timestamp=None):
        return self.its.date or super().date_time_string(timestamp)

    def do_GET(self):
        self.its.requests.append((self.path, self.headers["Authorization"], {}))
        self.send(self.its.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.its.requests.append((self.path, self.headers["Authorization"], body))
        time.sleep(self.its.delay)
        self.send(self.its.answer)

    def send(self, answer: str | bytes):
        content = answer.encode() if isinstance(answer, str) else answer
        self.send_response(self.its.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for start in range(0, len(content), 1) if self.its.drip else ():
            self.wfile.write(content[start : start + 1])
            time.sleep(self.its.drip)
        if not self.its.drip:
            self.wfile.write(content)


def completion(text: str, *positions: dict[str, float]) -> str:
    """A chat completion. positions: the probabilities of the tokens at each place, the one that was taken first."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if positions:
        choice["logprobs"] = {"content": list(map(position, positions))}
    return json.dumps({"id": "an id", "object": "chat.completion", "choices": [choice]})


def position(probabilities: dict[str, float]) -> dict:
    tokens = [{"token": text, "logprob": math.log(value)} for text, value in probabilities.items()]
    return tokens[0] | {"top_logprobs": sorted(tokens, key=lambda one: -one["logprob"])}
