"""The database: engine, statements, transactions, the watch over SQLite's file, its errors."""

import fcntl
import os
import sqlite3
from collections import namedtuple
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import RLock
from time import monotonic, sleep, time, time_ns
from typing import Any

import click
import sqlalchemy as sa
from flask import Flask, current_app, g
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase


class StorageError(click.ClickException):
    """A fault in what is stored; the message is for the operator, `public` for clients."""

    public = "What is stored cannot be read or written. The log names the cause."


class Base(DeclarativeBase):
    """The tables. An instance is a copy of a row; `execute` writes."""


db = SQLAlchemy(model_class=Base)
# How a transaction keeps other writers out, after waiting for at most {} milliseconds.
BEGIN = {
    "sqlite": ["PRAGMA busy_timeout = {}", "BEGIN IMMEDIATE"],
    "postgresql": ["BEGIN; SET LOCAL lock_timeout = {}; LOCK provider_config IN EXCLUSIVE MODE"],
}
lock = RLock()  # the development server has several threads


def init_app(app: Flask) -> None:
    """Attach the database, and create nothing."""
    try:
        db.init_app(app)
    except ImportError as error:
        raise StorageError("PostgreSQL needs: .venv/bin/pip install 'psycopg[binary]'") from error
    url = app.config["SQLALCHEMY_ENGINE_OPTIONS"]["url"]
    if url.drivername == "sqlite":
        app.extensions["database_file"] = database_file = DatabaseFile(app, Path(url.database))
        if context := click.get_current_context(silent=True):
            context.call_on_close(database_file.close)


@contextmanager
def storage_errors(prefix: str = "") -> Iterator[None]:
    """Raise StorageError for an error of the database or, with this prefix, of a file."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{prefix}{explain(error)}") from error
    except (sa.exc.DBAPIError, db.engine.dialect.loaded_dbapi.Error, UnicodeError) as error:
        cause = str(getattr(error, "orig", error)).partition("\n")[0]  # others may show the row
        raise StorageError(f"Database error: {cause}. Check DATABASE_URL, locks, disk.") from error


def explain(error: OSError) -> str:
    """Return the fault and, where access is denied, who owns the file and who asks for it."""
    fault = f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    if not error.filename or not isinstance(error, PermissionError):
        return fault
    path = Path(os.path.realpath(error.filename))
    place = next(each for each in (path, *path.parents) if os.path.lexists(each))
    status = place.lstat()
    owner = f"{place} belongs to user {status.st_uid}, mode {status.st_mode & 0o777:o}"
    return f"{fault} {owner}; this process runs as user {os.geteuid()}."


@dataclass(eq=False)
class DatabaseFile:
    """The SQLite file under watch: SQLite would go on writing to files that were removed."""

    app: Flask
    path: Path
    _opened: list[int] = field(default_factory=list, init=False)  # the _state of what is open

    def connect(self) -> sqlite3.Connection:
        """Return a connection to the files that are in place now."""
        if self._opened and self._state() == self._opened:
            return self.connection
        if not self.path.is_file() or not self.path.stat().st_size:
            with suppress(FileNotFoundError, NotADirectoryError):
                self.path.stat()  # raises PermissionError, which is_file hides since Python 3.14
            hint = "A start creates a missing one. If it is empty or lost, see Back up in README."
            raise StorageError(f"DATABASE_URL: no database in {self.path}. {hint}")
        with self.alone():
            is_ours = self._opened and self._close()
            self._target = self.path.resolve()
            self._wal, self._shm = (Path(f"{self._target}{end}") for end in ("-wal", "-shm"))
            inode, kept = self.path.stat().st_ino, [] if is_ours else self._require_wal()
            try:
                can_write = self._open(inode)
                present = self._state()
                # Otherwise one connection may have a removed or replaced file, the other a new one.
                if [inode, *kept] == present[2:]:
                    # 0, which no file has, stands for one that was removed or can only be read.
                    self._opened = [*present, 0, 0][:5] if can_write else [0]
                    return self.connection
            finally:  # others would mistake a file that was made here for the one that was removed
                for path, before in zip((self._wal, self._shm), kept, strict=False):
                    if path.exists() and path.lstat().st_ino != before:
                        path.unlink()
        return self.connect()

    def confirm(self) -> None:
        """Raise OperationalError if a restart would not show what was committed."""
        present = self._state()
        if present[1:] != self._opened[1:]:
            raise sqlite3.OperationalError("its files were removed or replaced")
        self._opened = present  # another process may have saved the -wal

    def save(self) -> None:
        """Write the -wal into the database, if nothing is in the way; empty it at rest."""
        with suppress(StorageError, sqlite3.Error, OSError):  # a request tells of them
            self.connect()
            with self.alone(tries=1):  # or what another process has saved would seem our own
                self.confirm()
                is_at_rest = abs(time() - self._wal.stat().st_mtime) >= 5  # growing anew is slow
                self._checkpoint("TRUNCATE" if is_at_rest else "RESTART")

    @contextmanager
    def alone(self, tries: int = 40) -> Iterator[None]:
        """Keep others from opening or closing: they would remove what this process makes."""
        folder = os.open(Path(os.path.realpath(self.path)).parent, os.O_RDONLY)
        try:
            for _ in range(tries):
                with suppress(BlockingIOError):
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                sleep(0.05)
            else:
                raise StorageError(f"Another program locks the folder of {self.path}.")
            yield
        finally:
            os.close(folder)

    def _require_wal(self) -> list[int]:
        # Only while it is closed: closing this file would end the locks of SQLite.
        with self.path.open("r+b") as file, suppress(BlockingIOError):
            if file.read(16) != b"SQLite format 3\0":  # SQLite would write the -wal into any file
                raise StorageError(f"DATABASE_URL: {self.path} is unusable. See Back up in README.")
            # Return the inodes of both; none if nobody has the bytes locked that all users lock.
            with suppress(FileNotFoundError):
                return [self._wal.lstat().st_ino, self._shm.lstat().st_ino]
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)
            return []
        raise StorageError(f"{self.path} is in use without -wal or -shm. Try again in 2 seconds.")

    def close(self) -> None:
        """Close, after saving what only the -wal has; raise StorageError."""
        if self._opened:
            with self.app.app_context(), storage_errors(), self.alone():
                self._close()

    def _close(self) -> bool:
        # Return whether the database is as this process left it; save first what only the -wal has.
        present = self._state()
        is_ours = present[:3] == self._opened[:3]
        if is_ours or (not present and self._opened[1:]):  # away, it may come back
            fault = self._checkpoint("TRUNCATE" if present else "RESTART")  # which keeps the -wal
            if is_ours and present[3:] != self._opened[3:]:
                if fault:
                    raise sqlite3.OperationalError(f"{self.path}-wal is not saved: {fault}")
                self._wal.unlink(missing_ok=True)
                self._shm.unlink(missing_ok=True)
                os.utime(self.path)  # or another process would save the same -wal again
            self._reader.close()
        # The last to close writes the -wal into the database, unless it only reads.
        self.connection.close()
        self._reader.close()
        self._opened = []
        return is_ours

    def _checkpoint(self, mode: str) -> str:
        # Write the -wal into the database; return why not all is there, if so.
        try:
            self.connection.execute("PRAGMA busy_timeout = 100")
            [(busy, pages, saved)] = self.connection.execute(f"PRAGMA wal_checkpoint({mode})")
            fault = "" if not busy or 0 <= pages == saved else "others read it"
        except sqlite3.Error as error:  # the -wal keeps all
            fault = str(error)
        with suppress(OSError):
            is_young = abs(time_ns() - self._opened[0]) < 10**8  # Linux < 6.13: one time for 4 ms
            if is_young or self._state()[:1] != self._opened[:1]:  # the time tells whose it is
                os.utime(self.path, ns=(self._opened[0] if fault else time_ns(),) * 2)
        self._opened[:1] = self._state()[:1] or self._opened[:1]  # it may be away, and come back
        return fault

    def _open(self, inode: int) -> bool:
        if not self._wal.exists():
            # Only a writer rolls a journal back; a reader leaves a -wal that nobody can write to.
            select = sa.table("provider_config", sa.column("id")).select()  # fails if not ours
            with self.path.open("r+b"), closing(self._connect("rw")) as writer:
                writer.executescript(f"EXPLAIN {select}; PRAGMA journal_mode = WAL")
        self.connection: sqlite3.Connection = self._connect("rw")
        self._reader, self._opened = self._connect("ro"), [0]  # closed even if what follows fails
        if self.path.stat().st_ino != inode:  # the -wal beside it is not its own
            raise sqlite3.OperationalError("its files were removed or replaced")
        # To read, first: the last to close would write the -wal even into a damaged database.
        self._reader.executescript("PRAGMA user_version")
        self.connection.executescript("PRAGMA synchronous = FULL; PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA wal_autocheckpoint = 0")  # its fault would go unnoticed
        try:
            self.connection.executescript("BEGIN IMMEDIATE; PRAGMA user_version = 0")
        except sqlite3.OperationalError as error:
            return "readonly" not in str(error)  # SQLite falls back to reading
        finally:
            self.connection.rollback()
        return True

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"{self.path.as_uri()}?mode={mode}"
        return sqlite3.connect(uri, uri=True, timeout=0.1, check_same_thread=False)

    def _state(self) -> list[int]:
        # Time and device of the database, and the inode of each file, up to the first missing one.
        state: list[int] = []
        with suppress(FileNotFoundError, NotADirectoryError):
            database = self.path.stat()
            state += [database.st_mtime_ns, database.st_dev, database.st_ino]
            if os.path.samestat(self._target.lstat(), database):  # or its -wal is elsewhere
                state.append(self._wal.lstat().st_ino)
                state.append(self._shm.lstat().st_ino)
        return state


@lru_cache
def _compile_statement(statement: sa.ReturnsRows, dialect: sa.Dialect) -> tuple[str, Any, Any]:
    compiled = statement.compile(dialect=dialect)
    return compiled.string, compiled.params, namedtuple("Row", statement.exported_columns.keys())


def execute(statement: sa.ReturnsRows, **parameters: object) -> list[Any]:
    """Return the rows of a statement, in a transaction if it writes; raise StorageError."""
    sql, defaults, row_type = _compile_statement(statement, db.engine.dialect)
    with storage_errors(), lock:
        # Not by SQLAlchemy, which costs as much as all the rest; so no column's default applies.
        rows = _connection().execute(sql, defaults | parameters)
        return [*map(row_type._make, rows)] if row_type._fields else []


@contextmanager
def transaction(patience: float = 1) -> Iterator[None]:
    """Keep other writers out, after waiting at most `patience` seconds; raise StorageError."""
    extensions = current_app.extensions
    with storage_errors(), lock:
        connection, now = _connection(), monotonic()
        # Requests that find the database locked wait together, not one after the other.
        if patience and now - extensions.setdefault("waiting_since", now) > 2:
            extensions["waiting_since"] = now
        milliseconds = round((extensions.get("waiting_since", now) + patience - now) * 1000)
        try:
            for sql in BEGIN[db.engine.name]:
                connection.execute(sql.format(max(10, milliseconds)))
            extensions.pop("waiting_since", None)
            yield
            connection.commit()
        finally:
            with suppress(Exception):  # or its error would hide the first
                connection.rollback()  # of what is not committed
        if database_file := extensions.get("database_file"):
            database_file.confirm()


def _connection() -> Any:  # noqa: ANN401
    # One for a request or command; SQLite's files are looked at once for it.
    if (connection := g.get("connection")) is None:
        file = current_app.extensions.get("database_file")
        connection = g.connection = file.connect() if file else db.session.connection().connection
    return connection
