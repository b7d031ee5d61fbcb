"""API credentials: issue, verify, revoke; the request hook and the commands."""

import re
import secrets
import string
from base64 import b64decode
from hashlib import sha256
from hmac import compare_digest

import click
from flask import Blueprint, current_app, g, request
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Unauthorized

from models import OperatorError, execute, utc_now

ALPHANUMERICS = string.ascii_letters + string.digits
CREDENTIAL = re.compile(r"([A-Za-z0-9]{32}):([A-Za-z0-9]{64})")
CHALLENGES = [WWWAuthenticate(scheme, {"realm": "AI provider"}) for scheme in ("basic", "token")]

bp = Blueprint("credentials", __name__)
bp.cli.help = "Manage the credentials of the API's clients."


def parse_authorization(header: str) -> tuple[str, str] | None:
    """Return API key and secret of a Basic or token header, None if malformed."""
    scheme, _, value = header.partition(" ")
    value = value.lstrip(" ")  # RFC 9110, section 11.4: 1*SP
    if scheme.lower() == "basic":
        try:
            value = b64decode(value, validate=True).decode("ascii")
        except ValueError:
            return None
    elif scheme.lower() != "token":
        return None
    match = CREDENTIAL.fullmatch(value)
    return (match[1], match[2]) if match else None


def hash_secret(api_secret: str) -> str:
    """Return the digest to store: 381 random bits need no slow hash."""
    return sha256(api_secret.encode()).hexdigest()


def verify(api_key: str, api_secret: str) -> bool:
    """Tell whether the credential is valid, in the same time if the key is unknown."""
    select = "SELECT secret_hash, last_used_at FROM credential WHERE api_key = :key"
    rows = execute(select, key=api_key)
    secret_hash, last_used_at = rows[0] if rows else (hash_secret(""), None)
    if not compare_digest(secret_hash, hash_secret(api_secret)) or not rows:
        return False
    now = utc_now("minutes")  # so that not every request writes
    if last_used_at != now:
        try:
            update = "UPDATE credential SET last_used_at = :now WHERE api_key = :key"
            execute(update, key=api_key, now=now)
        except OperatorError as error:  # bookkeeping never refuses a request
            current_app.logger.warning("Last use not recorded. %s", error)
    return True


def authenticate() -> None:
    """Refuse a request without a valid credential; leave its key in `g.api_key`."""
    if request.method == "OPTIONS":
        return
    credential = parse_authorization(request.headers.get("Authorization", ""))
    if credential is None or not verify(*credential):
        current_app.logger.warning("Authentication failed from %s", request.remote_addr)
        raise Unauthorized(
            "Send a valid credential: Authorization: Basic base64(api_key:api_secret) or"
            " Authorization: token api_key:api_secret.",
            www_authenticate=CHALLENGES,
        )
    g.api_key = credential[0]


def issue_credential(name: str | None) -> str:
    """Store a new credential; return it as api_key:api_secret."""
    api_key, api_secret = (
        "".join(secrets.choice(ALPHANUMERICS) for _ in range(length)) for length in (32, 64)
    )
    execute(
        "INSERT INTO credential (api_key, secret_hash, name, created_at)"
        " VALUES (:api_key, :secret_hash, :name, :created_at)",
        api_key=api_key,
        secret_hash=hash_secret(api_secret),
        name=name,
        created_at=utc_now(),
    )
    return f"{api_key}:{api_secret}"


@bp.cli.command("create")
@click.option("--name", help="What the credential is for.")
def create_command(name: str | None) -> None:
    """Print a new credential as api_key:api_secret."""
    if name and not name.isprintable():
        raise click.BadParameter("must be printable", param_hint="--name")
    click.echo(issue_credential(name))
    click.echo("Keep this credential safe: it is shown only once.", err=True)


@bp.cli.command("list")
def list_command() -> None:
    """Print the credentials as a table, without secrets."""
    line = "{:32}  {:20}  {:17}  {}".format
    click.echo(line("API_KEY", "CREATED", "LAST_USED", "NAME"))
    select = "SELECT api_key, created_at, last_used_at, name FROM credential ORDER BY created_at"
    for api_key, created_at, last_used_at, name in execute(select):
        click.echo(line(api_key, created_at, last_used_at or "never", name or ""))


@bp.cli.command("revoke")
@click.argument("api_key")
def revoke_command(api_key: str) -> None:
    """Make the credential of this API key invalid from the next request on."""
    if not execute("DELETE FROM credential WHERE api_key = :key RETURNING name", key=api_key):
        raise OperatorError("No credential has this API key; see: flask credentials list.")
    click.echo("Revoked.", err=True)
