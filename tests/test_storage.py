import errno
import os
import re
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from conftest import (
    CONFIG,
    INTERNAL_ERROR,
    KEY_REMEDY,
    OTHER_ENCRYPTION_KEY,
    REMEDY,
    UNREADABLE,
    URL,
    StartApp,
    StartServer,
    close_database,
    create_credential,
    file_size_limit,
    flask,
    locked,
    on_both,
    stored,
)
from cryptography.fernet import Fernet
from flask import Flask
from flask.testing import FlaskClient

import encryption
from database import StorageError, db, execute, transaction
from models import Credential, ProviderConfig, create_missing


@pytest.mark.parametrize(("pragma", "value"), [("journal_mode", "wal"), ("synchronous", 2)])
def test_commits_are_on_disk_when_acknowledged(app: Flask, pragma: str, value: object) -> None:
    connection = app.extensions["database_file"].connect()
    assert connection.execute(f"PRAGMA {pragma}").fetchone() == (value,)


@pytest.mark.parametrize("second", [0, 1, 2])
@on_both
def test_table_refuses_a_second_configuration(app: Flask, second: int) -> None:
    insert = sa.insert(ProviderConfig)
    row = {"provider": "p", "api_key_encrypted": "k", "updated_at": "t", "updated_by": "b"}
    with app.app_context():
        with transaction():
            execute(insert, id=1, **row)
        with transaction(), pytest.raises(StorageError, match="constraint"):
            execute(insert, id=second, **row)


def test_secret_is_stored_as_digest_only(app: Flask, tmp_path: Path) -> None:
    with app.app_context():
        secret = Credential.issue("name").partition(":")[2].encode()
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(files) == 4
    assert not [content for content in files if secret in content]
    assert [content for content in files if sha256(secret).hexdigest().encode() in content]


KEY_FILES = {"gone": None, "empty": b"", "garbled": b"garbage", "other": OTHER_ENCRYPTION_KEY}


@pytest.mark.parametrize("content", KEY_FILES.values(), ids=KEY_FILES)
@on_both
def test_get_without_the_right_key_says_so_and_what_to_do(
    client: FlaskClient,
    auth_headers: dict[str, str],
    key_file: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes | None,
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    key = key_file.read_bytes()
    key_file.unlink() if content is None else key_file.write_bytes(content)
    answer = client.get(URL, headers=auth_headers)
    assert (answer.status_code, answer.json) == (500, UNREADABLE)
    assert str(key_file) in caplog.messages[-1]
    key_file.write_bytes(key)
    assert client.get(URL, headers=auth_headers).status_code == 200


def test_other_keys_within_the_same_time_are_read(
    app: Flask, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def stat_before_linux_6_13(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        times = {"st_ctime": 1000.0, "st_ctime_ns": 0}
        return os.stat_result(stat(path, follow_symlinks=follow_symlinks)[:10], times)

    monkeypatch.setattr(Path, "stat", stat_before_linux_6_13)
    monkeypatch.setattr("encryption.time", lambda: 1000.0)
    token = Fernet(OTHER_ENCRYPTION_KEY).encrypt(b"text")
    keys = encryption.KeyFile()
    with app.app_context():
        keys.read()
        key_file.write_bytes(OTHER_ENCRYPTION_KEY)
        monkeypatch.setattr("encryption.time", lambda: 1001.0)
        assert keys.read().decrypt(token) == b"text"


@on_both
def test_put_replaces_what_another_key_encrypted(
    client: FlaskClient, auth_headers: dict[str, str], key_file: Path
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    key_file.write_bytes(OTHER_ENCRYPTION_KEY)
    assert client.get(URL, headers=auth_headers).status_code == 500
    assert client.put(URL, json=CONFIG, headers=auth_headers).status_code == 200
    assert client.get(URL, headers=auth_headers).status_code == 200


@on_both
def test_damaged_row_is_an_unreadable_key(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    with app.app_context(), transaction():
        execute(sa.update(ProviderConfig).values(api_key_encrypted="é"))
    answer = client.get(URL, headers=auth_headers)
    assert (answer.status_code, answer.json) == (500, UNREADABLE)
    assert client.get("/health").status_code == 503


def test_row_that_damage_left_without_a_key_is_an_unreadable_key(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str], tmp_path: Path
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    close_database(app)
    column = "api_key_encrypted VARCHAR"
    permit = f"sql = replace(sql, '{column} NOT NULL', '{column}')"
    scripts = [
        f"PRAGMA writable_schema = 1; UPDATE sqlite_master SET {permit}",
        "UPDATE provider_config SET api_key_encrypted = NULL",
    ]
    for script in scripts:
        with closing(sqlite3.connect(tmp_path / "ai-provider.db")) as database:
            database.executescript(script)
    answer = client.get(URL, headers=auth_headers)
    assert (answer.status_code, answer.json) == (500, UNREADABLE)


def test_link_to_the_key_file_is_followed_where_it_leads_now(
    start_server: StartServer, tmp_path: Path
) -> None:
    place, other, link = tmp_path / "place", tmp_path / "other", tmp_path / "link"
    place.mkdir()
    link.symlink_to(place)
    settings = {"ENCRYPTION_KEY_FILE": f"{link}/encryption.key"}
    credential = create_credential(**settings)
    server = start_server(**settings)
    server.put(CONFIG, credential)
    before = server.get(credential)
    place.rename(other)
    link.unlink()
    link.symlink_to(other)
    assert server.get(credential).body == before.body
    assert flask("provider", "rotate-key", **settings)[0] == 0
    assert server.get(credential).body == before.body
    assert server.put(CONFIG, credential).status == 200
    assert not place.exists()


@on_both
def test_newest_key_encrypts_and_older_ones_decrypt(
    client: FlaskClient, auth_headers: dict[str, str], key_file: Path
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    key_file.write_bytes(OTHER_ENCRYPTION_KEY + key_file.read_bytes())
    assert client.get(URL, headers=auth_headers).status_code == 200
    client.put(URL, json=CONFIG, headers=auth_headers)
    key_file.write_bytes(OTHER_ENCRYPTION_KEY)
    assert client.get(URL, headers=auth_headers).status_code == 200


def test_put_writes_nothing_where_the_key_file_is(
    start_app: Callable[[], Flask], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    monkeypatch.setenv("ENCRYPTION_KEY_FILE", f"{folder}/encryption.key")
    app = start_app()
    before = folder.stat().st_mtime_ns
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    assert folder.stat().st_mtime_ns == before


def test_key_file_is_generated_over_no_other(app: Flask, key_file: Path) -> None:
    before = key_file.read_bytes()
    with app.app_context():
        encryption.key_file.create()
    assert key_file.read_bytes() == before
    assert [*key_file.parent.glob("encryption*")] == [key_file]


@on_both
def test_one_process_at_a_time_generates_the_key_file(
    app: Flask, key_file: Path, database_url: str
) -> None:
    key_file.unlink()
    with locked(database_url), app.app_context(), pytest.raises(StorageError, match="lock"):
        create_missing()
    assert not key_file.exists()


def test_key_file_that_is_put_back_meanwhile_is_not_replaced(
    app: Flask, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put_back_and_generate() -> bytes:
        key_file.with_name("away").rename(key_file)
        return OTHER_ENCRYPTION_KEY

    before = key_file.read_bytes()
    key_file.rename(key_file.with_name("away"))
    monkeypatch.setattr(Fernet, "generate_key", put_back_and_generate)
    with app.app_context(), pytest.raises(StorageError, match="File exists"):
        encryption.key_file.create()
    assert key_file.read_bytes() == before


@on_both
def test_servers_that_start_at_once_share_one_key_and_one_configuration(
    start_server: StartServer, key_file: Path, start_app: Callable[[], Flask]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        servers = [*pool.map(lambda _: start_server(), range(8))]
        credential = create_credential()
        answers = pool.map(lambda server: server.put(CONFIG, credential), servers)
        assert {answer.status for answer in answers} == {200}
    assert len(key_file.read_bytes().split()) == 1
    log = "".join(server.stop() for server in servers)
    assert log.count("Generated encryption key file") == 1
    with start_app().app_context():
        assert execute(sa.select(ProviderConfig.id)) == [(1,)]


def test_safety_of_commits_does_not_depend_on_how_sqlite_was_built(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:  # noqa: ANN401
        connection: sqlite3.Connection = sqlite3_connect(*arguments, **options)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    sqlite3_connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    close_database(app)
    connection = app.extensions["database_file"].connect()
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_threads_of_the_development_server_take_turns(
    app: Flask, auth_headers: dict[str, str]
) -> None:
    def put(_number: int) -> int:
        return app.test_client().put(URL, json=CONFIG, headers=auth_headers).status_code

    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(put, range(100))} == {200}


@on_both
def test_database_of_a_later_version_is_read_and_written(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    with app.app_context(), db.engine.begin() as connection:
        for table in ("credential", "provider_config"):
            column = "later TEXT NOT NULL DEFAULT 'x'"
            connection.execute(sa.text(f"ALTER TABLE {table} ADD COLUMN {column}"))
    for method in (client.get, client.delete):
        assert method(URL, headers=auth_headers).status_code == 200
    assert client.put(URL, json=CONFIG, headers=auth_headers).status_code == 200
    assert flask("credentials", "create")[0] == 0


def test_revoke_and_clear_use_no_returning(app: Flask, credential: str) -> None:
    statements: list[str] = []
    with app.app_context():
        app.extensions["database_file"].connect().set_trace_callback(statements.append)
        assert Credential.revoke(credential[:32])
        ProviderConfig.put("openai", "key", "author")
        assert ProviderConfig.clear() == "openai"
    assert len(statements) > 9
    assert not [statement for statement in statements if "RETURNING" in statement]


def drop_tables(app: Flask) -> None:
    with app.app_context():
        db.drop_all()


@on_both
def test_database_failure_is_500_never_401(
    app: Flask,
    client: FlaskClient,
    auth_headers: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    drop_tables(app)
    answer = client.put(URL, json=CONFIG, headers=auth_headers)
    assert answer.status_code == 500
    assert answer.get_json()["error_type"] == "GeneralException"
    assert "credential" not in answer.text
    assert caplog.messages[-1] in {
        f"Database error: {cause}. {REMEDY}"
        for cause in ("no such table: credential", 'relation "credential" does not exist')
    }


@on_both
def test_database_failure_is_a_503_of_health(app: Flask, client: FlaskClient) -> None:
    drop_tables(app)
    answer = client.get("/health")
    assert (answer.status_code, answer.json) == (503, INTERNAL_ERROR)


@on_both
def test_unreadable_key_is_a_503_of_health_until_a_put(
    client: FlaskClient, auth_headers: dict[str, str], key_file: Path
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    key_file.unlink()
    answer = client.get("/health")
    assert (answer.status_code, answer.json) == (503, UNREADABLE)
    client.put(URL, json=CONFIG, headers=auth_headers)
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("content", [None, OTHER_ENCRYPTION_KEY], ids=["gone", "other"])
@on_both
def test_unreadable_key_is_an_error_in_the_log_of_the_start(
    start_server: StartServer, credential: str, key_file: Path, content: bytes | None
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    server.stop()
    key_file.unlink()
    if content:
        key_file.write_bytes(content)
    server = start_server()
    assert server.request("GET", "/health").status == 503
    error = re.escape(f" ERROR ENCRYPTION_KEY_FILE: {key_file}: ") + ".*" + re.escape(KEY_REMEDY)
    assert re.search(error, server.stop())


def test_creation_that_fails_leaves_no_database(
    start_app: StartApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_source: object, _target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        with pytest.raises(StorageError, match="No space left on device"):
            start_app()
    assert [*tmp_path.iterdir()] == []
    start_app()


def test_database_that_another_process_creates_meanwhile_is_kept(
    start_app: StartApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def link_second(source: str, target: Path) -> None:
        if target.name == "ai-provider.db":
            link(source, target)
        link(source, target)

    link = os.link
    monkeypatch.setattr(os, "link", link_second)
    app = start_app()
    assert "Created database" not in caplog.text
    assert app.test_client().get("/health").status_code == 200


def test_name_of_the_database_may_have_what_is_special_in_a_uri(tmp_path: Path) -> None:
    assert flask("credentials", "create", DATABASE_URL=f"sqlite:///{tmp_path}/a#b.db")[0] == 0
    assert (tmp_path / "a#b.db").exists()


def test_full_disk_keeps_no_service_from_its_start(app: Flask) -> None:
    with file_size_limit(0), app.app_context():
        create_missing()


def test_created_files_are_logged_once(start_server: StartServer, key_file: Path) -> None:
    created = [
        f"WARNING Created database {key_file.with_name('ai-provider.db')}.",
        f"WARNING Generated encryption key file {key_file}.",
    ]
    log = start_server().stop()
    assert [log.count(line) for line in created] == [1, 1]
    log = start_server().stop()
    assert [log.count(line) for line in created] == [0, 0]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_one_process_at_a_time_creates_the_tables(app: Flask, database_url: str) -> None:
    def look(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "CREATE TABLE" in statement:
            with psycopg.connect(database_url) as other:
                free.append(other.execute("SELECT pg_try_advisory_xact_lock(5741)").fetchone())

    free: list[object] = []
    with app.app_context():
        db.drop_all()
        sa.event.listen(db.engine, "before_cursor_execute", look)
        create_missing()
    assert free == [(False,), (False,)]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_postgresql_of_any_encoding_is_served(
    database_url: str, monkeypatch: pytest.MonkeyPatch, start_app: StartApp
) -> None:
    name = f"ascii{os.getpid()}"
    with psycopg.connect(database_url, autocommit=True) as connection:
        encoding = "ENCODING SQL_ASCII LOCALE 'C' TEMPLATE template0"
        connection.execute(sa.text(f"CREATE DATABASE {name} {encoding}").text)
    url = sa.make_url(database_url).set(database=name)
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    app = start_app()
    with app.app_context():
        Credential.issue("für")
        assert [credential.name for credential in Credential.all()] == ["für"]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_postgresql_acknowledges_only_what_is_on_disk(app: Flask, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("ALTER ROLE ALL SET synchronous_commit = off")
    setting = sa.select(sa.func.current_setting("synchronous_commit").label("value"))
    with app.app_context():
        db.engine.dispose()
        assert execute(setting) == [("on",)]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_options_in_the_address_of_postgresql_are_kept(
    database_url: str, monkeypatch: pytest.MonkeyPatch, start_app: StartApp
) -> None:
    url = sa.make_url(database_url).update_query_dict({"options": "-c statement_timeout=7s"})
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    setting = sa.select(sa.func.current_setting("statement_timeout").label("value"))
    with start_app().app_context():
        assert execute(setting) == [("7s",)]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_column_that_gets_another_type_is_no_error(app: Flask, database_url: str) -> None:
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    for _ in range(10):  # psycopg would have prepared the statement by then
        before = stored(app)
    with psycopg.connect(database_url) as connection:
        connection.execute("ALTER TABLE provider_config ALTER provider TYPE varchar(140)")
    assert before
    assert stored(app) == before


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_connections_to_postgresql_have_short_timeouts(app: Flask) -> None:
    with app.app_context():
        connection = db.session.connection().connection.driver_connection
        assert connection
        parameters = connection.info.get_parameters()
    names = ("connect_timeout", "tcp_user_timeout", "keepalives_idle", "keepalives_interval")
    assert [parameters[name] for name in names] == ["2", "4000", "2", "2"]
