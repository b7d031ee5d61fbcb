"""The application: a service that keeps the one AI provider configuration of a help desk."""

import logging
import os
import re
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import quote

import click
from flask import Blueprint, Flask, abort, current_app, g, jsonify, request
from flask.json.provider import DefaultJSONProvider
from marshmallow import ValidationError
from waitress.server import create_server
from werkzeug.exceptions import HTTPException, InternalServerError
from werkzeug.wrappers import Response

import auth
import database
import models
from database import StorageError
from encryption import DecryptionError, key_file
from models import ProviderConfig
from schemas import failure, provider_schema, success

# Flask would look for it in the current folder.
INSTANCE = Path(__file__).resolve().parent / "instance"
NOT_SET = "No provider is set yet."
# For errors that are raised without a message.
MESSAGES = {
    400: "The body must be a JSON object.",
    413: "The body must be at most 64 KiB.",
    415: "Send the header Content-Type: application/json.",
}

bp = Blueprint("provider", __name__, url_prefix="/api/v1/ai/provider")
bp.cli.help = "Show, remove or re-encrypt the provider configuration."
bp.before_request(auth.authenticate)


@bp.put("")
def update_provider() -> dict[str, object]:
    """Create or replace the configuration."""
    config = provider_schema.load(_read_json_object())
    ProviderConfig.put(**config, updated_by=g.api_key)
    current_app.logger.info("Provider set to %s by %s", config["provider"], g.api_key)
    return success(True)


def _read_json_object() -> dict[str, Any]:
    if not request.is_json:
        abort(415)
    body = None
    with suppress(RecursionError):
        body = request.get_json()
    if not isinstance(body, dict):
        abort(400)
    return body


@bp.get("")
def show_provider() -> dict[str, object]:
    """Show the configuration, its API key masked."""
    config = ProviderConfig.get()
    if config is None:
        abort(404, NOT_SET)
    return success(provider_schema.dump(config))


def check_health() -> dict[str, object]:
    """Answer while the tables can be read."""
    try:
        ProviderConfig.get()
    except StorageError as error:
        current_app.logger.error("%s", error)
        abort(503, "The database does not answer.")
    return success(True)


def show_document() -> Response:
    """Show the OpenAPI document of this interface."""
    document = Path(current_app.root_path, "openapi.yaml").read_bytes()
    return Response(document, mimetype="application/yaml")


@bp.cli.command("show")
@click.option("--reveal", is_flag=True, help="Print the plain API key alone.")
def show_command(reveal: bool) -> None:
    """Print the configuration."""
    config = ProviderConfig.get()
    if config is None:
        raise click.ClickException(NOT_SET)
    if reveal:
        click.echo(config.api_key)
        return
    for field, value in provider_schema.dump(config).items():
        click.echo(f"{field:10}  {value}")


@bp.cli.command("clear")
def clear_command() -> None:
    """Remove the configuration."""
    if not ProviderConfig.clear():
        raise click.ClickException(NOT_SET)
    click.echo("Removed.", err=True)


@bp.cli.command("rotate-key")
def rotate_key_command() -> None:
    """Encrypt with a new key; the old ones still decrypt."""
    ProviderConfig.rotate()
    click.echo("Rotated.", err=True)


def _handle_validation_error(error: ValidationError) -> tuple[dict[str, object], int]:
    # A field's name is the client's: it may be what UTF-8 cannot encode.
    data = {
        field.encode("ascii", "backslashreplace").decode(): messages
        for field, messages in sorted(error.messages_dict.items())
    }
    message = " ".join(f"{field}: {' '.join(messages)}" for field, messages in data.items())
    return failure(400, message, data), 400


def _handle_storage_error(error: StorageError) -> Response:
    # The fault and its remedy do not concern a client.
    current_app.logger.error("%s", error)
    return _handle_http_exception(InternalServerError())


def _handle_decryption_error(error: DecryptionError) -> Response:
    # A client is told: it can set the provider again.
    return _handle_http_exception(InternalServerError(error.message))


def _handle_http_exception(error: HTTPException) -> Response:
    # Put the envelope in the place of werkzeug's HTML, keeping its headers.
    response = error.get_response()
    status = response.status_code
    message = error.description or error.name
    if error.description == type(error).description:
        message = MESSAGES.get(status, message)
    response.data = jsonify(failure(status, message)).data
    response.content_type = "application/json"
    return response


def _start_timer() -> None:
    g.started = perf_counter()


def _finish(response: Response) -> Response:
    # Keep secrets out of caches, and browsers from guessing a type (OWASP).
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    path = quote(request.path, errors="replace")
    milliseconds = (perf_counter() - g.started) * 1000
    who = f"{g.get('api_key', '-')} {request.remote_addr}"
    line = f"{request.method} {path} {response.status_code} {milliseconds:.1f} ms {who}"
    # Once the client has its answer, for which it need not wait longer.
    response.call_on_close(partial(current_app.logger.info, line))
    return response


class JSONProvider(DefaultJSONProvider):
    """JSON with the fields in their order, and bullets as bullets."""

    ensure_ascii = False
    sort_keys = False


def _read_settings() -> dict[str, Any]:
    level = os.environ.get("LOG_LEVEL", "INFO")
    if level not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise click.ClickException("LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR.")
    listen = os.environ.get("LISTEN", "127.0.0.1:8080")
    if not re.fullmatch(r"\S+:\d{1,5}", listen) or int(listen.rpartition(":")[2]) > 65535:
        raise click.ClickException("LISTEN must be host:port.")
    providers = os.environ.get("AI_PROVIDERS", "").split(",")
    key_file_path = os.environ.get("ENCRYPTION_KEY_FILE", "encryption.key")
    return database.engine_settings(os.environ.get("DATABASE_URL", "sqlite:///ai-provider.db")) | {
        "AI_PROVIDERS": [name.strip() for name in providers if name.strip()],
        # What a link names, a rotation replaces.
        "ENCRYPTION_KEY_FILE": Path(INSTANCE, key_file_path).resolve(),
        "LISTEN": listen,
        "LOG_LEVEL": level,
        "TRUSTED_PROXY": os.environ.get("TRUSTED_PROXY", ""),
    }


def _is_no_access_line(record: logging.LogRecord) -> bool:
    return " - - [" not in record.msg


def _configure_logging(level: str) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    # The development server's own access lines show the query string.
    logging.getLogger("werkzeug").addFilter(_is_no_access_line)
    # Under load it would write a line for each request that waits for a thread.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)


def create_app(config: dict[str, Any] | None = None) -> Flask:
    """Return the application; raise ClickException where the operator must act."""
    app = Flask(__name__, instance_path=str(INSTANCE), static_folder=None)
    app.config.update(_read_settings(), MAX_CONTENT_LENGTH=64 * 1024, **(config or {}))
    _configure_logging(app.config["LOG_LEVEL"])
    app.json = JSONProvider(app)
    app.url_map.merge_slashes = False  # no redirects: an unknown path is a 404
    database.init_app(app)
    models.init_app(app)
    app.cli.add_command(auth.credentials)
    app.register_blueprint(bp)
    app.add_url_rule("/health", view_func=check_health)
    app.add_url_rule("/openapi.yaml", view_func=show_document)
    app.before_request(_start_timer)
    app.after_request(_finish)
    app.register_error_handler(ValidationError, _handle_validation_error)
    app.register_error_handler(StorageError, _handle_storage_error)
    app.register_error_handler(DecryptionError, _handle_decryption_error)
    app.register_error_handler(HTTPException, _handle_http_exception)
    return app


@click.command()
def main() -> None:
    """Serve on LISTEN, host:port."""
    app = create_app()
    with app.app_context():
        if key_file.exists():
            key_file.read()
    listen, proxy = app.config["LISTEN"], app.config["TRUSTED_PROXY"]
    try:
        # A stranger may send 1 MiB (by default 1 GiB), and stall 500 connections (100) for
        # 30 seconds (120); poll knows no limit of descriptors, as select does. Of two threads,
        # one commits while the other computes: more only contend.
        server = create_server(
            app,
            listen=listen,
            trusted_proxy=proxy,
            trusted_proxy_headers="x-forwarded-for" if proxy else "",
            threads=2,
            max_request_body_size=1024 * 1024,
            connection_limit=500,
            channel_timeout=30,
            asyncore_use_poll=True,
            ident="",
        )
    except (OSError, ValueError) as error:
        raise click.ClickException(f"Cannot listen on LISTEN={listen}: {error}") from error
    # SIGTERM ends the process as Ctrl-C does: what is being worked on is answered.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server.print_listen("Serving on http://{}:{}")
    server.run()


if __name__ == "__main__":
    main()
