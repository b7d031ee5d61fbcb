"""What the README says is what happens, in a checkout with the default settings."""

import os
import re
import shutil
import subprocess
import sys
from ctypes import CDLL
from pathlib import Path
from typing import BinaryIO

import pytest
from conftest import CONFIG, OTHER, OTHER_ENCRYPTION_KEY, StartServer
from processes import ROOT, Fork, execute_command_beside, run, serve, serve_beside

from app import VERSION
from schemas import SettingsSchema

README = (ROOT / "README.md").read_text()
[DELETE_OLDER_KEYS] = re.findall("`(.*? && sed .*?)`", README)


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Lay the files out as in a checkout, where the README's commands are run."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "__pycache__").symlink_to(ROOT / "__pycache__")
    for module in ROOT.glob("*.py"):
        shutil.copy2(module, folder)  # with its time, by which its bytecode is known
    for name in ("DATABASE_URL", "ENCRYPTION_KEY_FILE", "FLASK_SKIP_DOTENV"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


def run_shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-ec", command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def find_block(text: str) -> str:
    """Return the block of the README that has this text."""
    (block,) = [
        block for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if text in block
    ]
    return str(block)


def run_block(text: str, folder: Path) -> str:
    """Run the block of the README that has this text; return all it prints."""
    result = run_shell(find_block(text), folder)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def create_credential(folder: Path) -> str:
    create = ("credentials", "create")
    return run(execute_command_beside, folder, *create, FLASK_SKIP_DOTENV="1")[1].strip()


def test_backup_of_a_running_service_is_restored_with_its_key(
    checkout: Path, start_server: StartServer, tmp_path: Path
) -> None:
    credential = create_credential(checkout)
    server = start_server(Fork(serve_beside, checkout))
    server.put(CONFIG, credential)
    before = server.get(credential).body
    run_block("provider rotate-key", checkout)
    run_block("backup -", checkout)
    run_block("encryption.new", checkout)
    copies = (tmp_path / "ai-provider-backup.db", tmp_path / "encryption-backup.key")
    assert {path.stat().st_mode for path in copies} == {0o100600}
    assert run(execute_command_beside, checkout, "provider", "rotate-key")[0] == 0
    assert server.put(OTHER, credential).status == 200
    shown = run_block("restore -", checkout)
    assert f"Restored {checkout}/instance/ai-provider.db from <stdin>. " in shown
    assert "The present encryption key decrypts what was restored." in shown
    assert server.get(credential).body == before
    run_block("key.copy", checkout)
    assert server.get(credential).body == before


def test_backup_that_fails_leaves_the_one_before(checkout: Path, tmp_path: Path) -> None:
    create_credential(checkout)
    run_block("backup -", checkout)
    before = (tmp_path / "ai-provider-backup.db").read_bytes()
    (checkout / "instance" / "ai-provider.db").unlink()
    assert run_shell(find_block("backup -"), checkout).returncode == 1
    assert (tmp_path / "ai-provider-backup.db").read_bytes() == before


def test_copy_of_the_key_keeps_an_older_one(checkout: Path, tmp_path: Path) -> None:
    create_credential(checkout)
    key_file, copy = checkout / "instance" / "encryption.key", tmp_path / "encryption-backup.key"
    older = key_file.read_bytes()
    run_block("encryption.new", checkout)
    key_file.write_bytes(OTHER_ENCRYPTION_KEY)
    run_block("encryption.new", checkout)
    key_file.write_bytes(b"")
    assert run_shell(find_block("encryption.new"), checkout).returncode == 1
    assert copy.read_bytes() == OTHER_ENCRYPTION_KEY
    assert copy.with_name("encryption-backup.key.~1~").read_bytes() == older


def test_empty_copy_of_the_key_replaces_nothing(checkout: Path, tmp_path: Path) -> None:
    create_credential(checkout)
    before = (checkout / "instance" / "encryption.key").read_bytes()
    (tmp_path / "encryption-backup.key").touch()
    assert run_shell(find_block("key.copy"), checkout).returncode == 1
    assert (checkout / "instance" / "encryption.key").read_bytes() == before


def moves_and_deletions(folder: Path) -> BinaryIO:
    """Return a file with the names that are moved away or deleted in this folder from now on."""
    libc = CDLL(None)
    watch = libc.inotify_init()
    moved_from, deleted = 0x40, 0x200
    libc.inotify_add_watch(watch, os.fsencode(folder), moved_from | deleted)
    return os.fdopen(watch, "rb", buffering=0)


def test_restored_key_replaces_the_former_one_without_a_gap(checkout: Path, tmp_path: Path) -> None:
    create_credential(checkout)
    (tmp_path / "encryption-backup.key").write_bytes(OTHER_ENCRYPTION_KEY)
    with moves_and_deletions(checkout / "instance") as events:
        run_block("key.copy", checkout)
        names = events.read(4096)
    assert (b"encryption.key.copy\0" in names, b"encryption.key\0" in names) == (True, False)
    key = checkout / "instance" / "encryption.key"
    assert key.read_bytes().splitlines()[0] == OTHER_ENCRYPTION_KEY.strip()


def test_restored_key_keeps_what_the_former_one_has_encrypted(
    checkout: Path, start_server: StartServer, tmp_path: Path
) -> None:
    credential = create_credential(checkout)
    server = start_server(Fork(serve_beside, checkout))
    server.put(CONFIG, credential)
    before = server.get(credential).body
    (tmp_path / "encryption-backup.key").write_bytes(OTHER_ENCRYPTION_KEY.strip())
    run_block("key.copy", checkout)
    assert server.get(credential).body == before


def test_restored_key_takes_nothing_else_from_a_damaged_one(checkout: Path, tmp_path: Path) -> None:
    create_credential(checkout)
    key = checkout / "instance" / "encryption.key"
    former, damaged = key.read_bytes(), b"\0\xff" + b"A" * 43 + b"=\n" + b"A" * 44
    key.write_bytes(damaged + b"\n" + former.strip() + b"\r\n")
    (tmp_path / "encryption-backup.key").write_bytes(OTHER_ENCRYPTION_KEY)
    run_block("key.copy", checkout)
    assert {*key.read_bytes().split()} == {OTHER_ENCRYPTION_KEY.strip(), former.strip()}


def test_older_keys_are_deleted_without_a_gap(checkout: Path) -> None:
    create_credential(checkout)
    key = checkout / "instance" / "encryption.key"
    older = key.read_bytes()
    with moves_and_deletions(key.parent) as events:
        assert run_shell(DELETE_OLDER_KEYS, checkout).returncode == 0
        assert b"encryption.key\0" not in events.read(4096)
    [newest] = key.read_bytes().splitlines(keepends=True)
    assert (newest != older, key.stat().st_mode) == (True, 0o100600)


def test_older_keys_are_kept_if_the_rotation_fails(checkout: Path) -> None:
    create_credential(checkout)
    key = checkout / "instance" / "encryption.key"
    key.write_bytes(OTHER_ENCRYPTION_KEY + key.read_bytes())
    before = key.read_bytes()
    (key.parent / "ai-provider.db").unlink()
    assert run_shell(DELETE_OLDER_KEYS, checkout).returncode == 1
    assert key.read_bytes() == before


def test_backup_is_restored_on_another_machine(
    checkout: Path, start_server: StartServer, tmp_path: Path
) -> None:
    credential = create_credential(checkout)
    server = start_server(Fork(serve_beside, checkout))
    server.put(CONFIG, credential)
    before = server.get(credential).body
    run_block("backup -", checkout)
    run_block("encryption.new", checkout)
    other = tmp_path / "other"
    shutil.copytree(checkout, other, symlinks=True, ignore=shutil.ignore_patterns("instance"))
    server = start_server(Fork(serve_beside, other))
    assert server.get(credential).status == 401
    shown = run_block("restore -", other)
    assert "Restore it (see README)" in shown
    replaced = (other / "instance" / "encryption.key").read_bytes()
    run_block("key.copy", other)
    assert server.get(credential).body == before
    run_block("key.copy", other)
    assert (other / "instance" / "encryption.key.~1~").read_bytes() == replaced
    assert {path.stat().st_mode for path in (other / "instance").iterdir()} == {0o100600}


def test_settings_are_read_beside_the_application(checkout: Path) -> None:
    (checkout / ".env").write_text("LOG_LEVEL=LOUD\n")
    error = "Error: LOG_LEVEL: Must be one of: DEBUG, INFO, WARNING, ERROR.\n"
    assert run(execute_command_beside, checkout, "credentials", "list") == (1, "", error)
    assert run(serve_beside, checkout) == (1, "", error)


def test_variable_of_the_environment_wins(checkout: Path) -> None:
    (checkout / ".env").write_text("LOG_LEVEL=LOUD\n")
    create = ("credentials", "create")
    assert run(execute_command_beside, checkout, *create, LOG_LEVEL="INFO")[0] == 0


def test_command_from_another_folder_acts_on_the_same_data(checkout: Path, tmp_path: Path) -> None:
    credential = create_credential(checkout)
    flask = f"{checkout}/.venv/bin/flask --app {checkout}/app.py"
    assert credential[:32] in run_shell(f"{flask} credentials list", tmp_path).stdout
    # The files of settings of another application are not read.
    (tmp_path / ".env").write_text("DATABASE_URL=sqlite:////nowhere/other.db\n")
    (tmp_path / ".flaskenv").write_text("ENCRYPTION_KEY_FILE=\n")
    assert credential[:32] in run_shell(f"{flask} credentials list", tmp_path).stdout


def test_command_before_the_service_is_set_up_creates_nothing(checkout: Path) -> None:
    status, shown, error = run(execute_command_beside, checkout, "provider", "rotate-key")
    assert (status, shown) == (1, "")
    assert f"{checkout}/instance/ai-provider.db" in error
    assert "Traceback" not in error
    assert not (checkout / "instance").exists()


def test_settings_are_documented_alike() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.+) \| (.+) \|$", README, re.MULTILINE)
    table = {
        name: (meaning, default.strip("`") if "`" in default else "")
        for name, meaning, default in rows
    }
    example = (ROOT / ".env.example").read_text()
    lines = re.findall(r"^# (.+)\n#([A-Z_]+)=(.+)$", example, re.MULTILINE)
    assert {name: meaning for meaning, name, _ in lines} == {
        name: meaning for name, (meaning, _) in table.items()
    }
    values = {name: value for _, name, value in lines}
    assert not SettingsSchema().validate(values)
    defaults = {name: field.load_default for name, field in SettingsSchema().fields.items()}
    assert {name: default for name, (_, default) in table.items()} == defaults
    assert values == defaults | {name: values[name] for name in defaults if not defaults[name]}


def test_help_tells_every_setting_with_its_default() -> None:
    _, shown, _ = run(serve, "--help")
    for name, field in SettingsSchema().fields.items():
        assert f"  {name}={field.load_default or '(not set)'}\n" in shown


def test_version_is_that_of_the_change_log() -> None:
    _, shown, _ = run(serve, "--version")
    assert shown == f"app.py, version {VERSION}\n"
    assert re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == VERSION
