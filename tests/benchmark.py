"""Measure the service beside the floor: the same server and disk, and nothing else.

The floor is a Flask view that does one raw SQLite upsert (PUT) or read (GET) with the
service's own database settings, without authentication, validation, encryption or log.
"""

import argparse
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PATH = "/api/v1/ai/provider"
ROUNDS = 8
SECONDS = 0.5
MANY = 100_000


class Result(NamedTuple):
    """One run: requests per second, ms of latency, ms of the processor, answers other than 200."""

    rate: float
    median: float
    p99: float
    processor: float
    errors: int


class Server:
    """A server process that logs to a file."""

    def __init__(self, name: str, folder: Path, command: list[str], token: str = "") -> None:
        self.name, self.folder, self.token = name, folder, token
        self.log = (folder / f"{name}.log").open("w+")
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=environment(folder) | {"LISTEN": "127.0.0.1:0"},
            stderr=self.log,
        )
        self.port = self.wait_for_port()
        self.run("GET", "/health", 1, 0)
        self.start_up = time.perf_counter() - started
        self.idle = self.memory()

    def wait_for_port(self) -> int:
        """Look into the log until the server listens, 30 seconds at most."""
        for _ in range(3000):
            match = re.search(
                r"Serving .*on http://127\.0\.0\.1:(\d+)", Path(self.log.name).read_text()
            )
            if match:
                return int(match[1])
            time.sleep(0.01)
        raise RuntimeError(f"{self.name} did not start")

    def memory(self) -> float:
        """Return the resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024

    def processor_time(self) -> float:
        """Return how many ms the process has computed, according to the operating system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") * 1000

    def run(self, method: str, path: str, clients: int, seconds: float) -> Result:
        """Send requests on kept-alive connections for this long, at least one each."""
        latencies: list[float] = []
        errors: list[bytes] = []

        def send() -> None:
            with socket.create_connection(("127.0.0.1", self.port)) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end = time.perf_counter() + seconds
                for number in count():
                    data = request(method, path, self.token, number)
                    sent = time.perf_counter()
                    connection.sendall(data)
                    status = receive(connection)
                    answered = time.perf_counter()
                    latencies.append((answered - sent) * 1000)
                    if status != b"200":
                        errors.append(status)
                    if answered >= end:
                        return

        threads = [threading.Thread(target=send) for _ in range(clients)]
        started, processor = time.perf_counter(), self.processor_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = len(latencies) / (time.perf_counter() - started)
        processor = (self.processor_time() - processor) / len(latencies)
        latencies.sort()
        p99 = latencies[int(len(latencies) * 0.99)]
        return Result(rate, median(latencies), p99, processor, len(errors))


def request(method: str, path: str, token: str, number: int) -> bytes:
    """Return a request whose payload differs from the one before."""
    api_key = f"sk-{number}-" + "x" * (number * 7 % 150)
    body = json.dumps({"provider": f"provider-{number % 10}", "api_key": api_key})
    header = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: token {token}\r\n"
    if method == "GET":
        return f"{header}\r\n".encode()
    header += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{header}\r\n{body}".encode()


def receive(connection: socket.socket) -> bytes:
    """Read one answer; return its status."""
    received = connection.recv(65536)
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    header, _, body = received.partition(b"\r\n\r\n")
    length = int(re.findall(rb"(?i)content-length: (\d+)", header)[0])
    while len(body) < length:
        body += connection.recv(65536)
    return header[9:12]


def serve_floor(path: str) -> None:
    """Serve the floor and a bare view with the server of the service."""
    import logging

    from flask import Flask
    from flask import request as received
    from waitress.server import create_server

    logging.basicConfig(level=logging.INFO)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE config (id INTEGER PRIMARY KEY, provider, api_key, at)")
    lock = threading.Lock()
    app = Flask(__name__)
    upsert = (
        "INSERT INTO config VALUES (1, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
        " provider = excluded.provider, api_key = excluded.api_key, at = excluded.at"
    )

    @app.put("/raw")
    def put() -> dict[str, object]:
        body = received.get_json()
        with lock:
            database.execute(upsert, (body["provider"], body["api_key"], "now"))
        return {"status": "success", "data": True}

    @app.get("/raw")
    def get() -> dict[str, object]:
        with lock:
            row = database.execute("SELECT provider, api_key, at FROM config").fetchone()
        return {"status": "success", "data": row}

    @app.get("/bare")
    @app.get("/health")
    def bare() -> dict[str, object]:
        return {"status": "success", "data": True}

    server = create_server(app, listen="127.0.0.1:0", asyncore_use_poll=True)
    server.print_listen("Serving on http://{}:{}")
    server.run()


def environment(folder: Path) -> dict[str, str]:
    """Return the settings of a service that keeps its files in this folder."""
    return os.environ | {
        "DATABASE_URL": f"sqlite:///{folder}/ai-provider.db",
        "ENCRYPTION_KEY_FILE": f"{folder}/encryption.key",
        "FLASK_SKIP_DOTENV": "1",
    }


def flask(folder: Path, *arguments: str) -> str:
    """Return what a command of the application prints."""
    command = [sys.executable, "-m", "flask", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(folder), stdout=-1, stderr=-3, text=True, check=True
    ).stdout.strip()


@contextmanager
def servers() -> Iterator[dict[str, Server]]:
    """Start the floor, and the service with 1 and with many credentials."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = []
        for name, credentials in (("1 credential", 1), (f"{MANY:,} credentials", MANY)):
            place = folder / name
            place.mkdir()
            token = flask(place, "credentials", "create")
            with closing(sqlite3.connect(place / "ai-provider.db")) as database, database:
                database.executemany(
                    "INSERT INTO credential VALUES (?, ?, NULL, '2026-01-01T00:00:00Z', NULL)",
                    ((f"{number:032}", f"{number:064}") for number in range(credentials - 1)),
                )
            started.append(Server(name, place, [str(ROOT / "app.py")], token))
        floor = [__file__, "--floor", str(folder / "floor.db")]
        started.append(Server("floor", folder, floor))
        for server in started:
            stack.callback(server.process.wait)
            stack.callback(server.process.terminate)
        yield {server.name: server for server in started}


@contextmanager
def computing(processes: int) -> Iterator[None]:
    """Have so many processes compute meanwhile, two minutes at most."""
    program = "import time\nend = time.time() + 120\nwhile time.time() < end: pass"
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def compare(cases: list[tuple[str, str, Server, str]], clients: int, beside: int) -> None:
    """Run these cases in turns, and print their medians and the ratios to the floor's."""
    results: dict[tuple[str, str], list[Result]] = {}
    with computing(beside):
        for _ in range(ROUNDS):
            for method, name, server, where in cases:
                result = server.run(method, where, clients, SECONDS)
                results.setdefault((method, name), []).append(result)
    print(f"\nClients: {clients}, processes that compute beside them: {beside}")
    line = "{:6} {:20} {:>6} {:>9} {:>7} {:>12} {:>6} | {:>10} {:>12} {:>14} {:>10}".format
    print(line("method", "server", "per s", "median ms", "p99 ms", "processor ms", "errors",
               "rate/floor", "median/floor", "processor/floor", "p99/median"))  # fmt: skip
    for (method, name), runs in results.items():
        rate, middle, p99, processor, _ = (median(values) for values in zip(*runs, strict=True))
        floor = [median(values) for values in zip(*results[method, "floor"], strict=True)]
        ratios = (rate / floor[0], middle / floor[1], processor / floor[3], p99 / middle)
        errors = sum(result.errors for result in runs)
        print(line(method, name, f"{rate:.0f}", f"{middle:.2f}", f"{p99:.2f}", f"{processor:.3f}",
                   errors, *(f"{ratio:.2f}" for ratio in ratios)))  # fmt: skip


def wait_for_lock(service: Server) -> None:
    """Print how long reads take while 20 PUTs wait for a database that is locked."""
    path = service.folder / "ai-provider.db"
    with closing(sqlite3.connect(path)) as database, ThreadPoolExecutor(1) as pool:
        database.execute("BEGIN IMMEDIATE")
        puts = pool.submit(service.run, "PUT", PATH, 20, 0)
        time.sleep(0.1)  # so that they all are there
        read, health = service.run("GET", PATH, 1, 0), service.run("GET", "/health", 1, 0)
        print(
            f"\n20 PUTs that wait for a locked database: GET {read.p99:.0f} ms, then /health"
            f" {health.p99:.0f} ms; the last PUT {puts.result().p99:.0f} ms,"
            f" {puts.result().errors} errors"
        )


def main() -> None:
    """Run everything in turns."""
    with servers() as running:
        service, many, floor = running.values()
        cases = [
            ("PUT", "floor", floor, "/raw"),
            ("PUT", service.name, service, PATH),
            ("PUT", many.name, many, PATH),
            ("GET", "floor", floor, "/raw"),
            ("GET", service.name, service, PATH),
            ("GET", many.name, many, PATH),
            ("GET", "bare Flask view", floor, "/bare"),
        ]
        for clients, beside in ((1, 0), (8, 0), (8, 2)):
            compare(cases, clients, beside)
        wait_for_lock(service)
        print()
        for server in running.values():
            print(
                f"{server.name}: {server.start_up:.2f} s to the first answer,"
                f" {server.idle:.0f} MiB idle, {server.memory():.0f} MiB after the run"
            )
        started = time.perf_counter()
        flask(service.folder, "credentials", "list")
        print(f"flask credentials list: {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--floor", metavar="PATH", help="serve the floor alone, on this database")
    path = parser.parse_args().floor
    serve_floor(path) if path else main()
