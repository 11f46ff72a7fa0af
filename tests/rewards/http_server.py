"""Servers on a free port of this machine, for tests."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def answering(answer):
    """A server whose answers `answer(path, headers, body) -> (status, body)` gives; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def respond(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = answer(self.path, self.headers, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = respond

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *request: None  # a client that has left
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(app, limits=None):
    """A server of `create_app` in a thread; yields its URL."""
    from astrolabe_diffusers.serving.binding import bind
    from astrolabe_diffusers.serving.bounded_protocol import ConnectionLimits, make_server
    from astrolabe_diffusers.serving.running import in_thread

    with bind("127.0.0.1", 0) as listener:
        with in_thread(make_server(app, limits or ConnectionLimits()), listener) as address:
            yield f"http://{address}"
