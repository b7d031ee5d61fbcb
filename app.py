"""The application: a service that keeps the one AI provider configuration of a help desk."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while it starts has no traceback

import logging.handlers
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from time import gmtime, perf_counter
from typing import Any
from urllib.parse import quote

import click
from flask import Blueprint, Flask, Response, abort, current_app, g, request
from marshmallow import ValidationError
from waitress.adjustments import Adjustments
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException

import auth
import database
import schemas
from encryption import key_file
from models import ProviderConfig, backup_command, create_missing, report, restore_command

VERSION = "1.1.0"
ROOT = Path(__file__).resolve().parent
NOT_SET = "No provider is set."
STATUS_MESSAGES = {  # in place of the descriptions of werkzeug
    401: "Send a valid credential: Authorization: Basic base64(api_key:api_secret) or"
    " Authorization: token api_key:api_secret.",
    404: "The paths are /api/v1/ai/provider, /health and /openapi.yaml.",
    405: "The allowed methods are {allow}.",
    413: "The body must be at most 64 KiB.",
    500: "The service failed. Its log names the cause.",
}

bp = Blueprint("provider", __name__, url_prefix="/api/v1/ai/provider")
bp.cli.help = "Manage the provider configuration."
bp.before_request(auth.authenticate)


@bp.put("")
def update_provider() -> dict[str, object]:
    """Create or replace the configuration."""
    if not request.is_json:
        abort(415, "Send the header Content-Type: application/json.")
    config = schemas.provider_schema.load(schemas.parse_object(request.get_data()))
    ProviderConfig.put(**config, updated_by=g.client)
    current_app.logger.info("Provider set to %r by %s", config["provider"], g.client)
    return schemas.success(True)


@bp.get("")
def show_provider() -> dict[str, object]:
    """Show the configuration, its API key masked."""
    config = ProviderConfig.get() or abort(404, NOT_SET)
    return schemas.success(schemas.provider_schema.dump(config))


@bp.delete("")
def clear_provider() -> dict[str, object]:
    """Remove the configuration."""
    provider = ProviderConfig.clear() or abort(404, NOT_SET)
    current_app.logger.info("Provider %r removed by %s", provider, g.client)
    return schemas.success(True)


def check_health() -> dict[str, object]:
    """Succeed if what is stored can be read."""
    ProviderConfig.get()
    return schemas.success(True)


def show_document() -> Response:
    """Show the OpenAPI document of this interface."""
    return Response((ROOT / "openapi.yaml").read_bytes(), mimetype="application/yaml")


@bp.cli.command("show")
@click.option("--reveal", is_flag=True, help="Print the plain API key alone.")
def show_command(reveal: bool) -> None:
    """Print the configuration, its API key masked."""
    if (config := ProviderConfig.get()) is None:
        raise click.ClickException(NOT_SET)
    if reveal:
        click.echo(config.api_key)
        return
    for field, value in schemas.provider_schema.dump(config).items():
        click.echo(f"{field:10}  {value}")


@bp.cli.command("clear")
def clear_command() -> None:
    """Remove the configuration."""
    if (provider := ProviderConfig.clear()) is None:
        raise click.ClickException(NOT_SET)
    report(f"Removed the provider {provider!r}.")


@bp.cli.command("rotate-key")
def rotate_key_command() -> None:
    """Encrypt with a new key; the old ones still decrypt."""
    ProviderConfig.rotate()
    report(f"Rotated: {key_file.path} has a new first key. Copy it again.")


def _handle_validation_error(error: ValidationError) -> tuple[dict[str, object], int]:
    return schemas.failure(400, schemas.summarize(error), error.messages_dict)


def _handle_storage_error(error: database.StorageError) -> tuple[dict[str, object], int]:
    current_app.logger.error("%s", error)
    return schemas.failure(503 if request.endpoint == "health" else 500, error.public)


def _handle_http_exception(error: HTTPException) -> tuple[dict[str, object], int, Headers]:
    status = error.code or 500
    headers = Headers(error.get_headers()) | {"Content-Type": "application/json"}
    message = error.description or error.name
    if error.description == type(error).description:
        message = STATUS_MESSAGES.get(status, message).format(allow=headers.get("Allow"))
    return *schemas.failure(status, message), headers


def _begin_request() -> None:
    g.started = perf_counter()
    if re.match("([^/?#]+://[^/?#]*)?(/|%2f){2}", request.environ.get("REQUEST_URI", ""), re.I):
        abort(404)  # waitress strips all slashes but one, and the path would match


def _parse_address(text: str) -> str:
    # Without its zone, which may be any text.
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            return socket.inet_ntop(family, socket.inet_pton(family, text.partition("%")[0]))
    return "-"


def _finish_request(response: Response) -> Response:
    # Keep secrets out of caches, and browsers from guessing a type (OWASP).
    response.headers.extend({"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})
    if request.method == "OPTIONS" and response.status_code == 200:
        response.status_code = 204
        del response.headers["Content-Type"]
    what = quote(f"{request.method} {request.path}", safe="/ ")[:200]
    milliseconds = (perf_counter() - g.started) * 1000
    who = f"{g.get('client', '-')} {_parse_address(request.remote_addr or '')}"
    level = logging.WARNING if response.status_code == 401 else logging.INFO
    current_app.logger.log(level, f"{what} {response.status_code} {milliseconds:.1f} ms {who}")
    return response


def _is_no_access_line(record: logging.LogRecord) -> bool:
    return " - - [" not in record.msg


class _JournalFormatter(logging.Formatter):
    # Begins each line with the priority that journald reads (sd-daemon(3)).
    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{logging.handlers.SysLogHandler.priority_names[record.levelname.lower()]}>"
        return prefix + super().format(record).replace("\n", f"\n{prefix}")


def _configure_logging(level: str) -> None:
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = gmtime
    if os.environ.get("JOURNAL_STREAM") == "{0.st_dev}:{0.st_ino}".format(os.fstat(2)):
        formatter = _JournalFormatter("%(levelname)s %(message)s")
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=level)
    # The development server's own access lines show the query string.
    logging.getLogger("werkzeug").addFilter(_is_no_access_line)
    # Waitress's warnings have tracebacks, and repeat what a stranger sent.
    logging.getLogger("waitress").setLevel(logging.ERROR)


def create_app(config: dict[str, Any] | None = None) -> Flask:
    """Return the application; what is in `config` wins, settings as text; raise ClickException."""
    app = Flask(__name__, instance_path=str(ROOT / "instance"), static_folder=None)
    app.config.update({"MAX_CONTENT_LENGTH": 64 * 1024} | schemas.read_settings(ROOT, config or {}))
    _configure_logging(app.config["LOG_LEVEL"])
    app.json.ensure_ascii = app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # no redirects: an unknown path is a 404
    database.init_app(app)
    app.cli.add_command(auth.credentials)
    app.cli.command("backup")(backup_command)
    app.cli.command("restore")(restore_command)
    app.register_blueprint(bp)
    app.add_url_rule("/health", "health", check_health)
    app.add_url_rule("/openapi.yaml", "document", show_document)
    app.before_request(_begin_request)
    app.after_request(_finish_request)
    app.register_error_handler(ValidationError, _handle_validation_error)
    app.register_error_handler(database.StorageError, _handle_storage_error)
    app.register_error_handler(HTTPException, _handle_http_exception)
    return app


def create_servers(app: Flask, sockets: dict[Any, Any]) -> list[schemas.Server]:
    """Return a server for each address of LISTEN, bound to it; raise ClickException."""
    listen, proxy = app.config["LISTEN"], app.config["TRUSTED_PROXY"]
    try:
        # A stranger may send 16 KiB of headers (by default 256) and 128 KiB of body (1 GiB), 2 KiB
        # at a time (8, with hundreds of requests), and stall 500 connections (100) for 10 seconds
        # (120), if there are descriptors for them.
        limits: Any = Adjustments(
            listen=listen,
            trusted_proxy=proxy,
            trusted_proxy_headers="x-forwarded-for" if proxy else "",
            threads=0,
            max_request_header_size=16 * 1024,
            max_request_body_size=128 * 1024,
            recv_bytes=2048,
            connection_limit=min(500, os.sysconf("SC_OPEN_MAX") - 32),
            channel_timeout=10,
            cleanup_interval=1,  # after which the -wal is saved, too
            ident="",
            log_socket_errors=False,  # with a traceback, where the network of a client fails
        )
        limits.send_bytes = 16 * 1024  # or the headers leave before the body, in another packet
        limits.database_file = app.extensions.get("database_file")
        return [schemas.Server(app, sockets, adj=limits, sockinfo=each) for each in limits.listen]
    except (OSError, ValueError) as error:
        raise click.ClickException(f"LISTEN={listen} cannot be served: {error}") from error


def _end_within_seconds(*_: object) -> None:
    signal.alarm(signal.alarm(0) or 5)  # a second signal does not put it off


def _stop_on_signals(trigger: Any, sockets: dict[Any, Any]) -> None:  # noqa: ANN401
    # A signal wakes the loop, which ends between two events; SIGALRM ends the process, whatever
    # hangs, 5 seconds later.
    trigger.thunks.append(sockets.clear)
    os.set_blocking(trigger.trigger, False)
    signal.set_wakeup_fd(trigger.trigger)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_within_seconds)


@click.command(epilog=schemas.SETTINGS_HELP)
@click.version_option(VERSION)
def main() -> None:
    """Serve on LISTEN, host:port."""
    app = create_app()
    with app.app_context():
        create_missing()
        key_file.prepare()
        try:
            ProviderConfig.get()
        except database.StorageError as error:  # a PUT mends it
            app.logger.error("%s", error)
    sockets: dict[Any, Any] = {}
    server = create_servers(app, sockets)[0]
    _stop_on_signals(server.trigger, sockets)
    url = f"http://{app.config['LISTEN'].rpartition(':')[0]}:{server.getsockname()[1]}"
    app.logger.info("Serving version %s on %s", VERSION, url)
    # Under systemd, `systemctl start` waits for this (sd_notify(3)).
    with suppress(KeyError, OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.sendto(b"READY=1", re.sub("^@", "\0", os.environ["NOTIFY_SOCKET"]))
    server.run()
    app.logger.info("Stopped version %s on %s", VERSION, url)


if __name__ == "__main__":
    main()
