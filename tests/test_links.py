"""The path of the database leads to another file, or to one of another kind."""

import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing
from functools import partialmethod
from pathlib import Path

import pytest
from conftest import (
    CONFIG,
    OTHER,
    StartApp,
    StartServer,
    close_database,
    flask,
)
from flask import Flask
from processes import run, serve

from database import DatabaseFile, StorageError, transaction
from models import ProviderConfig


def test_removed_wal_of_a_link_to_the_database_is_noticed(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link.db").symlink_to(tmp_path / "ai-provider.db")
    link = f"sqlite:///{tmp_path}/elsewhere/link.db"
    server = start_server(DATABASE_URL=link)
    server.put(CONFIG, credential)
    (tmp_path / "ai-provider.db-wal").unlink()
    assert server.put(OTHER, credential).status == 200
    server.stop(signal.SIGKILL)
    assert start_server(DATABASE_URL=link).get(credential).body["data"]["provider"] == "other"


def lead_elsewhere(link: Path) -> None:
    """Have the link lead to a copy that is as old as the original."""
    copy = link.with_name("copy")
    copy.mkdir()
    for file in link.resolve().parent.glob("ai-provider.db*"):
        shutil.copy2(file, copy)
    link.unlink()
    link.symlink_to(copy / "ai-provider.db")


def test_link_that_leads_to_another_database_is_noticed(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    link = tmp_path / "links" / "link.db"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "ai-provider.db")
    server = start_server(DATABASE_URL=f"sqlite:///{link}")
    server.put(CONFIG, credential)
    lead_elsewhere(link)
    assert server.put(OTHER, credential).status == 200
    server.stop(signal.SIGKILL)
    shown = start_server(DATABASE_URL=f"sqlite:///{link}").get(credential)
    assert shown.body["data"]["provider"] == "other"


def test_link_that_leads_to_another_database_at_commit_is_an_error(
    start_app: StartApp, monkeypatch: pytest.MonkeyPatch, app: Flask, tmp_path: Path
) -> None:
    close_database(app)
    link = tmp_path / "links" / "link.db"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "ai-provider.db")
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{link}")
    other_app = start_app()
    with other_app.app_context(), pytest.raises(StorageError, match="its files were removed"):
        lead_elsewhere_in_a_transaction(link)


def lead_elsewhere_in_a_transaction(link: Path) -> None:
    with transaction():
        lead_elsewhere(link)


def test_folder_where_a_link_leads_is_locked(app: Flask, tmp_path: Path) -> None:
    link = tmp_path / "links" / "link.db"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "ai-provider.db")
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    refusal = pytest.raises(StorageError, match="Another program locks the folder")
    with refusal, DatabaseFile(app, link).alone(tries=1):
        pass
    os.close(folder)


def test_database_that_is_moved_with_the_link_to_it_is_noticed(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    link, moved = tmp_path / "links" / "link.db", tmp_path / "links" / "moved.db"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "ai-provider.db")
    server = start_server(DATABASE_URL=f"sqlite:///{link}")
    server.put(CONFIG, credential)
    (tmp_path / "ai-provider.db").rename(moved)
    link.unlink()
    link.symlink_to(moved)
    assert server.put(OTHER, credential).status == 200
    server.stop(signal.SIGKILL)
    again = start_server(DATABASE_URL=f"sqlite:///{link}")
    assert again.get(credential).body["data"]["provider"] == "other"


def test_link_to_a_copy_with_the_same_inodes_is_noticed(
    monkeypatch: pytest.MonkeyPatch, start_app: StartApp, tmp_path: Path
) -> None:
    folder, snapshot, link = (tmp_path / name for name in ("folder", "snapshot", "link"))
    folder.mkdir()
    link.symlink_to(folder)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{link}/ai-provider.db")
    app = start_app()
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    shutil.copytree(folder, snapshot)
    stat = Path.stat

    def stat_file_system(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        status = stat(path, follow_symlinks=follow_symlinks)
        if Path(os.path.realpath(path)).parent != snapshot:
            return status
        twin = stat(folder / path.name)
        times = {"st_mtime_ns": twin.st_mtime_ns}
        return os.stat_result((status.st_mode, twin.st_ino, twin.st_dev + 1, *status[3:]), times)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat_file_system)
        patch.setattr(Path, "lstat", partialmethod(stat_file_system, follow_symlinks=False))
        link.unlink()
        link.symlink_to(snapshot)
        with app.app_context():
            ProviderConfig.put("other", "key", "author")
    with closing(sqlite3.connect(snapshot / "ai-provider.db")) as database:
        assert database.execute("SELECT provider FROM provider_config").fetchall() == [("other",)]


def test_database_that_is_a_loop_of_links_is_one_clear_line(tmp_path: Path) -> None:
    loop = tmp_path / "loop.db"
    loop.symlink_to(loop)
    url = f"sqlite:///{loop}"
    for result in (run(serve, DATABASE_URL=url), flask("provider", "show", DATABASE_URL=url)):
        assert (result[0], result[2].count("\n")) == (1, 1)
        assert result[2].startswith("Error: ")


def test_folder_that_is_moved_and_copied_is_noticed(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    folder, copy = tmp_path / "folder", tmp_path / "copy"
    folder.mkdir()
    (tmp_path / "ai-provider.db").rename(folder / "ai-provider.db")
    url = f"sqlite:///{folder}/ai-provider.db"
    server = start_server(DATABASE_URL=url)
    server.put(CONFIG, credential)
    long_ago = (0, 0)
    os.utime(folder, long_ago)
    server.put(CONFIG, credential)
    subprocess.run(["cp", "-a", folder, copy], check=True)
    folder.rename(tmp_path / "old")
    folder.symlink_to(copy)
    assert server.put(OTHER, credential).status == 200
    server.stop(signal.SIGKILL)
    assert start_server(DATABASE_URL=url).get(credential).body["data"]["provider"] == "other"


def test_copy_of_the_wal_is_noticed_in_a_folder_that_keeps_its_time(
    app: Flask, tmp_path: Path
) -> None:
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    connection, before = app.extensions["database_file"].connect(), tmp_path.stat()
    shutil.copy(tmp_path / "ai-provider.db-wal", tmp_path / "copy")
    (tmp_path / "copy").replace(tmp_path / "ai-provider.db-wal")
    os.utime(tmp_path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert app.extensions["database_file"].connect() is not connection
