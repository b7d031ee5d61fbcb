"""The database: engine, tables, statements, the SQLite file, and storage errors."""

import fcntl
import os
import sqlite3
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from click import ClickException
from flask import Flask, current_app, g
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.sql.selectable import ExecutableReturnsRows as Statement


class StorageError(ClickException):
    """A fault of the database or the key file; the message names the remedy."""


class Base(DeclarativeBase):
    """The metadata of the tables."""


# Autocommit: each statement is atomic by itself, and none reads before it writes in one
# transaction, which fails with SQLite's BUSY_SNAPSHOT.
db = SQLAlchemy(
    model_class=Base, engine_options={"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None}
)


def engine_settings(database_url: str) -> dict[str, Any]:
    """Return Flask-SQLAlchemy's settings; raise ClickException for another kind of database."""
    try:
        url = sa.make_url(database_url)
    except (sa.exc.ArgumentError, ValueError):
        url = sa.URL.create("none")
    no_file = url.host or url.query or url.database in {None, "", ":memory:"}
    # A lock is waited for at most 2 seconds, twice in a PUT: a stop takes less than 5.
    if url.drivername in {"postgres", "postgresql", "postgresql+psycopg"}:
        session = f"-c lock_timeout=2s {url.query.get('options', '')}"
        limits = {"connect_timeout": "2", "tcp_user_timeout": "4000", "options": session}
        url = url.set(drivername="postgresql+psycopg").update_query_dict(limits)
        options: dict[str, Any] = {"pool_pre_ping": True}  # the server may have been restarted
    elif url.drivername == "sqlite" and not no_file:
        url = url.update_query_dict({"timeout": "2"})
        options = {"paramstyle": "named"}
    else:
        raise ClickException("DATABASE_URL must be sqlite:/// and a file's path, or postgresql://.")
    return {"SQLALCHEMY_DATABASE_URI": url, "SQLALCHEMY_ENGINE_OPTIONS": options}


def init_app(app: Flask) -> None:
    """Create what is missing of the database; raise StorageError if that fails."""
    os.umask(0o077)  # with which SQLite creates its files: they are their owner's alone
    try:
        with suppress(OSError):  # it is there, or not needed
            Path(app.instance_path).mkdir()
        db.init_app(app)
    except ImportError as error:
        raise StorageError("PostgreSQL needs: .venv/bin/pip install 'psycopg[binary]'") from error
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}.") from error
    app.teardown_appcontext(_close_connection)
    with app.app_context():
        _create_tables()


def _create_tables() -> None:
    # One process at a time: create_all looks first, and creates then.
    if db.engine.dialect.name == "postgresql":
        with db.engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(5741)))  # any number
            Base.metadata.create_all(connection)
        return
    path = Path(str(db.engine.url.database))
    with locked(path.parent):
        if not path.exists():
            path.touch()
            current_app.logger.warning("Created database %s.", path)
        with db.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            Base.metadata.create_all(connection)
    current_app.extensions["database_file"] = DatabaseFile(path)


@sa.event.listens_for(sa.Engine, "connect")
def _synchronize_commits(connection: DBAPIConnection, _record: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        # Each commit is on disk before it is acknowledged.
        connection.execute("PRAGMA synchronous = FULL")


@sa.event.listens_for(sa.Engine, "handle_error")
def _replace_error(context: ExceptionContext) -> None:
    if not context.is_pre_ping:  # which only asks for another connection
        raise _database_error(context.original_exception)


def _database_error(cause: object) -> StorageError:
    first_line = str(cause).partition("\n")[0]  # PostgreSQL's others may show the row
    return StorageError(
        f"Database error: {first_line}. Check that the database of DATABASE_URL is there, intact,"
        " writable, not locked, and has disk space."
    )


class DatabaseFile:
    """The SQLite file under watch: SQLite would go on acknowledging writes to a deleted one."""

    def __init__(self, path: Path) -> None:
        """Open it for good: to close it would drop the locks that SQLite has on it."""
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)

    def check(self) -> None:
        """Raise StorageError if it is gone or overwritten; switch to the one in its place."""
        try:
            if not os.path.samestat(self.path.stat(), os.fstat(self.descriptor)):
                db.engine.dispose()
                self.descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise _database_error(f"{self.path}: {error.strerror}") from error
        if os.pread(self.descriptor, 16, 0) != b"SQLite format 3\0":
            raise _database_error(f"{self.path}: not an SQLite database")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder; raise StorageError for an OSError."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
            os.fsync(descriptor)  # what was linked or renamed in it
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"{error.filename or folder}: {error.strerror}.") from error


@lru_cache
def _compile_statement(statement: Statement, dialect: sa.Dialect) -> tuple[str, Any, Any]:
    compiled = statement.compile(dialect=dialect)
    columns = [str(column.key) for column in statement.exported_columns]
    return compiled.string, compiled.params, namedtuple("Row", columns)


def execute(statement: Statement, **parameters: object) -> list[Any]:
    """Return the rows of a statement, run on the one connection of this request or command."""
    engine = db.engine
    sql, defaults, row_type = _compile_statement(statement, engine.dialect)
    try:
        if "connection" not in g:
            if database_file := current_app.extensions.get("database_file"):
                database_file.check()
            g.connection = engine.raw_connection()
        # The driver's own cursor: execution by SQLAlchemy costs as much as all the rest.
        cursor = g.connection.cursor()
        cursor.execute(sql, defaults | parameters)
        if cursor.description is None:
            return []
        return [*map(row_type._make, cursor.fetchall())]  # to the end: no read is left open
    except engine.dialect.loaded_dbapi.Error as error:
        raise _database_error(error) from error


def _close_connection(_error: BaseException | None) -> None:
    if connection := g.pop("connection", None):
        connection.close()
