import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import API_KEY, CONFIG, ROOT, Server, flask


@pytest.fixture
def config(tmp_path: Path) -> dict[str, str]:
    """Lay the files out as in a checkout, where the README's commands are run."""
    (tmp_path / "instance").mkdir()
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in ("app.py", "auth.py", "models.py", "schemas.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    return {
        "SQLALCHEMY_DATABASE_URI": f"sqlite:///{tmp_path}/instance/ai-provider.db",
        "ENCRYPTION_KEY_FILE": f"{tmp_path}/instance/encryption.key",
    }


def run(name: str, folder: Path, environment: dict[str, str]) -> None:
    """Run the block of the README that is marked with this name."""
    readme = (ROOT / "README.md").read_text()
    block = re.findall(rf"<!-- run: {name} -->\n```sh\n(.*?)```", readme, re.DOTALL)[0]
    subprocess.run(["bash", "-ec", block], cwd=folder, env=os.environ | environment, check=True)


def test_backup_of_a_running_service_is_restored_with_its_key(
    start_server: Callable[..., Server], environment: dict[str, str], tmp_path: Path
) -> None:
    server = start_server()
    authorization = f"token {flask(environment, 'credentials', 'create').stdout.strip()}"
    server.request("PUT", body=CONFIG, Authorization=authorization)
    before = server.request("GET", Authorization=authorization).body
    run("rotate", tmp_path, environment)
    run("backup", tmp_path, environment)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("backup.db", "backup.key")} == {
        0o600
    }
    run("rotate", tmp_path, environment)
    other = {"provider": "other", "api_key": "other key"}
    assert server.request("PUT", body=other, Authorization=authorization).status == 200
    server.stop()
    run("restore", tmp_path, environment)
    assert start_server().request("GET", Authorization=authorization).body == before
    assert flask(environment, "provider", "show", "--reveal").stdout == f"{API_KEY}\n"
