"""Faults, on a real server: a clear answer, nothing lost, and full service after."""

import itertools
import random
import re
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import (
    CONFIG,
    INTERNAL_ERROR,
    OTHER,
    REMEDY,
    UNREADABLE,
    URL,
    Server,
    StartServer,
    close_database,
    create_credential,
    file_size_limit,
    forget_last_use,
    locked,
    on_both,
    rounds,
    start_postgresql,
)
from flask import Flask
from flask.testing import FlaskClient

from database import StorageError, transaction
from encryption import KeyFile


class Write(NamedTuple):
    """A PUT: what it set, when it was sent, and when it was acknowledged, if it was."""

    number: int
    sent: float
    acknowledged: float | None


def numbered(number: int) -> dict[str, str]:
    """Return a configuration whose two fields have the same number."""
    return {"provider": f"p{number}", "api_key": f"key-number-{number:08}"}


def read_number(server: Server, credential: str) -> int:
    """Return the number of the configuration that is stored; its fields must not be mixed."""
    data = server.get(credential).body["data"]
    number = int(data["provider"][1:])
    assert data["api_key"][-4:] == f"{number:08}"[-4:]
    return number


def write_until_the_end(
    server: Server,
    credential: str,
    numbers: Iterator[int],
    acknowledged: threading.Semaphore,
) -> list[Write]:
    """Send one PUT after the other until the server ends; return them all."""
    writes = []
    for number in numbers:
        sent = time.monotonic()
        try:
            answer = server.put(numbered(number), credential)
        except (OSError, HTTPException):
            writes.append(Write(number, sent, None))
            break
        assert answer.status == 200
        writes.append(Write(number, sent, time.monotonic()))
        acknowledged.release()
    return writes


def stop_under_load(
    server: Server, credential: str, numbers: Iterator[int], count: int, signal_number: int
) -> list[Write]:
    """Have four clients write, and stop the server after so many acknowledged writes."""
    acknowledged = threading.Semaphore(0)
    arguments = (server, credential, numbers, acknowledged)
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(write_until_the_end, *arguments) for _ in range(4)]
        try:
            for _ in range(count):
                assert acknowledged.acquire(timeout=30)
        finally:
            server.stop(signal_number)
    return [write for client in clients for write in client.result()]


def lost_writes(writes: list[Write], stored: Write) -> list[Write]:
    """Return what was acknowledged, and sent only after the stored write was acknowledged.

    Of writes at the same time, any may be the last. But of two writes of which one began after
    the other was acknowledged, the earlier must not be the one that is left.
    """
    if stored.acknowledged is None:  # it may have been the last
        return []
    return [write for write in writes if write.acknowledged and write.sent > stored.acknowledged]


def assert_nothing_lost(writes: list[Write], server: Server, credential: str) -> None:
    by_number = {write.number: write for write in writes}
    stored = by_number[read_number(server, credential)]
    assert lost_writes(writes, stored) == []


@on_both
def test_killed_server_loses_no_acknowledged_write(
    start_server: StartServer, credential: str, tmp_path: Path, database_url: str
) -> None:
    numbers, counts = itertools.count(), random.Random(1)
    server = start_server()
    for _ in range(rounds()):
        count = counts.randint(1, 40)
        writes = stop_under_load(server, credential, numbers, count, signal.SIGKILL)
        server = start_server()
        assert_nothing_lost(writes, server, credential)
        if database_url.startswith("sqlite"):
            with closing(sqlite3.connect(tmp_path / "ai-provider.db")) as database:
                assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@on_both
def test_restart_under_load_loses_no_acknowledged_write(
    start_server: StartServer, credential: str, number: int
) -> None:
    server = start_server()
    writes = stop_under_load(server, credential, itertools.count(), 20, number)
    assert server.process.poll() == 0
    assert_nothing_lost(writes, start_server(), credential)


@pytest.mark.parametrize("processes", [1, 2])
@on_both
def test_many_clients_write_at_once_without_an_error(
    start_server: StartServer, credential: str, processes: int
) -> None:
    servers = [start_server() for _ in range(processes)]

    def put(number: int) -> int:
        return servers[number % processes].put(numbered(number), credential).status

    with ThreadPoolExecutor(64) as pool:
        statuses = pool.map(put, range(319))
        assert servers[0].request("GET", "/health").status == 200
        assert {*statuses} == {200}
    assert read_number(servers[0], credential) in range(319)
    assert put(319) == 200
    assert [read_number(server, credential) for server in servers] == [319] * processes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@on_both
def test_stop_lets_the_request_in_work_be_answered(
    server: Server, credential: str, database_url: str, number: int
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with locked(database_url):
            answer = pool.submit(server.put, CONFIG, credential)
            server.wait_for("Last use not recorded")  # it is at work, and waits
            server.process.send_signal(number)
            server.process.send_signal(signal.SIGTERM)
        assert answer.result().status == 200
        assert server.process.wait(30) == 0
    assert "Traceback" not in server.stop()


@on_both
def test_waiting_writes_do_not_keep_reads_out(
    server: Server, credential: str, database_url: str
) -> None:
    server.put(CONFIG, credential)
    with ThreadPoolExecutor(20) as pool, locked(database_url):
        started = time.monotonic()
        answers = [pool.submit(server.put, OTHER, credential) for _ in range(20)]
        assert server.request("GET", "/health").status == 200
        assert server.get(credential).status == 200
        assert time.monotonic() - started < 5  # many waits, one after the other, take longer
        assert {answer.result().status for answer in answers} == {500}


@on_both
def test_locked_database_is_an_error_after_a_bounded_wait(
    server: Server, credential: str, database_url: str
) -> None:
    server.put(CONFIG, credential)
    before = server.get(credential).body
    with locked(database_url):
        answer = server.put(OTHER, credential)
        assert (answer.status, answer.body) == (500, INTERNAL_ERROR)
        assert server.get(credential).body == before
        assert server.request("GET", "/health").status == 200
    assert server.put(OTHER, credential).status == 200
    forget_last_use(database_url)
    with ThreadPoolExecutor(1) as pool:
        with locked(database_url):
            put = pool.submit(server.put, CONFIG, credential)
            wait([put], timeout=0.3)  # for the lock, again in patience
        assert put.result().status == 200
    causes = ("database is locked", "canceling statement due to lock timeout")
    log = server.stop()
    assert any(f"ERROR Database error: {cause}. {REMEDY}" in log for cause in causes)


@on_both
def test_service_starts_while_the_database_is_locked(
    start_server: StartServer, credential: str, database_url: str
) -> None:
    with locked(database_url):
        assert start_server().get(credential).status == 404


def test_record_of_the_last_use_waits_for_nobody(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str], database_url: str
) -> None:
    with locked(database_url):
        assert client.get(URL, headers=auth_headers).status_code == 404
    connection = app.extensions["database_file"].connection
    assert connection.execute("PRAGMA busy_timeout").fetchone() == (10,)


def test_lock_of_long_ago_takes_no_patience_away(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str], database_url: str
) -> None:
    client.get(URL, headers=auth_headers)
    app.extensions["waiting_since"] = time.monotonic() - 3
    with ThreadPoolExecutor(1) as pool:
        with locked(database_url):
            put = pool.submit(client.put, URL, json=CONFIG, headers=auth_headers)
            wait([put], timeout=0.3)
        assert put.result().status_code == 200


def test_record_of_the_last_use_takes_no_patience_away(
    client: FlaskClient,
    auth_headers: dict[str, str],
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with locked(database_url):
        client.get(URL, headers=auth_headers)
    monkeypatch.setattr("database.monotonic", lambda: time.monotonic() + 1.5)
    with ThreadPoolExecutor(1) as pool:
        with locked(database_url):
            put = pool.submit(client.put, URL, json=CONFIG, headers=auth_headers)
            wait([put], timeout=0.3)
        assert put.result().status_code == 200


def fail_after_the_connection(app: Flask) -> None:
    with app.app_context(), transaction():
        app.extensions["database_file"].connection.close()
        raise ValueError("first")


def test_failed_rollback_does_not_hide_the_first_error(app: Flask) -> None:
    with pytest.raises(ValueError, match="first"):
        fail_after_the_connection(app)


def test_restart_of_postgresql_fails_only_the_requests_in_work(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, testrun_uid: str
) -> None:
    with start_postgresql(f"{testrun_uid}-restarted") as postgresql:
        monkeypatch.setenv("DATABASE_URL", postgresql.get_uri())
        credential = create_credential()
        server = start_server()
        restarted = threading.Event()

        def write_until_restarted() -> set[int]:
            """Return the statuses; the request sent after the restart must succeed."""
            statuses = set()
            while not restarted.is_set():
                statuses.add(server.put(OTHER, credential).status)
            assert server.put(OTHER, credential).status == 200
            return statuses

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(write_until_restarted) for _ in range(4)]
            try:
                server.wait_for("Provider set")
                postgresql.stop()
                server.wait_for("ERROR Database error")
                postgresql.start()
            finally:
                restarted.set()
        assert set[int]().union(*(client.result() for client in clients)) == {200, 500}


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
def test_lost_database_is_an_error_until_it_returns(
    start_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fault: Callable[[Path], Callable[[], object]],
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{folder}/ai-provider.db")
    credential = create_credential()
    server = start_server()
    server.put(CONFIG, credential)
    before = server.get(credential).body
    restore = fault(folder)
    for answer in (server.put(OTHER, credential), server.get(credential)):
        assert (answer.status, answer.body) == (500, INTERNAL_ERROR)
    assert server.request("GET", "/health").status == 503
    restore()
    assert server.request("GET", "/health").status == 200
    assert server.get(credential).body == before
    assert server.put(OTHER, credential).status == 200
    log = server.stop()
    path = folder / "ai-provider.db"
    cause = f"(no database in {path}|{path} is unusable)"
    assert (
        len(re.findall(rf"ERROR DATABASE_URL: {cause}\. .*[Ss]ee Back up in README\.\n", log)) == 3
    )
    assert start_server().get(credential).body["data"]["provider"] == "other"


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
    client.put(URL, json=CONFIG, headers=auth_headers)
    before = client.get(URL, headers=auth_headers).json
    app.extensions["database_file"].connect().execute(f"PRAGMA {pragma}")
    large = {"provider": "other", "api_key": "x" * 4096}
    answer = client.put(URL, json=large, headers=auth_headers)
    assert (answer.status_code, answer.json) == (500, INTERNAL_ERROR)
    assert caplog.messages[-1] == f"Database error: {cause}. {REMEDY}"
    assert client.get(URL, headers=auth_headers).json == before
    assert client.get("/health").status_code == 200
    close_database(app)
    assert client.put(URL, json=large, headers=auth_headers).status_code == 200


def test_key_file_removed_amid_a_start_is_one_clear_line(
    app: Flask, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = KeyFile.read

    def read_and_remove(file: KeyFile) -> None:
        read(file)
        key_file.unlink()

    monkeypatch.setattr(KeyFile, "read", read_and_remove)
    with app.app_context(), pytest.raises(StorageError) as error:
        KeyFile().prepare()
    assert str(error.value) == f"ENCRYPTION_KEY_FILE: {key_file}: No such file or directory."


def test_service_recovers_from_failing_writes(
    server: Server, credential: str, key_file: Path
) -> None:
    server.put(CONFIG, credential)
    before = server.get(credential).body
    pid = server.process.pid
    assert pid
    large = {"provider": "other", "api_key": "x" * 4096}
    with file_size_limit(0, pid):
        assert server.put(large, credential).status == 500
        assert server.get(credential).body == before
        key_file.rename(key_file.with_name("away"))
        assert server.put(large, credential).status == 500
        assert not key_file.exists()
        key_file.with_name("away").rename(key_file)
    assert server.put(large, credential).status == 200
    log = server.stop()
    assert "Traceback" not in log
    assert " ERROR ENCRYPTION_KEY_FILE: File too large.\n" in log


@pytest.mark.parametrize("content", [None, b"", b"garbage"], ids=["gone", "empty", "garbled"])
@on_both
def test_lost_key_file_is_an_error_until_it_returns(
    server: Server, credential: str, key_file: Path, tmp_path: Path, content: bytes | None
) -> None:
    server.put(CONFIG, credential)
    before = server.get(credential).body
    shutil.move(key_file, tmp_path / "away")
    if content is not None:
        key_file.write_bytes(content)
        answer = server.put(OTHER, credential)
        assert (answer.status, answer.body) == (500, UNREADABLE)
    answer = server.get(credential)
    assert (answer.status, answer.body) == (500, UNREADABLE)
    shutil.move(tmp_path / "away", key_file)
    assert server.get(credential).body == before
    assert f"ERROR ENCRYPTION_KEY_FILE: {key_file}: " in server.stop()


@on_both
def test_one_put_mends_the_loss_of_the_key(
    start_server: StartServer, credential: str, key_file: Path
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    server.stop()
    key_file.unlink()
    server = start_server()
    answer = server.get(credential)
    assert (answer.status, answer.body) == (500, UNREADABLE)
    assert not key_file.exists()
    assert server.put(OTHER, credential).status == 200
    assert key_file.stat().st_mode == 0o100600
    assert server.get(credential).body["data"]["provider"] == "other"


def test_key_file_is_whole_or_absent_on_a_full_disk(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str], key_file: Path
) -> None:
    key_file.unlink()
    app.config["ENCRYPTION_KEY_FILE"] = Path("/dev/full/encryption.key")
    answer = client.put(URL, json=CONFIG, headers=auth_headers)
    assert (answer.status_code, answer.json) == (500, INTERNAL_ERROR)
    app.config["ENCRYPTION_KEY_FILE"] = key_file
    assert client.put(URL, json=CONFIG, headers=auth_headers).status_code == 200
