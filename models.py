"""What is stored: the clients' credentials and the provider configuration."""

import os
import re
import sqlite3
from contextlib import closing, suppress
from datetime import datetime, timezone
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from secrets import compare_digest, token_hex
from tempfile import NamedTemporaryFile, TemporaryDirectory

import click
import sqlalchemy as sa
from flask import current_app
from sqlalchemy.orm import Mapped, mapped_column

from database import Base, DatabaseFile, StorageError, db, execute, storage_errors, transaction
from encryption import key_file, sync


def utc_now(timespec: str = "seconds") -> str:
    """Return the time in UTC as ISO 8601, the form in which it is stored and shown."""
    return datetime.now(timezone.utc).isoformat(timespec=timespec).replace("+00:00", "Z")


def _hash_secret(api_secret: str) -> str:
    # 256 random bits need no slow hash (OWASP ASVS 6.5.2).
    return sha256(api_secret.encode()).hexdigest()


class Credential(Base):
    """The API key of a client and the digest of its secret."""

    __tablename__ = "credential"

    api_key: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    secret_hash: Mapped[str] = mapped_column(sa.String(64))
    name: Mapped[str | None]
    created_at: Mapped[str]
    last_used_at: Mapped[str | None]

    @classmethod
    def issue(cls, name: str | None) -> str:
        """Store a new credential; return it as api_key:api_secret."""
        key, secret, now = token_hex(16), token_hex(32), utc_now()
        values = {"api_key": key, "secret_hash": _hash_secret(secret), "created_at": now}
        with transaction():
            execute(sa.insert(cls), name=name, **values)
        return f"{key}:{secret}"

    @classmethod
    def all(cls) -> "list[Credential]":
        """Return every credential, the oldest first."""
        return [cls(**row._asdict()) for row in execute(sa.select(cls).order_by(cls.created_at))]

    @classmethod
    def verify(cls, api_key: str, api_secret: str) -> bool:
        """Return whether the credential is valid, and record its use; take as long if unknown."""
        rows = execute(SELECT_CREDENTIAL, key=api_key)
        secret_hash = rows[0].secret_hash if rows else _hash_secret("")
        if not compare_digest(secret_hash, _hash_secret(api_secret)) or not rows:
            return False
        if rows[0].last_used_at != (now := utc_now("minutes")):  # so that not every request writes
            try:
                with transaction(patience=0):
                    execute(UPDATE_LAST_USE, key=api_key, now=now)
            except StorageError as error:  # bookkeeping refuses no request
                current_app.logger.warning("Last use not recorded. %s", error)
        return True

    @classmethod
    def revoke(cls, api_key: str) -> bool:
        """Delete the credential; return whether there was one."""
        with transaction():
            rows = execute(SELECT_CREDENTIAL, key=api_key)  # SQLite 3.34 has no RETURNING
            execute(sa.delete(cls).where(KEY_MATCHES), key=api_key)
        return bool(rows)


class ProviderConfig(Base):
    """The one AI provider and its encrypted API key."""

    __tablename__ = "provider_config"
    __table_args__ = (sa.CheckConstraint("id = 1", name="singleton"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    provider: Mapped[str] = mapped_column(sa.String(30))
    api_key_encrypted: Mapped[str]
    updated_at: Mapped[str]
    updated_by: Mapped[str] = mapped_column(sa.String(32))

    api_key = ""  # in plain text; no column

    @classmethod
    def get(cls) -> "ProviderConfig | None":
        """Return the configuration, its API key decrypted, or None; raise StorageError."""
        if not (rows := execute(SELECT_CONFIG)):
            return None
        return cls(**rows[0]._asdict(), api_key=key_file.decrypt(rows[0].api_key_encrypted))

    @classmethod
    def put(cls, provider: str, api_key: str, updated_by: str) -> None:
        """Encrypt the API key and store the configuration, replacing any other."""
        with transaction():
            # Not before the transaction: a rotation would miss what waits with an older key.
            token, now = key_file.encrypt(api_key), utc_now()
            row = {"id": 1, "provider": provider, "api_key_encrypted": token, "updated_at": now}
            execute(_upsert_config(db.engine.name), updated_by=updated_by, **row)

    @classmethod
    def clear(cls) -> str | None:
        """Delete the configuration; return the name of its provider, None if nothing was set."""
        with transaction():
            rows = execute(SELECT_CONFIG)
            execute(DELETE_CONFIG)
        return str(rows[0].provider) if rows else None

    @classmethod
    def rotate(cls) -> None:
        """Encrypt the stored API key with a new key; raise StorageError."""
        with transaction():  # of two rotations at once, one would lose its key
            config = cls.get()
            key_file.add_key()
            if config:
                execute(sa.update(cls).values(api_key_encrypted=key_file.encrypt(config.api_key)))


# The statements of a request; those of a command alone are built where they are used.
KEY_MATCHES = Credential.api_key == sa.bindparam("key")
SELECT_CREDENTIAL = sa.select(Credential.secret_hash, Credential.last_used_at).where(KEY_MATCHES)
UPDATE_LAST_USE = sa.update(Credential).where(KEY_MATCHES).values(last_used_at=sa.bindparam("now"))
SELECT_CONFIG = sa.select(ProviderConfig)
DELETE_CONFIG = sa.delete(ProviderConfig)


@cache
def _upsert_config(dialect: str) -> sa.Insert:
    # Only the dialect in use is imported.
    insert = import_module(f"sqlalchemy.dialects.{dialect}").insert(ProviderConfig)
    upsert: sa.Insert = insert.on_conflict_do_update(index_elements=["id"], set_=insert.excluded)
    return upsert


def create_missing() -> None:
    """Create the folder and tables if missing, and a key file if nothing is stored."""
    folder = Path(current_app.instance_path)
    is_needed = current_app.config["ENCRYPTION_KEY_FILE"].parent == folder
    with storage_errors(), suppress(FileExistsError if is_needed else OSError):
        folder.mkdir(0o700)
    with storage_errors("DATABASE_URL: "):
        if database_file := current_app.extensions.get("database_file"):
            _create_sqlite_file(database_file.path)
        else:
            # One process at a time: create_all looks, then creates tables (but no new columns).
            engine = db.engine.execution_options(isolation_level="READ COMMITTED")
            with engine.begin() as connection:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(5741)))  # any number
                Base.metadata.create_all(connection)
    # While something is stored, a new key could not decrypt it.
    if not execute(SELECT_CONFIG) and not os.path.lexists(key_file.path):
        with transaction():
            key_file.create()


def _create_sqlite_file(link: Path) -> None:
    path = Path(os.path.realpath(link))
    if Path(f"{path}-wal").exists() and not path.exists():
        raise StorageError(f"Put the lost {path} back or, to begin anew, move {path}-wal away.")
    folder = os.path.realpath(path.parent, strict=True)
    with NamedTemporaryFile(dir=folder, prefix=f"{path.name}.") as new:
        if path.exists():  # not before, so that a folder that denies writing is an error
            return
        Path(new.name).chmod(0o600)  # SQLite gives the files beside it the same mode
        engine = sa.create_engine(db.engine.url.set(database=new.name), poolclass=sa.NullPool)
        Base.metadata.create_all(engine)
        with suppress(FileExistsError):  # another process was faster
            os.link(new.name, path)
            current_app.logger.warning("Created database %s.", path)


def report(message: str) -> None:
    """Say what a command changed, and why the log of the service does not."""
    click.echo(f"{message} (Not logged: only the service writes to its log.)", err=True)


@click.argument("file", type=click.Path(path_type=Path, readable=False, allow_dash=True))
@storage_errors()
def backup_command(file: Path) -> None:
    """Back up the database to FILE, or - for standard output."""
    database_file, place = _require_sqlite_file(file), Path(os.path.realpath(file))
    folder = None if str(file) == "-" else os.path.realpath(place.parent, strict=True)
    with TemporaryDirectory(dir=folder, prefix=f"{file.name}.") as private_folder:
        content = place.read_bytes() if place.is_file() else b"of another kind"
        if folder and place.exists() and not re.match(rb"(?s)\Z|SQLite.*provider_config", content):
            raise click.ClickException(f"{file} is not a backup of this service: not replaced.")
        wal = Path(f"{place}-wal")  # it would be restored with the new one
        if folder and wal.exists() and wal.stat().st_size:
            raise click.ClickException(f"{file} has a -wal: not replaced. Name another file.")
        _require_intact(database_file.connect(), database_file.path)
        copy = Path(private_folder, "copy")
        copy.touch(0o600)
        with closing(sqlite3.connect(copy)) as target:
            database_file.connect().backup(target)
        if folder:
            copy.replace(place)
            sync(place.parent)
        else:
            with os.fdopen(1, "wb", closefd=False) as stdout:  # click.echo permits a short write
                stdout.write(copy.read_bytes())
    click.echo(f"Backed up {database_file.path} to {file}.", err=True)


@click.argument("file", type=click.Path(path_type=Path, readable=False, allow_dash=True))
def restore_command(file: Path) -> None:
    """Restore the database from FILE, or - for standard input."""
    database_file = _require_sqlite_file(file)
    with storage_errors(), TemporaryDirectory() as folder, click.open_file(str(file), "rb") as data:
        present, copy = database_file.connect(), Path(folder, "copy")
        # Fails if the database is that of another program.
        present.execute(str(sa.select(ProviderConfig).where(sa.false())))
        present.execute("PRAGMA busy_timeout = 5000")
        copy.write_bytes(data.read())
        with suppress(FileNotFoundError):  # of a database that was not closed
            Path(folder, "copy-wal").write_bytes(Path(f"{os.path.realpath(file)}-wal").read_bytes())
        with closing(sqlite3.connect(copy)) as source:
            _require_intact(source, data.name)
            source.backup(present, progress=_refuse_lock)
        database_file.confirm()
    report(f"Restored {database_file.path} from {data.name}. Revoke again what was revoked since.")
    try:
        if ProviderConfig.get():
            click.echo("The present encryption key decrypts what was restored.", err=True)
    except StorageError as error:
        click.echo(f"Warning: {error}", err=True)


def _refuse_lock(status: int, *_: int) -> None:
    if status in {5, 6}:  # SQLITE_BUSY, SQLITE_LOCKED: sqlite3 would try without an end
        raise sqlite3.OperationalError("database is locked")


def _require_sqlite_file(other: Path) -> DatabaseFile:
    database_file: DatabaseFile | None = current_app.extensions.get("database_file")
    if not database_file:
        raise click.ClickException("Use pg_dump and pg_restore for a PostgreSQL database.")
    own = os.path.realpath(database_file.path)
    if os.path.realpath(other) in {own + end for end in ("", "-wal", "-shm", "-journal")}:
        raise click.ClickException(f"{other} belongs to the database. Name another file.")
    return database_file


def _require_intact(database: sqlite3.Connection, name: object) -> None:
    with suppress(sqlite3.Error):
        database.execute(str(sa.select(*Base.metadata.sorted_tables)))
        if database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]:
            return
    fault = f"{name} is damaged, or not of this service: nothing has changed."
    raise click.ClickException(f"{fault} See Back up in README.")
