"""A web server for this machine or its network, that no client can block: waitress with limits and checks.

    with LocalServer(application) as server:        # a WSGI application
        print(server.new_link())
        server.serve_forever()

By default, it answers only to this machine. One thread reads and writes all connections, so a client that sends half a
request, or reads slowly, costs only its connection. Each connection carries one request. It needs waitress:
pip install "xpnet[draw]"
"""

import contextlib
import ipaddress
import logging
import secrets
import socket
import threading

import waitress.adjustments
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
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
    """A server at `host`, an address of this machine or "0.0.0.0" for all. Port 0 means a free port, `server_port`.

    If the host can be reached from other machines, `is_shared` is true. Then only browsers that have opened a link of
    `new_link` are answered: it gives them a cookie. Then it calls `on_entry()`, an attribute that may be replaced.

    Raises OSError if the host is not an address of this machine, or the port is not free.
    """

    def __init__(self, application, port=0, host="127.0.0.1"):
        logging.getLogger("waitress").setLevel(logging.ERROR)  # it warns of full queues, which its limits allow
        try:
            limits = waitress.adjustments.Adjustments(
                host=host, port=port, threads=4, ident="", asyncore_use_poll=True, log_socket_errors=False,
                connection_limit=2 * MAX_CONNECTIONS, cleanup_interval=1, max_request_header_size=MAX_HEADER,
                max_request_body_size=MAX_BODY + 1, inbuf_overflow=2 * MAX_BODY,
            )  # fmt: skip
        except ValueError as error:
            raise OSError(f"{host!r} is not a name or an address of this machine.") from error
        self.answers, self.on_entry, self._stopped = application, lambda: None, threading.Event()
        super().__init__(self._checked, adj=limits)
        self.server_port = int(self.effective_port)
        self.is_shared = not ipaddress.ip_address(_without_zone(self.effective_host)).is_loopback
        self._names = {"127.0.0.1", "localhost"} if _is_address(host) else {"127.0.0.1", "localhost", host.lower()}
        self._session, self._token, self._lock = secrets.token_urlsafe(), None, threading.Lock()

    def new_link(self):
        """An address of the page. That of a shared server works once, and the link before it no longer works."""
        address = _without_zone(self.effective_host)
        if ipaddress.ip_address(address).is_unspecified:
            address = _own_address(self.family)
        page = f"http://{self._with_port(address)}/"
        if not self.is_shared:
            return page
        with self._lock:
            self._token = secrets.token_urlsafe()
            return f"{page}?token={self._token}"

    def bind_server_socket(self):
        try:
            super().bind_server_socket()
        except OSError:
            self._close_all()
            raise

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
        """Pass a request to the application, if it is for this machine, and from a page of this server or from none."""
        cookies = []

        def start(status, headers, exc_info=None):
            replaced = {name for name, _ in SECURITY_HEADERS}
            kept = [(name, value) for name, value in headers if name not in replaced]
            return start_response(status, [*kept, *SECURITY_HEADERS, *cookies], exc_info)

        # The host prevents DNS rebinding: a page of another site whose name resolves to this machine.
        hosts = {self._with_port(name) for name in (*self._names, environ["xpnet.address"])}
        origins = {None, *(f"http://{host}" for host in hosts)}
        if environ.get("HTTP_HOST", "").lower() not in hosts or environ.get("HTTP_ORIGIN") not in origins:
            return _refuse(start, "This server answers only to its own addresses and pages.")
        if self.is_shared and not self._has_cookie(environ):
            if not self._takes_token(environ):
                return _refuse(start, "Open the link that the program has printed. A link works once, in one browser.")
            cookies.append(("Set-Cookie", f"{self._cookie}={self._session}; Path=/; HttpOnly; SameSite=Strict"))
            self.on_entry()
        return self.answers(environ, start)

    @property
    def _cookie(self):
        return f"session-{self.server_port}"  # browsers share cookies between the ports of a host

    def _has_cookie(self, environ):
        pairs = (pair.strip().partition("=") for pair in environ.get("HTTP_COOKIE", "").split(";"))
        return any(_equal(value, self._session) for name, _, value in pairs if name == self._cookie)

    def _takes_token(self, environ):
        """Whether the request opens the page with the token of the last link, which then no longer works."""
        if (environ["REQUEST_METHOD"], environ["PATH_INFO"]) != ("GET", "/"):
            return False
        with self._lock:
            if self._token is None or not _equal(environ["QUERY_STRING"], f"token={self._token}"):
                return False
            self._token = None
            return True

    def _with_port(self, host):
        """What a browser sends as the host."""
        host = f"[{host}]" if ":" in host else host
        return host if self.server_port == 80 else f"{host}:{self.server_port}"

    # Limits -----------------------------------------------------------------------------------------------------------

    def handle_accept(self):
        """Accept a connection. If there are too many, the oldest one without a complete request is closed."""
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


def _refuse(start, text):
    content = text.encode()
    start("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(content)))])
    return [content]


def _equal(given, secret):
    """Whether two texts are equal, compared in a time that does not depend on where they differ."""
    return secrets.compare_digest(given.encode("utf-8", "replace"), secret.encode())


def _is_address(host):
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _without_zone(address):
    """The address without the network interface that may follow an IPv6 address, such as %eth0."""
    return address.partition("%")[0]


def _own_address(family):
    """The address at which other machines reach this one, or that of the machine itself if it has no network."""
    with socket.socket(family, socket.SOCK_DGRAM) as unused:  # connecting a UDP socket sends nothing
        try:
            unused.connect(("2001:db8::1" if family == socket.AF_INET6 else "198.51.100.1", 9))
        except OSError:
            return "::1" if family == socket.AF_INET6 else "127.0.0.1"
        return _without_zone(unused.getsockname()[0])


class _Parser(waitress.parser.HTTPRequestParser):
    def parse_header(self, header_plus):
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # of the URL http://[ or a Content-Length of 5,000 digits
            raise waitress.parser.ParsingError("the request is malformed") from error
        if self.body_rcv is None:
            self.expect_continue = False  # without a body, waitress would wait for it


class _Task(waitress.task.WSGITask):
    def get_environment(self):
        return {**super().get_environment(), "xpnet.address": self.channel.local_address}


class _Channel(waitress.channel.HTTPChannel):
    """A connection for one request. local_address: that of this machine to which the client has connected."""

    parser_class = _Parser
    task_class = _Task
    local_address = "127.0.0.1"

    def __init__(self, server, connection, *args, **kwargs):
        with contextlib.suppress(OSError):  # raised by some systems if the client has already closed the connection
            self.local_address = _without_zone(connection.getsockname()[0])
        super().__init__(server, connection, *args, **kwargs)

    def service(self):
        self.requests[0].headers["CONNECTION"] = "close"  # further requests on this connection are not answered
        super().service()

    def expire(self):
        """Close the connection in the next iteration of the loop, even if the client reads nothing."""
        self.will_close = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


LocalServer.channel_class = _Channel
