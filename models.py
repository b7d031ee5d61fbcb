"""What is stored and how: tables, connections and the encryption key file."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, cast

import sqlalchemy as sa
from click import ClickException
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from flask import Flask, current_app, g
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class OperatorError(ClickException):
    """Name a fault and its remedy: commands print them as one line, views log them."""


class NotSetError(OperatorError):
    """Say that there is no configuration."""


class UnreadableKeyError(OperatorError):
    """Say that the stored API key cannot be decrypted."""


class Base(DeclarativeBase):
    """Hold the metadata of the tables."""


# Autocommit: each statement is atomic by itself, and none reads before it writes in one
# transaction, which fails with SQLite's BUSY_SNAPSHOT.
db = SQLAlchemy(
    model_class=Base, engine_options={"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None}
)


class Credential(Base):
    """An API key and the digest of its secret."""

    __tablename__ = "credential"

    api_key: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    secret_hash: Mapped[str] = mapped_column(sa.String(64))
    name: Mapped[str | None]
    created_at: Mapped[str]
    last_used_at: Mapped[str | None]


class ProviderConfig(Base):
    """The one AI provider and its encrypted API key."""

    __tablename__ = "provider_config"
    __table_args__ = (sa.CheckConstraint("id = 1", name="singleton"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    provider: Mapped[str] = mapped_column(sa.String(140))
    api_key_encrypted: Mapped[str]
    updated_at: Mapped[str]
    updated_by: Mapped[str] = mapped_column(sa.String(32))


SELECT_PROVIDER = "SELECT provider, api_key_encrypted, updated_at, updated_by FROM provider_config"
UPSERT_PROVIDER = """
    INSERT INTO provider_config (id, provider, api_key_encrypted, updated_at, updated_by)
    VALUES (1, :provider, :api_key_encrypted, :updated_at, :updated_by)
    ON CONFLICT (id) DO UPDATE SET
        provider = excluded.provider, api_key_encrypted = excluded.api_key_encrypted,
        updated_at = excluded.updated_at, updated_by = excluded.updated_by
"""


def utc_now(timespec: str = "seconds") -> str:
    """Return the time in UTC as ISO 8601, the form in which it is stored and shown."""
    return datetime.now(timezone.utc).isoformat(timespec=timespec)[:-6] + "Z"


def init_app(app: Flask) -> None:
    """Open the database and create what is missing; raise OperatorError if that fails."""
    os.umask(0o077)  # what is created is its owner's alone
    try:
        url = sa.make_url(app.config["SQLALCHEMY_DATABASE_URI"])
    except (sa.exc.ArgumentError, ValueError):
        url = sa.URL.create("none")
    in_memory = url.database in {None, "", ":memory:"}
    # A lock is waited for at most 2 seconds, twice in a PUT: a stop takes less than 5.
    if url.drivername == "sqlite" and not (url.host or url.query or in_memory):
        url = url.update_query_dict({"timeout": "2"})
        options: dict[str, Any] = {"paramstyle": "named"}
    elif url.drivername in {"postgres", "postgresql", "postgresql+psycopg"}:
        session = f"-c lock_timeout=2s {url.query.get('options', '')}"
        limits = {"connect_timeout": "2", "tcp_user_timeout": "4000", "options": session}
        url = url.set(drivername="postgresql+psycopg").update_query_dict(limits)
        options = {"pool_pre_ping": True}  # it may have been restarted
    else:
        raise OperatorError("DATABASE_URL must be sqlite:/// and a file's path, or postgresql://.")
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options
    keys = Path(app.instance_path, app.config["ENCRYPTION_KEY_FILE"])
    app.config["ENCRYPTION_KEY_FILE"] = keys.resolve()  # what a link names, a rotation replaces
    with suppress(OSError):  # it is there, or not needed
        Path(app.instance_path).mkdir()
    try:
        db.init_app(app)
    except ImportError as error:
        raise OperatorError("PostgreSQL needs: .venv/bin/pip install 'psycopg[binary]'") from error
    except OSError as error:
        raise OperatorError(f"{error.filename}: {error.strerror}.") from error
    app.teardown_appcontext(close_connection)
    with app.app_context():
        sa.event.listen(db.engine, "handle_error", raise_database_error)
        create_sqlite() if url.drivername == "sqlite" else create_postgresql()
        if not execute(SELECT_PROVIDER) and not os.path.lexists(key_file()):
            create_key_file()


def database_error(cause: object) -> OperatorError:
    """Return an error that names the cause and the remedy, no statement."""
    first_line = str(cause).partition("\n")[0]  # PostgreSQL's others may show the row
    return OperatorError(
        f"Database error: {first_line}. Check that the database of DATABASE_URL is there, intact,"
        " writable, not locked, and has disk space."
    )


def raise_database_error(context: ExceptionContext) -> None:
    """Replace the error of the database driver, unless it only asks for a reconnection."""
    if not context.is_pre_ping:
        raise database_error(context.original_exception)


class DatabaseFile:
    """Watch the SQLite file: SQLite goes on with a deleted one, acknowledging what is lost."""

    def __init__(self, path: Path) -> None:
        """Open it for good: to close it would drop the locks that SQLite has on it."""
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)

    def check(self) -> None:
        """Raise OperatorError if it is gone or overwritten; go over to a new one."""
        try:
            if not os.path.samestat(self.path.stat(), os.fstat(self.descriptor)):
                db.engine.dispose()
                self.descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise database_error(f"{self.path}: {error.strerror}") from error
        if os.pread(self.descriptor, 16, 0) != b"SQLite format 3\0":
            raise database_error(f"{self.path}: not an SQLite database")


def create_sqlite() -> None:
    """Create database and tables where missing, one process at a time."""
    path = Path(str(db.engine.url.database))
    # Each commit is on disk before it is acknowledged.
    sa.event.listen(db.engine, "connect", lambda c, _: c.execute("PRAGMA synchronous = FULL"))
    with locked(path.parent):
        if not path.exists():
            path.touch()
            current_app.logger.warning("Created database %s.", path)
        with db.engine.connect() as database:
            database.exec_driver_sql("PRAGMA journal_mode = WAL")
            Base.metadata.create_all(database)
    current_app.extensions["database_file"] = DatabaseFile(path)


def create_postgresql() -> None:
    """Create the tables where missing, one process at a time."""
    with db.engine.execution_options(isolation_level="READ COMMITTED").begin() as database:
        database.exec_driver_sql("SELECT pg_advisory_xact_lock(5741)")
        Base.metadata.create_all(database)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder; raise OperatorError for an OSError."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
            os.fsync(descriptor)  # what was linked or renamed in it
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OperatorError(f"{error.filename or folder}: {error.strerror}.") from error


def execute(statement: str, **parameters: str | None) -> list[Any]:
    """Return the rows of a statement, run on the one connection of this request or command.

    The driver's cursor runs it: execution by SQLAlchemy costs as much as all the rest.
    """
    engine = db.engine
    try:
        if "connection" not in g:
            if database_file := current_app.extensions.get("database_file"):
                database_file.check()
            g.connection = engine.raw_connection()
        cursor = g.connection.cursor()
        cursor.execute(driver_sql(statement, engine.dialect), parameters)
        # To the end, so that no read is left open.
        return cast(list[Any], cursor.fetchall()) if cursor.description else []
    except engine.dialect.loaded_dbapi.Error as error:
        raise database_error(error) from error


@lru_cache
def driver_sql(statement: str, dialect: sa.Dialect) -> str:
    """Return the statement with its parameters marked as the driver wants them."""
    return str(sa.text(statement).compile(dialect=dialect))


def close_connection(_error: BaseException | None) -> None:
    """Give the connection back to the pool."""
    if "connection" in g:
        g.pop("connection").close()


def set_provider(provider: str, api_key: str, updated_by: str) -> None:
    """Encrypt the API key and store the configuration, replacing any other."""
    if not os.path.lexists(key_file()):
        create_key_file()  # for a lost one: what that encrypted is replaced here
    execute(
        UPSERT_PROVIDER,
        provider=provider,
        api_key_encrypted=read_keys().encrypt(api_key.encode()).decode(),
        updated_at=utc_now(),
        updated_by=updated_by,
    )


def get_provider() -> tuple[str, str, str, str]:
    """Return provider, API key, and when and by whom they were set.

    Raise NotSetError or UnreadableKeyError.
    """
    for provider, api_key_encrypted, updated_at, updated_by in execute(SELECT_PROVIDER):
        return provider, decrypt(api_key_encrypted), updated_at, updated_by
    raise NotSetError("No provider is set yet.")


def decrypt(api_key_encrypted: str) -> str:
    """Return the API key; raise UnreadableKeyError."""
    try:
        return read_keys().decrypt(api_key_encrypted).decode()
    except (InvalidToken, OperatorError) as error:
        cause = str(error) or f"No key in {key_file()} encrypted it."
        current_app.logger.error("The stored API key is not readable. %s", cause)
        raise UnreadableKeyError(
            "The stored API key is not readable with the present encryption key. Restore the"
            " encryption key file, or remove it and set the provider again."
        ) from error


def clear_provider() -> None:
    """Remove the configuration; raise NotSetError."""
    if not execute("DELETE FROM provider_config RETURNING id"):
        raise NotSetError("No provider is set yet.")


def key_file() -> Path:
    """Return the path of the encryption key file."""
    return cast(Path, current_app.config["ENCRYPTION_KEY_FILE"])


def read_keys() -> MultiFernet:
    """Return the cipher of the key file: one Fernet key a line, newest first."""
    try:
        version = key_file().stat()
        return cipher(key_file(), version.st_ino, version.st_mtime_ns, version.st_size)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not Fernet keys"
        raise OperatorError(
            f"Encryption key file {key_file()}: {cause}. Restore it, or remove it and PUT again."
        ) from error


@lru_cache(maxsize=1)
def cipher(path: Path, *_version: int) -> MultiFernet:
    """Return the cipher of this version of the file; raise OSError or ValueError."""
    return MultiFernet([Fernet(key) for key in path.read_bytes().split()])


def create_key_file() -> None:
    """Generate the encryption key file, over no other."""
    with locked(key_file().parent), suppress(FileExistsError):  # another process was first
        write_key_file(Fernet.generate_key() + b"\n")
        current_app.logger.warning("Generated encryption key file %s.", key_file())


def write_key_file(keys: bytes, replaced: os.stat_result | None = None) -> None:
    """Put the key file on disk, whole or not at all, and over none but the one given."""
    path = key_file()
    with NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        try:
            file.write(keys)
            file.flush()
            os.fsync(file.fileno())
            if replaced:  # by root, perhaps, for the user who runs the service
                os.fchown(file.fileno(), replaced.st_uid, replaced.st_gid)
                os.fchmod(file.fileno(), replaced.st_mode)
                Path(file.name).replace(path)
            else:
                os.link(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)


def rotate_key() -> None:
    """Put a new key first in the key file, and encrypt the stored API key with it."""
    with locked(key_file().parent):  # of two rotations at once, one would lose its key
        read_keys()
        write_key_file(Fernet.generate_key() + b"\n" + key_file().read_bytes(), key_file().stat())
    isolation_level = db.engine.dialect.default_isolation_level
    update = sa.update(ProviderConfig).returning(ProviderConfig.api_key_encrypted)
    with db.engine.execution_options(isolation_level=isolation_level).begin() as transaction:
        # To write before reading takes the lock that keeps the row from changing between.
        stored = transaction.execute(update.values(id=1)).scalar_one_or_none()
        if stored is not None:
            token = read_keys().encrypt(decrypt(stored).encode()).decode()
            decrypt(transaction.execute(update.values(api_key_encrypted=token)).scalar_one())
