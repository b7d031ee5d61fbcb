"""What the service says of a setting that it cannot start with: one clear line."""

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from click import ClickException
from conftest import (
    CONFIG,
    INTERNAL_ERROR,
    KEY_REMEDY,
    REMEDY,
    URL,
    Server,
    StartApp,
    StartServer,
    close_database,
    create_credential,
    failure,
    flask,
)
from cryptography.fernet import Fernet
from flask import Flask
from flask.testing import FlaskClient
from processes import execute_command_without, run, serve, serve_as_nobody, without_privileges

from app import _parse_address, create_app
from database import StorageError, explain
from encryption import KeyFile
from models import ProviderConfig, create_missing

BAD_DATABASE_URL = (
    "DATABASE_URL must be sqlite:/// and a file's path, or postgresql:// and an address, in which"
    " the special characters of a password are percent-encoded: %40 for @."
)
BAD_DATABASE_URLS = [
    "nonsense",
    "sqlite://",
    "sqlite:///",
    "sqlite:///:memory:",
    "sqlite://two/slashes",
    "sqlite:///ai-provider.db?mode=ro",
    "sqlite:///ai?provider.db",
    "oracle://u:SECRET@h/d",
    "postgresql://user:p@SECRET@127.0.0.1:1/db",
    "postgresql://user:p@SECRET/x@127.0.0.1:1/db",
    "postgresql://127.0.0.1:SECRET/db",
]
DATABASE_URLS = {
    "nonsense": BAD_DATABASE_URL,
    "sqlite:////nowhere/x.db": (
        "DATABASE_URL: no database in /nowhere/x.db."
        " A start creates a missing one. If it is empty or lost, see Back up in README."
    ),
    "postgresql://user:SECRET@127.0.0.1:1/db": (
        'Database error: connection failed: connection to server at "127.0.0.1", port 1'
        f" failed: Connection refused. {REMEDY}"
    ),
}


@pytest.mark.parametrize("url", BAD_DATABASE_URLS)
def test_bad_database_url_is_refused_with_its_rule(url: str) -> None:
    with pytest.raises(ClickException) as raised:
        create_app({"DATABASE_URL": url})
    assert raised.value.message == BAD_DATABASE_URL


@pytest.mark.parametrize(("url", "message"), DATABASE_URLS.items(), ids=DATABASE_URLS)
def test_bad_database_url_is_one_clear_line(url: str, message: str) -> None:
    assert flask("credentials", "list", DATABASE_URL=url) == (1, "", f"Error: {message}\n")


def test_host_name_that_cannot_be_is_one_clear_line() -> None:
    url = "postgresql://user:SECRET@a..b/db"
    for status, shown, error in (
        run(serve, DATABASE_URL=url),
        flask("provider", "show", DATABASE_URL=url),
    ):
        assert (status, shown, error.count("\n")) == (1, "", 1)
        assert error.startswith("Error: Database error: ")
        assert "SECRET" not in error


NO_SETTING = "Unknown name, or not NAME=value."
RULES = {
    "AI_PROVIDERS": "Must be names of 1 to 30 characters in printable ASCII, separated by commas.",
    "DATABASE_URL": "Must not be empty. Leave it out for the default.",
    "ENCRYPTION_KEY_FILE": "Must not be empty. Leave it out for the default.",
    "LISTEN": "Must be host:port, such as 127.0.0.1:8080 or [::1]:8080.",
    "LOG_LEVEL": "Must be one of: DEBUG, INFO, WARNING, ERROR.",
    "TRUSTED_PROXY": "Not a valid IP address.",
}
BAD_SETTINGS = [
    *[
        ("LISTEN", value)
        for value in (
            "8080",
            "localhost",
            "127.0.0.1:",
            "x:-1",
            "a b:1",
            "::1:8080",
            "127.0.0.1:65536",
        )
    ],
    *[("LOG_LEVEL", value) for value in ("LOUD", "info", "WARNING ")],
    *[
        ("TRUSTED_PROXY", value)
        for value in ("localhost", "nginx", "10.0.0.0/8", "*", "127.0.0.1:80")
    ],
    ("AI_PROVIDERS", " , "),
    ("AI_PROVIDERS", "openai,\n my " + "x" * 28),
    ("AI_PROVIDERS", "openai\nanthropic"),
    ("AI_PROVIDERS", "my\xa0own"),
    ("AI_PROVIDERS", "openai,\udcff"),
]


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
def test_bad_setting_is_refused_with_its_rule(name: str, value: str) -> None:
    with pytest.raises(ClickException) as raised:
        create_app({name: value})
    assert raised.value.message == f"{name}: {RULES[name]}"


@pytest.mark.parametrize("name", RULES)
def test_empty_setting_is_one_clear_line(name: str) -> None:
    assert run(serve, **{name: ""}) == (1, "", f"Error: {name}: {RULES[name]}\n")


def test_name_that_is_not_resolved_is_one_clear_line() -> None:
    status, output, log = run(serve, LISTEN="nowhere.invalid:80")
    assert (status, output) == (1, "")
    assert log.splitlines()[-1].startswith("Error: LISTEN=nowhere.invalid:80 cannot be served: ")
    assert "Traceback" not in log


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR"])
def test_level_of_the_log_is_accepted(level: str) -> None:
    create_credential()
    assert flask("credentials", "list", LOG_LEVEL=level)[0] == 0


ADDRESSES = Path("/proc/net/if_inet6")


@pytest.mark.skipif(
    not ADDRESSES.exists() or f"{1:032} " not in ADDRESSES.read_text(),
    reason="this machine has IPv6 switched off",
)
def test_address_that_is_printed_is_served(start_server: StartServer) -> None:
    server = start_server(LISTEN="[::1]:0")
    assert server.host == "::1"
    assert server.request("GET", "/health").status == 200


def test_port_taken_is_one_clear_line(start_server: StartServer) -> None:
    listen = f"127.0.0.1:{start_server().port}"
    assert run(serve, LISTEN=listen) == (
        1,
        "",
        f"Error: LISTEN={listen} cannot be served: [Errno 98] Address already in use\n",
    )


@pytest.mark.parametrize("content", [b"", b"\n", b"garbage\n"], ids=["empty", "line", "garbage"])
def test_unusable_key_file_is_one_clear_line(key_file: Path, content: bytes) -> None:
    key_file.write_bytes(content)
    status, output, log = run(serve)
    assert (status, output) == (1, "")
    assert "Traceback" not in log
    assert log.endswith(
        f"\nError: ENCRYPTION_KEY_FILE: {key_file}: not one Fernet key per line. {KEY_REMEDY}\n"
    )
    assert key_file.read_bytes() == content


def loop(path: Path) -> None:
    path.symlink_to(path)


KINDS = {loop: "Too many levels", os.mkfifo: "must name a regular file", Path.mkdir: "must name"}


@pytest.mark.parametrize(("make", "rule"), KINDS.items(), ids=["loop", "FIFO", "folder"])
def test_key_file_of_another_kind_is_one_clear_line(
    key_file: Path, make: Callable[[Path], object], rule: str
) -> None:
    make(key_file)
    status, output, log = run(serve)
    assert (status, output) == (1, "")
    line = log.splitlines()[-1]
    assert line.startswith("Error: ENCRYPTION_KEY_FILE")
    assert rule in line
    assert "Traceback" not in log
    assert os.path.lexists(key_file)


@pytest.mark.parametrize("make", KINDS, ids=["loop", "FIFO", "folder"])
def test_key_file_that_becomes_another_kind_is_an_error_until_it_returns(
    server: Server, credential: str, key_file: Path, make: Callable[[Path], object]
) -> None:
    server.put(CONFIG, credential)
    key_file.rename(key_file.with_name("away"))
    make(key_file)
    answer = server.get(credential)
    assert (answer.status, answer.body) == (500, INTERNAL_ERROR)
    key_file.rmdir() if key_file.is_dir() else key_file.unlink()
    key_file.with_name("away").rename(key_file)
    assert server.get(credential).status == 200


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o602, 0o644, 0o666])
def test_key_file_that_others_can_access_is_a_warning(
    start_server: StartServer, key_file: Path, mode: int
) -> None:
    start_server().stop()
    key_file.chmod(mode)
    log = start_server().stop()
    assert f"WARNING Others can access keys. Run: chmod 600 {key_file}\n" in log


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_key_file_that_others_cannot_access_is_no_warning(
    start_server: StartServer, key_file: Path, mode: int
) -> None:
    start_server().stop()
    key_file.chmod(mode)
    assert "WARNING" not in start_server().stop()


def test_missing_driver_for_postgresql_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://localhost/db")
    message = "Error: PostgreSQL needs: .venv/bin/pip install 'psycopg[binary]'\n"
    list_command = ("psycopg", "credentials", "list")
    assert run(execute_command_without, *list_command) == (1, "", message)


def test_postgresql_that_does_not_answer_is_an_error_after_a_bounded_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://127.0.0.1:{silent.getsockname()[1]}/db"
        status, output, log = flask("provider", "show", DATABASE_URL=url)
    assert (status, output) == (1, "")
    assert log.startswith("Error: Database error: connection timeout expired. ")


def test_log_level_hides_what_is_below_it() -> None:
    create_credential()
    status, _, log = flask("credentials", "list", LOG_LEVEL="ERROR")
    assert (status, log) == (0, "")


def test_folder_that_cannot_be_created_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    instance = tmp_path / "instance"
    instance.symlink_to("missing/folder")
    monkeypatch.setattr("app.ROOT", tmp_path)
    monkeypatch.delenv("DATABASE_URL")
    app = create_app()
    with (
        app.app_context(),
        pytest.raises(StorageError, match=f"^DATABASE_URL: {tmp_path}/missing: No such file"),
    ):
        create_missing()


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("missing/key", "missing: No such file or directory"),
        ("k" * 300, f"{'k' * 300}.new: File name too long"),
    ],
    ids=["missing folder", "long name"],
)
def test_impossible_path_of_the_key_file_is_one_clear_line(
    tmp_path: Path, path: str, fault: str
) -> None:
    status, output, log = flask("credentials", "create", ENCRYPTION_KEY_FILE=f"{tmp_path}/{path}")
    assert (status, output) == (1, "")
    error = f"Error: ENCRYPTION_KEY_FILE: {tmp_path}/{fault}."
    assert log.splitlines()[1:] == [error]


def test_default_address_is_local(monkeypatch: pytest.MonkeyPatch, start_app: StartApp) -> None:
    monkeypatch.delenv("LISTEN")
    assert start_app().config["LISTEN"] == "127.0.0.1:8080"


def test_folder_of_the_key_file_is_created(
    monkeypatch: pytest.MonkeyPatch, start_app: StartApp, tmp_path: Path
) -> None:
    monkeypatch.setattr("app.ROOT", tmp_path)
    monkeypatch.delenv("ENCRYPTION_KEY_FILE")
    start_app()
    assert (tmp_path / "instance").stat().st_mode == 0o40700
    assert (tmp_path / "instance" / "encryption.key").exists()


def test_unreadable_file_of_settings_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASK_SKIP_DOTENV")
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        Path(folder, ".env").touch(0)
        monkeypatch.setattr("app.ROOT", Path(folder))
        owner = Path(folder).stat().st_uid
        with without_privileges(), pytest.raises(ClickException) as raised:
            create_app()
        user = 65534 if owner == 0 else owner
        assert raised.value.message == (
            f"{folder}/.env: Permission denied. {folder}/.env belongs to user {owner}, mode 0;"
            f" this process runs as user {user}."
        )


def test_configuration_of_the_caller_wins(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    settings = {"DATABASE_URL": f"sqlite:///{other}", "AI_PROVIDERS": "a, b"}
    app = create_app({**settings, "MAX_CONTENT_LENGTH": 1})
    with app.app_context():
        create_missing()
    close_database(app)
    assert other.exists()
    assert app.config["AI_PROVIDERS"] == ["a", "b"]
    assert app.config["MAX_CONTENT_LENGTH"] == 1


def test_configuration_of_the_caller_is_checked() -> None:
    with pytest.raises(ClickException, match=r"^LISTEN: Must be host:port, such as "):
        create_app({"LISTEN": "8080"})


@pytest.fixture
def file_of_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("FLASK_SKIP_DOTENV")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("app.ROOT", tmp_path)
    return tmp_path / ".env"


def test_setting_is_read_from_the_file_as_it_stands(file_of_settings: Path) -> None:
    file_of_settings.write_text("# Settings\n\nLOG_LEVEL=ERROR\nAI_PROVIDERS=a${b}c\n")
    app = create_app()
    assert (app.config["LOG_LEVEL"], app.config["AI_PROVIDERS"]) == ("ERROR", ["a${b}c"])


def test_file_of_settings_is_not_taken_for_missing(
    file_of_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_of_settings.write_text("LOG_LEVEL=ERROR\n")
    monkeypatch.setattr("os.path.isfile", lambda _: False)  # which is how it tells of any fault
    assert create_app().config["LOG_LEVEL"] == "ERROR"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"LOG_LEVEL=INFO\nLISTEN: 127.0.0.1:8081\n", f":2: {NO_SETTING}"),
        (b'LISTEN="127.0.0.1:8081\n', f":1: {NO_SETTING}"),
        (b"LISTEN\n", f":1: {NO_SETTING}"),
        (b"postgresql://user:SECRET@host/db?a=b\n", f":1: {NO_SETTING}"),
        (b"LOG_LEVEL=INFO\n\nAI_PROVIDER=openai\n", f":3: {NO_SETTING}"),
        (b"# f\xfcr\n", ": Must be UTF-8."),
    ],
    ids=["colon", "quote", "no value", "no name", "misspelt name", "latin-1"],
)
def test_malformed_file_of_settings_is_refused(
    file_of_settings: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    file_of_settings.write_bytes(content)
    monkeypatch.chdir("/")  # Flask would complain of the file there itself
    with pytest.raises(ClickException) as raised:
        create_app()
    assert raised.value.message == f"{file_of_settings}{message}"


def test_file_of_settings_is_not_read_if_flask_is_to_skip_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("LOG_LEVEL=ERROR\n")
    monkeypatch.setattr("app.ROOT", tmp_path)
    assert create_app().config["LOG_LEVEL"] == "INFO"


def test_file_of_another_application_does_not_concern_the_service(
    file_of_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_of_settings.write_bytes(b"LOG_LEVEL=ERROR\n# f\xfcr\n")
    monkeypatch.setattr("app.ROOT", file_of_settings.parent / "application")
    monkeypatch.setenv("LOG_LEVEL", "ERROR")
    assert create_app().config["LOG_LEVEL"] == "ERROR"


def test_file_of_another_application_does_not_concern_a_command(
    file_of_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_of_settings.write_text("LOG_LEVEL=ERROR")
    monkeypatch.setattr("app.ROOT", file_of_settings.parent / "application")
    monkeypatch.setenv("FLASK_RUN_FROM_CLI", "true")
    monkeypatch.setenv("LOG_LEVEL", "ERROR")  # as the flask command does for that file
    assert create_app().config["LOG_LEVEL"] == "INFO"


def test_denied_folder_of_the_application_names_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENCRYPTION_KEY_FILE")
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        monkeypatch.setattr("app.ROOT", Path(folder))
        with (
            create_app().app_context(),
            without_privileges(),
            pytest.raises(StorageError) as raised,
        ):
            create_missing()
        owner = Path(folder).stat().st_uid
    user = 65534 if owner == 0 else owner
    assert raised.value.message == (
        f"{folder}/instance: Permission denied. {folder} belongs to user {owner}, mode 555;"
        f" this process runs as user {user}."
    )


def test_folder_for_data_that_lies_elsewhere_is_not_needed(
    monkeypatch: pytest.MonkeyPatch, start_app: StartApp, tmp_path: Path
) -> None:
    monkeypatch.setattr("app.ROOT", tmp_path / "denied")
    start_app()
    assert {path.name for path in tmp_path.iterdir()} >= {"ai-provider.db", "encryption.key"}


@pytest.mark.parametrize("name", ["ai-provider.db", "encryption.key", ""])
def test_file_or_folder_without_permission_names_its_owner(name: str) -> None:
    with TemporaryDirectory() as folder:
        settings = {
            "DATABASE_URL": f"sqlite:///{folder}/ai-provider.db",
            "ENCRYPTION_KEY_FILE": f"{folder}/encryption.key",
        }
        create_credential(**settings)
        Path(folder).chmod(0o777)
        (Path(folder) / "ai-provider.db").chmod(0o666)
        (Path(folder) / "encryption.key").chmod(0o666)
        mode = 0o555 if name == "" else 0o000
        (Path(folder) / name).chmod(mode)
        status, output, log = run(serve_as_nobody, **settings)
        Path(folder).chmod(0o700)
    place = f"{folder}/{name}".rstrip("/")
    assert (status, output) == (1, "")
    assert (
        f"{place} belongs to user {os.geteuid()}, mode {mode:o}; this process runs as user "
        in log.splitlines()[-1]
    )
    assert "Traceback" not in log


def test_folder_of_the_key_file_need_not_be_readable() -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        key_file = Path(folder, "encryption.key")
        key_file.write_bytes(Fernet.generate_key())
        key_file.chmod(0o644)
        app = create_app({"ENCRYPTION_KEY_FILE": str(key_file)})
        with app.app_context(), without_privileges():
            token = KeyFile().encrypt("text")
            assert KeyFile().decrypt(token) == "text"


def test_folder_of_a_link_to_the_database_need_not_be_writable() -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        links = Path(folder, "links")
        links.mkdir()
        database, link = Path(folder, "ai-provider.db"), links / "link.db"
        link.symlink_to(database)
        keys = f"{folder}/encryption.key"
        app = create_app({"DATABASE_URL": f"sqlite:///{link}", "ENCRYPTION_KEY_FILE": keys})
        with app.app_context():
            create_missing()
        close_database(app)
        for file in Path(folder).glob("*.*"):
            file.chmod(0o666)
        links.chmod(0o555)
        with without_privileges(), app.app_context():
            create_missing()
            close_database(app)
        links.chmod(0o755)


def test_denied_access_to_no_file_names_no_owner() -> None:
    assert explain(PermissionError(1, "Operation not permitted")) == "Operation not permitted."


def test_key_file_in_a_closed_folder_names_its_owner() -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        keys = Path(folder, "keys")
        keys.mkdir(0o600)
        settings = {
            "DATABASE_URL": f"sqlite:///{folder}/ai-provider.db",
            "ENCRYPTION_KEY_FILE": f"{keys}/encryption.key",
        }
        status, output, log = run(serve_as_nobody, **settings)
    assert (status, output) == (1, "")
    owner = f"{keys} belongs to user {os.geteuid()}, mode 600; this process runs"
    assert owner in log.splitlines()[-1]
    assert "Traceback" not in log


def test_closed_folder_behind_a_link_names_its_owner() -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        data, link = Path(folder, "data"), Path(folder, "instance")
        data.mkdir(0o600)
        link.symlink_to(data)
        owner = f"{data} belongs to user {os.geteuid()}, mode 600; this process runs"
        app = create_app({"DATABASE_URL": f"sqlite:///{link}/ai-provider.db"})
        with app.app_context(), without_privileges(), pytest.raises(StorageError, match=owner):
            ProviderConfig.get()


FORGED = [
    "a" * 5000,
    "1.2.3.4 ERROR forged",
    "nginx",
    "1.2.3.4:ERROR",
    "[::1",
    "\u20ac",
    '"ERROR forged',
    "1.2.3.4\0",
]


@pytest.mark.parametrize("forged", FORGED, ids=range(len(FORGED)))
def test_trusted_proxy_cannot_forge_the_log(start_server: StartServer, forged: str) -> None:
    server = start_server(TRUSTED_PROXY="127.0.0.1")
    with suppress(json.JSONDecodeError):  # the server itself refuses it, in plain text
        server.request("GET", **{"X-Forwarded-For": forged.encode().decode("latin-1")})
    log = server.stop()
    assert forged[:20] not in log
    assert max(map(len, log.splitlines())) < 300
    assert "Traceback" not in log


@pytest.mark.parametrize("address", ["203.0.113.7", "2001:db8::1", "198.51.100.1, 203.0.113.7"])
def test_address_that_the_proxy_names_is_logged(start_server: StartServer, address: str) -> None:
    server = start_server(TRUSTED_PROXY="127.0.0.1")
    server.request("GET", "/health", **{"X-Forwarded-For": address})
    assert server.stop().splitlines()[-2].endswith(f" ms - {address.split()[-1]}")


def test_zone_of_an_address_is_not_logged() -> None:
    assert _parse_address("fe80::1%x ERROR forged") == "fe80::1"


def test_address_that_is_none_is_a_dash(start_server: StartServer) -> None:
    server = start_server(TRUSTED_PROXY="127.0.0.1")
    server.request("GET", "/health", **{"X-Forwarded-For": "nginx"})
    assert server.stop().splitlines()[-2].endswith(" ms - -")


def test_other_proxy_is_itself_the_client(start_server: StartServer) -> None:
    server = start_server()
    server.request("GET", "/health", **{"X-Forwarded-For": "203.0.113.7"})
    assert server.stop().splitlines()[-2].endswith(" ms - 127.0.0.1")


@pytest.fixture
def restricted(app: Flask, start_app: StartApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the allowed names of providers."""
    monkeypatch.setenv("AI_PROVIDERS", "\n openai, my own" + " " * 30 + ",\tanthropic,\n")
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
    message = "Must be one of: 'openai', 'my own', 'anthropic'."
    assert answer.status_code == 400
    assert answer.json == failure("InputException", f"provider: {message}", {"provider": [message]})
