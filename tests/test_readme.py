import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import API_KEY, CONFIG, OTHER, StartServer, create_credential, flask
from processes import ROOT, start_interpreter


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Lay the files out as in a checkout, where the README's commands are run."""
    (tmp_path / "instance").mkdir()
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for module in ROOT.glob("*.py"):
        (tmp_path / module.name).symlink_to(module)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/instance/ai-provider.db")
    monkeypatch.setenv("ENCRYPTION_KEY_FILE", f"{tmp_path}/instance/encryption.key")
    return tmp_path


def run_block(name: str, folder: Path) -> None:
    """Run the block of the README that is marked with this name."""
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(rf"<!-- run: {name} -->\n```sh\n(.*?)```", readme, re.DOTALL)
    subprocess.run(["bash", "-ec", block], cwd=folder, check=True)


def test_backup_of_a_running_service_is_restored_with_its_key(
    checkout: Path, start_server: StartServer
) -> None:
    server = start_server(start_interpreter("app.py"))
    credential = create_credential()
    server.put(CONFIG, credential)
    before = server.get(credential).body
    run_block("rotate", checkout)
    run_block("backup", checkout)
    backups = (checkout / "backup.db", checkout / "backup.key")
    assert {path.stat().st_mode & 0o777 for path in backups} == {0o600}
    run_block("rotate", checkout)
    assert server.put(OTHER, credential).status == 200
    server.stop()
    run_block("restore", checkout)
    assert start_server().get(credential).body == before
    assert flask("provider", "show", "--reveal")[:2] == (0, f"{API_KEY}\n")
