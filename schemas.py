"""What is validated: settings, HTTP connections, and the format of requests and responses."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import sqlalchemy as sa
from dotenv import dotenv_values, find_dotenv
from dotenv.parser import parse_stream
from flask import abort, current_app
from flask.helpers import get_load_dotenv
from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer

from database import explain

NAMES_RULE = "Must be names of 1 to 30 characters in printable ASCII, separated by commas."
NAMES = validate.Regexp(r"[\s,]*([!-+\--~][ -+\--~]{0,29}\s*(,[\s,]*|\Z))+\Z", error=NAMES_RULE)
NOT_EMPTY = validate.Length(1, error="Must not be empty. Leave it out for the default.")
PROVIDER_LENGTH = validate.Length(max=30, error="Must have 1 to 30 characters. Is it the API key?")
LOG_LEVELS = validate.OneOf(["DEBUG", "INFO", "WARNING", "ERROR"])
# What an HTTP header carries unchanged (RFC 9110, section 5.5).
HEADER_RULE = "Must be printable ASCII, not empty, without line breaks or spaces at its ends."
HEADER_VALUE = validate.Regexp(r"(?! )[ -~]+(?<! )\Z", error=HEADER_RULE)
API_KEY_LENGTH = validate.Length(max=4096, error="Must have 1 to 4096 characters.")


def _validate_host_and_port(value: str) -> None:
    match = re.fullmatch(r"(\[[^\s\]]+\]|[^\s:]+):(\d{1,5})", value)
    if not match or int(match[2]) > 65535:
        raise ValidationError("Must be host:port, such as 127.0.0.1:8080 or [::1]:8080.")


class SettingsSchema(Schema):
    """The settings, as the environment has them."""

    AI_PROVIDERS = fields.String(load_default="", validate=NAMES)
    DATABASE_URL = fields.String(load_default="sqlite:///ai-provider.db", validate=NOT_EMPTY)
    ENCRYPTION_KEY_FILE = fields.String(load_default="encryption.key", validate=NOT_EMPTY)
    LISTEN = fields.String(load_default="127.0.0.1:8080", validate=_validate_host_and_port)
    LOG_LEVEL = fields.String(load_default="INFO", validate=LOG_LEVELS)
    TRUSTED_PROXY = fields.IP(load_default="")


SETTINGS_HELP = "\b\nSettings, from .env or the environment, with their defaults:" + "".join(
    f"\n  {name}={field.load_default or '(not set)'}"
    for name, field in SettingsSchema().fields.items()
)


def read_settings(root: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with the settings of the application in this folder; raise ClickException."""
    try:
        settings = config | SettingsSchema(unknown=EXCLUDE).load(_read_environment(root) | config)
    except ValidationError as error:
        raise click.ClickException(summarize(error)) from error
    except OSError as error:
        raise click.ClickException(explain(error)) from error
    except UnicodeError as error:
        raise click.ClickException(f"{root / '.env'}: Must be UTF-8.") from error
    settings["AI_PROVIDERS"] = [*filter(None, map(str.strip, settings["AI_PROVIDERS"].split(",")))]
    settings["ENCRYPTION_KEY_FILE"] = root / "instance" / settings["ENCRYPTION_KEY_FILE"]
    engine_options = _engine_options(settings["DATABASE_URL"], root / "instance")
    return {"SQLALCHEMY_ENGINE_OPTIONS": engine_options, **settings}


def _engine_options(database_url: str, folder: Path) -> dict[str, Any]:
    with suppress(sa.exc.ArgumentError, ValueError):
        url = sa.make_url(database_url)
        is_postgresql = url.drivername in {"postgres", "postgresql", "postgresql+psycopg"}
        if is_postgresql and "@" not in f"{url.host}{url.database}":
            # Whatever the server's own settings: what is acknowledged is on disk, text is UTF-8.
            session = f"{url.query.get('options', '')} -c lock_timeout=2s -c synchronous_commit=on"
            limits = {"connect_timeout": 2, "tcp_user_timeout": 4000, "client_encoding": "utf8"}
            # A server may vanish amid a statement; a prepared one fails after a pg_restore.
            limits |= {"keepalives_idle": 2, "keepalives_interval": 2, "prepare_threshold": None}
            options = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
            # The server may have been restarted since the last request.
            options |= {"pool_pre_ping": True, "connect_args": {**limits, "options": session}}
            return {"url": url.set(drivername="postgresql+psycopg"), **options}
        no_file = url.host or "?" in database_url or url.database in {None, "", ":memory:"}
        if url.drivername == "sqlite" and not no_file:
            return {"url": url.set(database=str(folder / str(url.database))), "paramstyle": "named"}
    raise click.ClickException(
        "DATABASE_URL must be sqlite:/// and a file's path, or postgresql:// and an address, in"
        " which the special characters of a password are percent-encoded: %40 for @."
    )


def _read_environment(root: Path) -> dict[str, str | None]:
    if not get_load_dotenv():
        return {**os.environ}
    # Leave out what the flask command has put into the environment from the files of the current
    # folder, perhaps those of another application.
    other: dict[str, str | None] = {}
    if "FLASK_RUN_FROM_CLI" in os.environ:
        for name in (".flaskenv", ".env"):
            other |= dotenv_values(find_dotenv(name, usecwd=True))
    path, names, settings = root / ".env", SettingsSchema().fields, {}
    with suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
        for line in parse_stream(file):
            if line.error or (line.key and (line.value is None or line.key not in names)):
                row = line.original.line + line.original.string.rstrip().count("\n")
                raise ValidationError({f"{path}:{row}": ["Unknown name, or not NAME=value."]})
            if line.key:
                settings[line.key] = line.value
    return settings | dict(os.environ.items() - other.items())


def _check_listed(value: str) -> None:
    if allowed := current_app.config["AI_PROVIDERS"]:
        validate.OneOf(allowed, map(repr, allowed), error="Must be one of: {labels}.")(value)


class SecretString(fields.String):
    """A string that is dumped masked, except for the last four characters of a long one."""

    def _serialize(self, value: str, *_: object, **__: object) -> str:  # type: ignore[override]
        return "•" * 10 + (value[-4:] if len(value) >= 12 else "")


class ProviderSchema(Schema):
    """A provider configuration, as a PUT sets it and a GET shows it."""

    provider = fields.String(required=True, validate=[PROVIDER_LENGTH, HEADER_VALUE, _check_listed])
    api_key = SecretString(required=True, validate=[API_KEY_LENGTH, HEADER_VALUE])
    updated_at = fields.String(dump_only=True)
    updated_by = fields.String(dump_only=True)


provider_schema = ProviderSchema()


def parse_object(body: bytes) -> dict[str, Any]:
    """Return a JSON object, or abort with status 400; raise ValidationError for its names."""
    try:
        value = json.loads(str(body, "utf-8-sig"), object_pairs_hook=_require_unique_names)
    except json.JSONDecodeError as error:
        abort(400, f"The body is not JSON: {error.msg}: line {error.lineno}, column {error.colno}.")
    except (ValueError, RecursionError):  # not Unicode, a number too long, nested too deep
        value = None
    if not isinstance(value, dict):
        abort(400, "The body must be a JSON object in UTF-8.")
    return value


def _require_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        name.encode()  # or raise UnicodeEncodeError, for a lone surrogate
        if name in value:
            raise ValidationError({name: ["Given more than once."]})
        value[name] = item
    return value


class RequestParser(HTTPRequestParser):
    """Waitress's parser, with an answer to every malformed header that repeats nothing of it."""

    def parse_header(self, header_plus: bytes) -> None:
        """Raise ParsingError, which is answered with status 400."""
        try:
            super().parse_header(header_plus)
        except (ParsingError, ValueError) as error:
            raise ParsingError("The request line or a header is malformed.") from error


class Channel(HTTPChannel):
    """A connection whose requests are answered in the thread of the loop, one at each event."""

    parser_class = RequestParser
    handle_expt = HTTPChannel.handle_close  # urgent data would keep the loop busy

    def writable(self) -> bool:
        """Return whether there is an answer to send, or a request to answer."""
        return bool(self.requests or super().writable())

    def handle_read(self) -> None:
        """Receive, and answer at once what is complete."""
        super().handle_read()
        if self.connected:
            self.handle_write()

    def handle_write(self) -> None:
        """Answer one request, send what the client has not taken yet, or close."""
        if self.requests:
            self.service()
            if self.connected:
                self._flush_exception(self._flush_some)  # type: ignore[attr-defined]
        else:
            super().handle_write()

    def send_continue(self) -> None:
        """Ask for the body, unless the request is complete or refused without it."""
        if self.request and not self.request.completed:
            super().send_continue()


class Server(TcpWSGIServer):
    """A server whose loop also answers: a second thread would contend with it."""

    channel_class = Channel
    adj: Any  # has the database file, too

    def add_task(self, *_: object) -> None:
        """Do nothing: a channel answers its requests itself."""

    pull_trigger = add_task  # the loop is awake; the trigger is for signals, which end it

    def maintenance(self, now: int) -> None:
        """Close idle connections, and save the -wal, which an operator may take for waste."""
        super().maintenance(now)
        if self.adj.database_file:
            self.adj.database_file.save()


def summarize(error: ValidationError) -> str:
    """Return the names and messages of what is invalid as one text."""
    fields_and_messages = sorted(error.messages_dict.items())
    return " ".join(f"{field}: {' '.join(messages)}" for field, messages in fields_and_messages)


def success(data: object) -> dict[str, object]:
    """Return the envelope of an answer."""
    return {"status": "success", "data": data}


def failure(status: int, message: str, data: object = None) -> tuple[dict[str, object], int]:
    """Return the envelope of an error, and its HTTP status."""
    usual = "InputException" if status < 500 else "GeneralException"
    error_type = {401: "UnauthorizedException", 404: "NotFoundException"}.get(status, usual)
    return {"status": "error", "message": message, "error_type": error_type, "data": data}, status
