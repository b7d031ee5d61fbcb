"""Serve and keep the one AI provider configuration of a help desk."""

import logging
import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import quote

import click
from flask import Blueprint, Flask, current_app, g, jsonify, request
from flask.json.provider import DefaultJSONProvider
from marshmallow import ValidationError
from waitress.server import create_server
from werkzeug import exceptions
from werkzeug.wrappers import Response

import auth
import models
from models import NotSetError, OperatorError, UnreadableKeyError
from schemas import failure, masked, provider_schema, success

bp = Blueprint("provider", __name__, url_prefix="/api/v1/ai/provider")
bp.cli.help = "Show, remove or encrypt anew the provider configuration."
bp.before_request(auth.authenticate)


def read_json_object() -> dict[str, Any]:
    """Return the body; raise BadRequest if it is anything else."""
    with suppress(RecursionError):
        body = request.get_json()
        if isinstance(body, dict):
            return body
    raise exceptions.BadRequest


@bp.put("")
def update_provider() -> dict[str, object]:
    """Create or replace the configuration."""
    config = provider_schema.load(read_json_object())
    models.set_provider(**config, updated_by=g.api_key)
    current_app.logger.info("Provider set to %s by %s", config["provider"], g.api_key)
    return success(True)


@bp.get("")
def show_provider() -> dict[str, object]:
    """Show the configuration, its API key masked."""
    return success(masked(*models.get_provider()))


@bp.cli.command("show")
@click.option("--reveal", is_flag=True, help="Print the plain API key alone.")
def show_command(reveal: bool) -> None:
    """Print the configuration."""
    config = models.get_provider()
    if reveal:
        click.echo(config[1])
        return
    for field, value in masked(*config).items():
        click.echo(f"{field:10}  {value}")


@bp.cli.command("clear")
def clear_command() -> None:
    """Remove the configuration."""
    models.clear_provider()
    click.echo("Removed.", err=True)


@bp.cli.command("rotate-key")
def rotate_key_command() -> None:
    """Encrypt with a new key; the old ones still decrypt."""
    models.rotate_key()
    click.echo("Rotated.", err=True)


def check_health() -> dict[str, object]:
    """Answer while the tables can be read."""
    try:
        models.execute(models.SELECT_PROVIDER)
    except OperatorError as error:
        current_app.logger.error("%s", error)
        raise exceptions.ServiceUnavailable("The database does not answer.") from None
    return success(True)


def show_document() -> Response:
    """Hand out the description of this interface."""
    document = Path(current_app.root_path, "openapi.yaml").read_bytes()
    return Response(document, mimetype="application/yaml")


def handle_invalid_fields(error: ValidationError) -> tuple[dict[str, object], int]:
    """Name each field and the rule that it breaks."""
    # A field's name is the client's: it may be what UTF-8 cannot encode.
    data = {
        field.encode("ascii", "backslashreplace").decode(): messages
        for field, messages in sorted(error.messages_dict.items())
    }
    return failure(400, " ".join(f"{field}: {' '.join(data[field])}" for field in data), data), 400


def handle_operator_error(error: OperatorError) -> Response:
    """Log what to do; tell a client only what concerns it."""
    if isinstance(error, NotSetError):
        return handle_http_exception(exceptions.NotFound(error.message))
    if isinstance(error, UnreadableKeyError):  # logged with its cause
        return handle_http_exception(exceptions.InternalServerError(error.message))
    current_app.logger.error("%s", error)
    return handle_http_exception(exceptions.InternalServerError())


def handle_http_exception(error: exceptions.HTTPException) -> Response:
    """Put the envelope in the place of werkzeug's HTML, keeping its headers."""
    response = error.get_response()
    message = {
        400: "The body must be a JSON object.",
        413: "The body must be at most 64 KiB.",
        415: "Send the header Content-Type: application/json.",
    }.get(response.status_code, error.description or error.name)
    response.data = jsonify(failure(response.status_code, message)).data
    response.content_type = "application/json"
    return response


def finish(response: Response) -> Response:
    """Keep secrets out of caches, and browsers from guessing a type (OWASP); log the access."""
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    access = (request.method, quote(request.path, errors="replace"), response.status_code)
    who = ((perf_counter() - g.started) * 1000, g.get("api_key", "-"), request.remote_addr)
    logger = current_app.logger
    # When the client has its answer, for which it need not wait longer.
    response.call_on_close(lambda: logger.info("%s %s %d %.1f ms %s %s", *access, *who))
    return response


class JSONProvider(DefaultJSONProvider):
    """Keep the fields' order, and bullets as bullets."""

    ensure_ascii = False
    sort_keys = False


def create_app(config: dict[str, Any] | None = None) -> Flask:
    """Return the application; raise OperatorError where the operator must act."""
    level = os.environ.get("LOG_LEVEL", "INFO")
    if level not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise OperatorError("LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    # The development server's own access lines show the query string.
    logging.getLogger("werkzeug").addFilter(lambda record: " - - [" not in record.msg)
    # Under load it would write a line for each request that waits for a thread.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    # Flask would look for the instance folder in the current one.
    instance_path = str(Path(__file__).resolve().parent / "instance")
    app = Flask(__name__, instance_path=instance_path, static_folder=None)
    app.json = JSONProvider(app)
    app.url_map.merge_slashes = False  # no redirects: an unknown path is a 404
    app.config.update(
        MAX_CONTENT_LENGTH=64 * 1024,
        SQLALCHEMY_DATABASE_URI=os.environ.get("DATABASE_URL", "sqlite:///ai-provider.db"),
        AI_PROVIDERS=re.findall(r"[^\s,][^,]*(?<!\s)", os.environ.get("AI_PROVIDERS", "")),
        ENCRYPTION_KEY_FILE=os.environ.get("ENCRYPTION_KEY_FILE", "encryption.key"),
    )
    app.config.update(config or {})
    models.init_app(app)
    app.register_blueprint(bp)
    app.register_blueprint(auth.bp)
    app.add_url_rule("/health", view_func=check_health)
    app.add_url_rule("/openapi.yaml", view_func=show_document)
    app.before_request(lambda: setattr(g, "started", perf_counter()))
    app.after_request(finish)
    app.register_error_handler(ValidationError, handle_invalid_fields)
    app.register_error_handler(OperatorError, handle_operator_error)
    app.register_error_handler(exceptions.HTTPException, handle_http_exception)
    return app


@click.command()
def main() -> None:
    """Serve on LISTEN, host:port."""
    app = create_app()
    with app.app_context():
        if os.path.lexists(models.key_file()):
            models.read_keys()
    listen = os.environ.get("LISTEN", "127.0.0.1:8080")
    proxy = os.environ.get("TRUSTED_PROXY") or None
    if not re.fullmatch(r"\S+:\d{1,5}", listen) or int(listen.rpartition(":")[2]) > 65535:
        raise OperatorError("LISTEN must be host:port.")
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
        raise OperatorError(f"Cannot listen on LISTEN={listen}: {error}") from error
    # SIGTERM ends the process as Ctrl-C does: what is being worked on is answered.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server.print_listen("Serving on http://{}:{}")
    server.run()


if __name__ == "__main__":
    main()
