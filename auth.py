"""The authenticated request: the Authorization header and the credentials commands."""

import re
from base64 import b64decode
from contextlib import suppress

import click
from flask import abort, g, request
from flask.cli import AppGroup

from models import Credential, create_missing, report

CREDENTIAL = re.compile(r"token ([A-Za-z0-9]{32}):([A-Za-z0-9]{64})")

credentials = AppGroup("credentials", help="Manage the credentials of the API's clients.")


def parse_authorization(header: str) -> re.Match[str] | None:
    """Match API key and secret in a Basic or token header; return None if malformed."""
    # Werkzeug 3.1.9's own parser raises ValueError on "Basic \x80".
    scheme, _, value = header.partition(" ")
    value = value.lstrip(" ")  # RFC 9110, section 11.4: 1*SP
    if scheme.lower() == "basic":
        with suppress(ValueError):
            scheme, value = "token", b64decode(value, validate=True).decode()
    return CREDENTIAL.fullmatch(f"{scheme.lower()} {value}")


def authenticate() -> None:
    """Refuse a request without a valid credential; leave the api_key it names in `g.client`."""
    if request.method == "OPTIONS":
        return
    if credential := parse_authorization(request.headers.get("Authorization", "")):
        g.client = credential[1]
    if credential is None or not Credential.verify(*credential.groups()):
        abort(401, www_authenticate=['Basic realm="AI provider"', 'Token realm="AI provider"'])


@credentials.command("create")
@click.option("--name", help="What the credential is for.")
def create_command(name: str | None) -> None:
    """Print a new credential as api_key:api_secret."""
    if name and not (name.isprintable() and len(name) <= 60):
        raise click.BadParameter("must have at most 60 printable characters", param_hint="--name")
    create_missing()
    credential = Credential.issue(name)
    click.echo(credential)
    report(f"Created {credential[:32]}. Keep the credential safe: it is shown only once.")


@credentials.command("list")
def list_command() -> None:
    """Print the credentials as a table, without secrets."""
    line = "{:32}  {:20}  {:17}  {}".format
    rows = Credential.all()
    click.echo(line("API_KEY", "CREATED", "LAST_USED", "NAME"))
    for row in rows:
        click.echo(line(row.api_key, row.created_at, row.last_used_at or "never", row.name or ""))


@credentials.command("revoke")
@click.argument("api_key")
def revoke_command(api_key: str) -> None:
    """End the credential that has this api_key."""
    api_key = api_key.strip().partition(":")[0]  # of the whole credential, too
    if not api_key.isascii() or not Credential.revoke(api_key):
        raise click.ClickException("No credential has this api_key. See `flask credentials list`.")
    report(f"Revoked {api_key}.")
