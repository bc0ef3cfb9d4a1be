"""A web server that answers only to this machine, and that no client can block: waitress with limits and checks.

    with LocalServer(application) as server:        # a WSGI application
        print(f"http://127.0.0.1:{server.server_port}/")
        server.serve_forever()

One thread reads and writes all connections, so a client that sends half a request, or reads slowly, costs only its
connection. Each connection carries one request. It needs waitress: pip install "xpnet[draw]"
"""

import contextlib
import logging
import socket
import threading

import waitress.adjustments
import waitress.channel
import waitress.parser
import waitress.server
import waitress.wasyncore

MAX_HEADER, MAX_BODY = 2**14, 2**20  # bytes of a request
MAX_CONNECTIONS = 64
MAX_SECONDS = 20.0  # of a connection: for sending the request, and for reading the response

SECURITY_HEADERS = [
    # Everything comes from this server, no script or style stands in the HTML, and no other page may frame this one.
    ("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
     "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Cache-Control", "no-store"),
]  # fmt: skip


class LocalServer(waitress.server.TcpWSGIServer):
    """A server at 127.0.0.1. Port 0 means a free port; its number is `server_port`."""

    def __init__(self, application, port=0):
        logging.getLogger("waitress").setLevel(logging.ERROR)  # it warns of full queues, which its limits allow
        limits = waitress.adjustments.Adjustments(
            host="127.0.0.1", port=port, threads=4, ident="", asyncore_use_poll=True, log_socket_errors=False,
            connection_limit=2 * MAX_CONNECTIONS, cleanup_interval=1, max_request_header_size=MAX_HEADER,
            max_request_body_size=MAX_BODY + 1, inbuf_overflow=2 * MAX_BODY,
        )  # fmt: skip
        self.answers, self._stopped = application, threading.Event()
        super().__init__(self._checked, adj=limits)
        self.server_port = int(self.effective_port)
        self._hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self._origins = {f"http://{host}" for host in self._hosts}

    def serve_forever(self):
        """Answer requests until `shutdown` or Ctrl-C."""
        try:
            waitress.wasyncore.loop(timeout=1.0, map=self._map, use_poll=True)
        finally:
            self._close_all()
            self._stopped.set()

    def shutdown(self):
        """End `serve_forever`, which runs in another thread."""
        self.trigger.pull_trigger(self._close_all)
        self._stopped.wait()

    def _close_all(self):
        self.task_dispatcher.shutdown(timeout=1)
        waitress.wasyncore.close_all(self._map)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._close_all()

    def _checked(self, environ, start_response):
        """The WSGI application, for requests to this machine by pages of this server or by no page."""

        def start(status, headers, exc_info=None):
            replaced = {name for name, _ in SECURITY_HEADERS}
            kept = [(name, value) for name, value in headers if name not in replaced]
            return start_response(status, [*kept, *SECURITY_HEADERS], exc_info)

        # The host prevents DNS rebinding: a page of another site whose name resolves to this machine.
        if environ.get("HTTP_HOST") in self._hosts and environ.get("HTTP_ORIGIN") in {None, *self._origins}:
            return self.answers(environ, start)
        text = b"This server answers only to its own machine and pages."
        start("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text)))])
        return [text]

    # Limits -----------------------------------------------------------------------------------------------------------

    def handle_accept(self):
        """Accept a connection. If there are too many, the one that has kept its request back the longest is closed."""
        if len(self.active_channels) >= MAX_CONNECTIONS:
            waiting = [channel for channel in self.active_channels.values() if not channel.requests]
            if waiting:
                min(waiting, key=lambda channel: channel.creation_time).expire()
        super().handle_accept()

    def maintenance(self, now):
        """Close connections that are too old. waitress would close only idle ones."""
        for channel in list(self.active_channels.values()):
            if channel.creation_time < now - MAX_SECONDS:
                channel.expire()


class _Parser(waitress.parser.HTTPRequestParser):
    def parse_header(self, header_plus):
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # of the URL http://[ or a Content-Length of 5,000 digits
            raise waitress.parser.ParsingError("the request is malformed") from error
        if self.body_rcv is None:
            self.expect_continue = False  # without a body, waitress would wait for it


class _Channel(waitress.channel.HTTPChannel):
    """A connection for one request."""

    parser_class = _Parser

    def service(self):
        self.requests[0].headers["CONNECTION"] = "close"  # further requests on this connection are not answered
        super().service()

    def expire(self):
        """Close the connection in the next round, also if the client reads nothing."""
        self.will_close = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


LocalServer.channel_class = _Channel
