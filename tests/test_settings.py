"""What the service says of a setting that it cannot start with: one clear line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CONFIG, REMEDY, URL, StartServer, failure, flask
from flask import Flask
from flask.testing import FlaskClient
from processes import run, serve, start_interpreter

from app import create_app
from database import StorageError

BAD_DATABASE_URL = "DATABASE_URL must be sqlite:/// and a file's path, or postgresql://."
DATABASE_URLS = {
    "nonsense": BAD_DATABASE_URL,
    "sqlite://": BAD_DATABASE_URL,
    "sqlite:///": BAD_DATABASE_URL,
    "sqlite:///:memory:": BAD_DATABASE_URL,
    "sqlite://two/slashes": BAD_DATABASE_URL,
    "oracle://u:SECRET@h/d": BAD_DATABASE_URL,
    "sqlite:////nowhere/x.db": "/nowhere: No such file or directory.",
    "postgresql://user:SECRET@127.0.0.1:1/db": (
        'Database error: connection failed: connection to server at "127.0.0.1", port 1'
        f" failed: Connection refused. {REMEDY}"
    ),
}


@pytest.mark.parametrize(("url", "message"), DATABASE_URLS.items(), ids=DATABASE_URLS)
def test_bad_database_url_is_one_clear_line(url: str, message: str) -> None:
    assert flask("credentials", "list", DATABASE_URL=url) == (1, "", f"Error: {message}\n")


@pytest.mark.parametrize(
    "listen",
    ["", "8080", "localhost", "127.0.0.1:", "127.0.0.1:65536", "x:-1", "a b:1"],
)
def test_bad_listen_is_one_clear_line(listen: str) -> None:
    status, output, log = run(serve, LISTEN=listen)
    assert (status, output) == (1, "")
    assert log.splitlines()[-1] == "Error: LISTEN must be host:port."


def test_port_taken_is_one_clear_line(start_server: StartServer) -> None:
    listen = f"127.0.0.1:{start_server().port}"
    assert run(serve, LISTEN=listen) == (
        1,
        "",
        f"Error: Cannot listen on LISTEN={listen}: [Errno 98] Address already in use\n",
    )


@pytest.mark.parametrize("content", [b"", b"\n", b"garbage\n"], ids=["empty", "line", "garbage"])
def test_unusable_key_file_is_one_clear_line(key_file: Path, content: bytes) -> None:
    key_file.write_bytes(content)
    status, output, log = run(serve)
    assert (status, output) == (1, "")
    assert "Traceback" not in log
    assert log.endswith(
        f"\nError: Encryption key file {key_file}: not Fernet keys. Restore it, or remove it and"
        " PUT again.\n"
    )
    assert key_file.read_bytes() == content


def test_missing_driver_for_postgresql_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://localhost/db")
    without_driver = "import sys; sys.modules['psycopg'] = None; from flask.cli import main; main()"
    process = start_interpreter("-c", without_driver, "credentials", "list")
    assert process.communicate(timeout=60) == (
        "",
        "Error: PostgreSQL needs: .venv/bin/pip install 'psycopg[binary]'\n",
    )
    assert process.returncode == 1


def test_bad_log_level_is_one_clear_line() -> None:
    status, _, log = flask("credentials", "list", LOG_LEVEL="LOUD")
    assert (status, log) == (1, "Error: LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR.\n")


def test_log_level_hides_what_is_below_it() -> None:
    status, _, log = flask("credentials", "list", LOG_LEVEL="ERROR")
    assert (status, log) == (0, "")


def test_folder_that_cannot_be_created_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    instance = tmp_path / "instance"
    instance.symlink_to("missing/folder")
    monkeypatch.setattr("app.INSTANCE", instance)
    monkeypatch.delenv("DATABASE_URL")
    with pytest.raises(StorageError, match=f"^{instance}: File exists.$"):
        create_app()


def test_trusted_proxy_passes_on_the_address_of_the_client(start_server: StartServer) -> None:
    server = start_server(TRUSTED_PROXY="127.0.0.1")
    server.request("GET", "/health", **{"X-Forwarded-For": "203.0.113.7"})
    assert server.stop().splitlines()[-1].endswith(" ms - 203.0.113.7")


def test_other_proxy_is_itself_the_client(start_server: StartServer) -> None:
    server = start_server()
    server.request("GET", "/health", **{"X-Forwarded-For": "203.0.113.7"})
    assert server.stop().splitlines()[-1].endswith(" ms - 127.0.0.1")


@pytest.fixture
def restricted(app: Flask, start_app: Callable[[], Flask], monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the allowed names of providers."""
    monkeypatch.setenv("AI_PROVIDERS", " openai, my own ,anthropic,")
    app.config["AI_PROVIDERS"] = start_app().config["AI_PROVIDERS"]


@pytest.mark.parametrize("provider", ["openai", "my own", "anthropic"])
@pytest.mark.usefixtures("restricted")
def test_allowed_provider_is_accepted(
    client: FlaskClient, auth_headers: dict[str, str], provider: str
) -> None:
    body = CONFIG | {"provider": provider}
    assert client.put(URL, json=body, headers=auth_headers).status_code == 200


@pytest.mark.usefixtures("restricted")
def test_other_provider_is_refused_with_the_allowed_names(
    client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    answer = client.put(URL, json=CONFIG | {"provider": "OpenAI"}, headers=auth_headers)
    message = "Must be one of: openai, my own, anthropic."
    assert answer.status_code == 400
    assert answer.json == failure("InputException", f"provider: {message}", {"provider": [message]})
