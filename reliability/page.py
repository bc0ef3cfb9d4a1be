"""Fuzzed requests to the page of examples/draw_digit.py: nothing may block it, end it or make it answer with 500.

Shared with other devices by --host, it may also show nothing to requests without the cookie of its one-time link.
"""

import collections
import contextlib
import json
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

from reliability.results import Result, scaled

ROOT = Path(__file__).parents[1]
SERVER = """
import sys
sys.path.insert(0, {examples!r})
import draw_digit, mnist
task = mnist.digits_task()
model = mnist.build_mlp((8, 8), "cpu", 0, task.largest_pixel)
model.fit(*task.train, epochs=1, batch_size=16, verbose=0)
with draw_digit.make_local_server(draw_digit.Classifier(model, task), host={host!r}) as server:
    print(server.new_link(), flush=True)
    server.serve_forever()
"""
GOOD = json.dumps({"strokes": [[[0.3, 0.2], [0.7, 0.2], [0.4, 0.85]]]}).encode()
LIMIT = 1.0  # seconds in which a correct request must be answered
MEMORY = 100  # MiB by which the server may grow: 64 connections with 1 MiB each, and what it answers
ALLOWED = {200, 206, 304, 400, 403, 404, 405, 413, 416, 417, 431, 501}


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    results = attacked("127.0.0.1", scaled(10_000, scale, 100), seed, folder)
    shared = attacked("0.0.0.0", scaled(5_000, scale, 100), seed, folder)
    for result in shared:
        result.cases += ", shared by --host"
    return results + shared


def attacked(host: str, count: int, seed: int, folder: Path) -> list[Result]:
    """The results of `attack` on a page that is served at this host."""
    with page_server(folder, host) as (link, process):
        port, cookie, used = link.port or 0, b"", f"/?{link.query}" if link.query else ""
        if used:
            cookie = _opened(port, used)
        results = attack(port, count, seed, lambda: memory_of(process.pid), cookie=cookie, used=used)
        if process.poll() is not None:
            results[0].bad.append(f"the server ended with {process.returncode}")
    errors = (folder / "errors").read_text(errors="replace")
    if "Traceback" in errors:
        results[0].bad.append(f"the server printed {errors.count('Traceback')} tracebacks: {errors[-1000:]}")
    return results


@contextlib.contextmanager
def page_server(folder: Path, host: str) -> Iterator[tuple[urllib.parse.SplitResult, "subprocess.Popen[str]"]]:
    """(link, process) of the page with a small model."""
    code = SERVER.format(examples=str(ROOT / "examples"), host=host)
    with open(folder / "errors", "w") as errors:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            link = process.stdout.readline().strip()
            if not link:
                raise RuntimeError(f"the server did not start: {(folder / 'errors').read_text()}")
            yield urllib.parse.urlsplit(link), process
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _opened(port: int, path: str) -> bytes:
    """The line of a request with the cookie that a browser gets by opening this path."""
    head = _exchange(port, [f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()], 10 * LIMIT)
    return b"Cookie: " + head.partition(b"Set-Cookie: ")[2].partition(b";")[0] + b"\r\n"


def memory_of(pid: int) -> float:
    """The resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def attack(
    port: int, count: int, seed: int, memory: Callable[[], float], threads: int = 8, cookie: bytes = b"", used: str = ""
) -> list[Result]:
    """Send `count` fuzzed requests to a server on this machine, and correct ones beside them.

    cookie: without this line of a request, nothing may be shown. used: a path with a token that no longer works.
    """
    fuzzed, correct = Result("fuzzed requests to the page"), Result("correct requests beside them")
    for _ in range(3):
        _ask(port, cookie)  # warms up
    grown, stop, numbers, statuses = [memory()], threading.Event(), iter(range(count)), collections.Counter[str]()
    lock, slowest = threading.Lock(), [0.0]

    def ask_correctly() -> None:
        last = False
        while not last:
            last = stop.is_set()  # also asks after the last fuzzed request
            problem, seconds = _ask(port, cookie)
            slowest[0] = max(slowest[0], seconds)
            correct.tried += 1
            if problem or seconds > LIMIT:
                correct.bad.append(f"after {fuzzed.tried:,} fuzzed requests: {problem} in {seconds:.2f} s")
            grown.append(memory())
            stop.wait(0.02)

    def send_fuzzed() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None or len(correct.bad) > 20:
                return
            kind, status, problem = _send(port, random.Random(f"{seed} {number}"), open_ones, cookie, used)
            with lock:
                fuzzed.tried += 1
                statuses[status] += 1
                if problem:
                    fuzzed.bad.append(f"seed {seed}, request {number} ({kind}): {problem}")

    open_ones: collections.deque[socket.socket] = collections.deque()
    watcher, senders = threading.Thread(target=ask_correctly), [threading.Thread(target=send_fuzzed)
                                                                for _ in range(threads)]  # fmt: skip
    for thread in [watcher, *senders]:
        thread.start()
    for thread in senders:
        thread.join()
    stop.set()
    watcher.join()
    for connection in open_ones:
        connection.close()
    growth = max(grown) - grown[0]
    if growth > MEMORY:
        fuzzed.bad.append(f"the server's memory grew by {growth:.0f} MiB")
    fuzzed.note = f"answers: {', '.join(f'{what} ({n:,})' for what, n in statuses.most_common())}"
    correct.note = f"the slowest took {slowest[0]:.3f} s; the server's memory grew by at most {growth:.0f} MiB"
    return [fuzzed, correct]


def _ask(port: int, cookie: bytes) -> tuple[str, float]:
    """(what is wrong with the answer to a correct request, seconds)."""
    start = time.monotonic()
    try:
        answer = _exchange(port, [_with_cookie(_post(port, GOOD), cookie)], timeout=10 * LIMIT)
    except OSError as error:
        return repr(error), time.monotonic() - start
    seconds = time.monotonic() - start
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        right = b" 200 " in head[:16] and abs(sum(json.loads(body)["probabilities"]) - 1.0) < 1e-3
    except (ValueError, KeyError):
        right = False
    return "" if right else f"answer {answer[:80]!r}", seconds


def _post(port: int, body: bytes, path: str = "/classify", extra: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
    return head.encode("latin-1") + body


def _exchange(port: int, parts: list[bytes], timeout: float, end: bool = False) -> bytes:
    """Send these parts, and return all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        deadline, answer = time.monotonic() + timeout, b""
        with contextlib.suppress(OSError):  # the server may have refused it by now
            for part in parts:
                connection.sendall(part)
            if end:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(2**16):
                answer += part
                connection.settimeout(max(0.01, deadline - time.monotonic()))
    return answer


# Requests -------------------------------------------------------------------------------------------------------------


def _with_cookie(request: bytes, cookie: bytes) -> bytes:
    return request.replace(b"\r\nHost: ", b"\r\n" + cookie + b"Host: ", 1)


def _send(
    port: int, draw: random.Random, open_ones: "collections.deque[socket.socket]", cookie: bytes, used: str
) -> tuple[str, str, str]:
    """Send one fuzzed request. Returns its kind, the status of the answer, and what is wrong with it."""
    kind = draw.choice(list(KINDS))
    request = KINDS[kind](port, draw)
    if cookie and draw.random() < 0.1:
        request = f"GET {used} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    if cookie and draw.random() < 0.7:
        request = _with_cookie(request, cookie)
    try:
        if kind in ("half open", "trickle", "no reading"):
            return kind, _leave_open(port, request, kind, draw, open_ones), ""
        complete = kind not in INCOMPLETE
        answer = _exchange(port, _in_parts(request, draw), 10.0, end=not complete)
    except TimeoutError:
        return kind, "no answer", "no answer in 10 s"
    except OSError as error:
        return kind, "refused", repr(error)
    if not answer:
        return kind, "closed", "closed without an answer" if complete else ""
    first = answer.split(b"\r\n", 1)[0].split(b" ")
    status = int(first[1]) if len(first) > 1 and first[0].startswith(b"HTTP/1.") and first[1].isdigit() else 0
    while status == 100:  # Continue
        answer = answer.partition(b"\r\n\r\n")[2]
        status = int(answer[9:12] or 408)
    if status not in {*ALLOWED, 408}:
        return kind, str(status), f"status {status} for {request[:200]!r}: {answer[-200:]!r}"
    if cookie.strip() not in request and status in {200, 206, 304}:
        return kind, str(status), f"shown without the cookie: {request[:200]!r}"
    if status == 200 and b"x-content-type-options: nosniff" not in answer.lower():
        return kind, str(status), f"no security headers for {request[:200]!r}"
    return kind, str(status), ""


def _in_parts(request: bytes, draw: random.Random) -> list[bytes]:
    if len(request) < 2 or draw.random() < 0.7:
        return [request]
    cut = draw.randrange(1, len(request))
    return [request[:cut], request[cut:]]


def _leave_open(
    port: int, request: bytes, kind: str, draw: random.Random, open_ones: "collections.deque[socket.socket]"
) -> str:
    """Send a part of a request, or all without reading the answer, and keep the connection open for a while."""
    connection = socket.create_connection(("127.0.0.1", port), 10.0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with contextlib.suppress(OSError):
        if kind == "trickle":  # a byte at a time
            for i in range(min(len(request), 20)):
                connection.sendall(request[i : i + 1])
                time.sleep(0.002)
        elif kind == "no reading":
            connection.sendall(request * draw.choice([1, 1, 50]))
        elif draw.random() < 0.8:
            connection.sendall(request[: draw.randrange(len(request))])
    open_ones.append(connection)
    while len(open_ones) > 200:
        with contextlib.suppress(IndexError):
            open_ones.popleft().close()
    return "left open"


def _get(port: int, draw: random.Random) -> bytes:
    path = draw.choice(["/", "/model", "/script.js", "/style.css", f"/test/{draw.randrange(500)}"])
    return f"GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode()


def _request_line(port: int, draw: random.Random) -> bytes:
    line = draw.choice([
        b"GET", b"GET /", b"GET  / HTTP/1.1", b"GET / HTTP/9.9", b"GET / HTTP/1.1 x", b"get / HTTP/1.1",
        b"\xff\xfe / HTTP/1.1",
        b"GET http://[ HTTP/1.1", b"GET http://[::1]:x/ HTTP/1.1", b"GET //// HTTP/1.1", b"GET * HTTP/1.1",
        b"GET ? HTTP/1.1",
        b"GET /%00 HTTP/1.1", b"GET /%ff%fe HTTP/1.1", b"GET /\x00 HTTP/1.1", b"GET /../../etc/passwd HTTP/1.1",
        b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1", b"GET /test/" + b"9" * draw.choice([10, 5000]) + b" HTTP/1.1",
        b"GET /" + b"a" * draw.choice([100, 10_000, 20_000]) + b" HTTP/1.1", b"", b" ", b"\r\n\r\n", b"GET / HTTP/",
        b"GET\t/\tHTTP/1.1",
        b"GET /?" + bytes(draw.choices(range(33, 256), k=50)) + b" HTTP/1.1",
    ])  # fmt: skip
    return line + f"\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()


def _method(port: int, draw: random.Random) -> bytes:
    methods = ["HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "PROPFIND", "X" * 300, "POST", "GET",
               "!#$%"]  # fmt: skip
    path = draw.choice(["/", "/classify", "/model", "/test/1", "/nothing", "*"])
    return f"{draw.choice(methods)} {path} HTTP/1.{draw.choice('01')}\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()


def _headers(port: int, draw: random.Random) -> bytes:
    lines = [
        b"no colon", b": no name", b"A" * 5000 + b": x", b"X: " + b"y" * 5000, b"X: \x00\x01", b"X : y", b" folded",
        b"X:\xff\xfe",
        b"Range: bytes=" + draw.choice([b"0-5", b"5-1", b"-", b"a-b", b"0-0,2-3", b"99999999-", b"-9" * 50]),
        b"If-Modified-Since: " + draw.choice([b"never", b"Thu, 01 Jan 1970 00:00:00 GMT",
        b"Mon, 99 Foo 99999 99:99:99 GMT", b"\xe9"]),
        b"If-None-Match: " + draw.choice([b"*", b'"x"', b"\xe9"]), b"Cookie: a=b; \xff; =;",
        b"Expect: " + draw.choice([b"100-continue", b"x"]),
        b"Connection: " + draw.choice([b"keep-alive", b"close", b"upgrade", b"\xe9"]), b"X-Forwarded-Host: example.org",
        b"X-Forwarded-For: 1, \xff", b"Forwarded: for=x;host=y", b"Content-Type: multipart/form-data; boundary=\xff",
        b"Accept-Encoding: gzip;q=\xe9",
        b"Authorization: Basic !!!", b"Upgrade: h2c",
        b"Origin: " + draw.choice([b"null", b"http://example.org", b"\xe9"]), b"X\r: y", b"X: a\rb",
    ]  # fmt: skip
    chosen = b"\r\n".join(draw.choices(lines, k=draw.choice([1, 2, 5, 200])))
    return draw.choice([b"GET /", b"GET /style.css", b"POST /classify"]) + (
        b" HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%s\r\n\r\n" % (port, chosen)
    )


def _host(port: int, draw: random.Random) -> bytes:
    hosts = ["", "example.org", f"example.org:{port}", "127.0.0.1", f"127.0.0.1:{port}:{port}", f"[::1]:{port}",
               "a" * 4000, "\xe9",
             f"127.0.0.1:{port}, example.org", f"127.0.0.1:{port}\r\nHost: example.org", "localhost:99999999999", "@",
             "\x00"]  # fmt: skip
    host = draw.choice(hosts)
    lines = f"Host: {host}\r\n" if draw.random() < 0.9 else ""
    return f"GET {draw.choice(['/', '/model'])} HTTP/1.{draw.choice('01')}\r\n{lines}\r\n".encode("latin-1")


def _query(port: int, draw: random.Random) -> bytes:
    queries = ["saliency", "saliency=1", "saliency&saliency", "saliency=%ff%00", "%73aliency", "=&=", "%", "saliency;x",
               "?", "a=b&" * 3000, "saliency" * 500, "\xe9=\xff", "saliency#x"]  # fmt: skip
    query = draw.choice(queries[:5] if draw.random() < 0.5 else queries)
    if draw.random() < 0.5:
        return _post(port, GOOD, f"/classify?{query}")
    return f"GET /test/{draw.randrange(400)}?{query} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode("latin-1")


def _secrets(port: int, draw: random.Random) -> bytes:
    """Cookies and tokens that are not those of the server."""
    values = ["", "x", "=", "=" * 5000, "\xe9", '"', "a" * 43, "a" * 12_000, "None", "\t", "x; " * 3000, "\x00"]
    name = draw.choice([f"session-{port}", "session-1", "", "=", "\xff", ";"])
    lines = "".join(f"Cookie: {name}={value}\r\n" for value in draw.choices(values, k=draw.choice([0, 1, 1, 3])))
    paths = ["/", "/?token", "/?token=", "/?token=None", f"/?token={'a' * 43}", f"/?token={'a' * 9000}", "/?token=%ff",
             "/?token=\xff", "/model?token=", "//?token=", "/?"]  # fmt: skip
    first = f"{draw.choice(['GET', 'GET', 'HEAD', 'POST'])} {draw.choice(paths)} HTTP/1.1"
    return f"{first}\r\nHost: 127.0.0.1:{port}\r\n{lines}\r\n".encode("latin-1")


def _length(port: int, draw: random.Random) -> bytes:
    lengths = ["-1", "+5", "abc", "5, 5", "5\r\nContent-Length: 6", "0x10", "1e3", "", " ", "9" * 20, "9" * 5000,
               "5.0", "٣", "1 1",
               str(len(GOOD) - 1), str(len(GOOD) + 1), "1048576", "1048577"]  # fmt: skip
    head = f"POST /classify HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {draw.choice(lengths)}\r\n\r\n"
    return head.encode() + GOOD


def _chunked(port: int, draw: random.Random) -> bytes:
    size = b"%x" % len(GOOD)
    bodies = [
        size + b"\r\n" + GOOD + b"\r\n0\r\n\r\n", size + b";x=y\r\n" + GOOD + b"\r\n0\r\nT: r\r\n\r\n", b"zz\r\n\r\n",
        b"-1\r\n\r\n", b"\r\n\r\n",
        b"f" * 20 + b"\r\n" + GOOD, b"1\r\nab\r\n0\r\n\r\n", size + b"\n" + GOOD + b"\n0\n\n", b"0" * 20_000,
        size + b"\r\n" + GOOD, b"0x5\r\nhello\r\n",
        b"1\r\na\r\n" * 2000 + b"0\r\n\r\n", b"5;" + b"e" * 20_000 + b"\r\nhello\r\n0\r\n\r\n",
        b"0\r\n" + b"T: r\r\n" * 5000 + b"\r\n",
    ]  # fmt: skip
    others = ["gzip", "gzip, chunked", "chunked, chunked", "identity", "\x0bchunked", "chunked\r\nContent-Length: 3"]
    head = f"POST /classify HTTP/1.{draw.choice('1110')}\r\nHost: 127.0.0.1:{port}\r\nTransfer-Encoding: "
    return head.encode() + draw.choice(["chunked"] * 5 + others).encode() + b"\r\n\r\n" + draw.choice(bodies)


NUMBERS = ["0.5", "1e400", "-1e400", "NaN", "Infinity", "1" + "0" * 400, "1" * 5000, "null", "true", '"0.5"', '"x"',
"[]",
           "{}", "-0.0", "1e-320"]  # fmt: skip
STROKES = ["[]", "[[]]", "[[0.1,0.2]]", "[0.1]", "0", "{}", '"ab"', "null", "[[[1,2]]]"]
TEXTS = ["", " ", "null", "3", '"strokes"', "\x00", '{"strokes"', '{"strokes": [[[0.5, 0.5]]]}x', "\ufeff{}"]


def _json(port: int, draw: random.Random) -> bytes:
    number, strokes = draw.choice(NUMBERS), ",".join(draw.choices(STROKES, k=6))
    points = [[[draw.random(), draw.random()] for _ in range(draw.randrange(200))] for _ in range(draw.randrange(9))]
    bodies: list[Callable[[], str]] = [
        lambda: f'{{"strokes": [[[{number}, {draw.choice(NUMBERS)}]]]}}',
        lambda: f'{{"strokes": [{strokes}]}}',
        lambda: f'{{"strokes": {number}}}',
        lambda: "[" * draw.choice([10, 1000, 100_000]),
        lambda: '{"strokes":' * draw.choice([10, 1000, 50_000]),
        lambda: f'{{"strokes": [{"[]," * draw.choice([10, 19_998, 20_001, 300_000])}[]]}}',
        lambda: f'{{"strokes": [[{"[0.1,0.9]," * draw.choice([10, 1000, 19_999, 20_000, 90_000])}[0.5,0.5]]]}}',
        lambda: f'{{"strokes": [{"[" * 70 + "]" * 70}]}}',
        lambda: '{"strokes": [[[0.5, 0.5]]], "strokes": 3}',
        lambda: json.dumps({"strokes": points}),
        lambda: draw.choice(TEXTS),
    ]
    body = draw.choice(bodies)()
    return _post(port, body.encode(draw.choice(["utf-8", "utf-8", "utf-8", "utf-16", "utf-32"])))


def _mutated(port: int, draw: random.Random) -> bytes:
    request = bytearray(draw.choice([_post(port, GOOD), _get(port, draw)]))
    for _ in range(draw.choice([1, 2, 5, 30])):
        place = draw.randrange(len(request))
        change = draw.randrange(4)
        if change == 0:
            request[place] = draw.randrange(256)
        elif change == 1:
            del request[place : place + draw.choice([1, 1, 10])]
        elif change == 2:
            request[place:place] = bytes(draw.choices(range(256), k=draw.choice([1, 5])))
        else:
            request[place:place] = draw.choice([b"\r\n", b"\n", b"\r", b"\0", b":", b" ", b"\r\n\r\n"])
        if not request:
            break
    return bytes(request)


#: Kinds that may lack their end, which the client then declares by closing its side.
INCOMPLETE = {"truncated", "huge header", "huge body", "mutated", "mutated again", "chunked", "length", "binary"}
KINDS: dict[str, Callable[[int, random.Random], bytes]] = {
    "correct": _get,
    "request line": _request_line,
    "method": _method,
    "headers": _headers,
    "host": _host,
    "query": _query,
    "secrets": _secrets,
    "length": _length,
    "chunked": _chunked,
    "json": _json,
    "json again": _json,
    "mutated": _mutated,
    "mutated again": _mutated,
    "binary": lambda port, draw: draw.randbytes(draw.choice([1, 10, 1000, 100_000])),
    "binary body": lambda port, draw: _post(port, draw.randbytes(draw.choice([1, 100, 10_000, 1_000_000]))),
    "huge header": lambda port, draw: b"GET / HTTP/1.1\r\nX: " + b"a" * draw.choice([16_000, 17_000, 1_000_000]),
    "huge body": lambda port, draw: _post(port, b"1" * draw.choice([2**20, 2**20 + 1, 3 * 2**20])),
    "pipelined": lambda port, draw: _get(port, draw) * draw.choice([2, 100, 300]),
    "truncated": lambda port, draw: _post(port, GOOD)[: draw.randrange(1, 100)],
    "half open": lambda port, draw: _post(port, GOOD),
    "trickle": lambda port, draw: _post(port, GOOD),
    "no reading": _get,
}
