"""The encryption key file."""

import os
from contextlib import suppress
from pathlib import Path
from time import time

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from flask import current_app

from database import StorageError, storage_errors, transaction


class KeyFileError(StorageError):
    """A key file that is missing, malformed, or has no key for what is stored."""

    remedy = "Restore it (see README), or set the provider again (if damaged, move it away first)."
    public = f"The encryption key file is missing, damaged, or lacks the right key. {remedy}"


class KeyFile:
    """The encryption key file: one Fernet key per line; the newest, the first, encrypts."""

    version: tuple[int, ...] = ()

    @property
    def path(self) -> Path:
        """Where ENCRYPTION_KEY_FILE is, links followed."""
        return Path(os.path.realpath(current_app.config["ENCRYPTION_KEY_FILE"]))

    @storage_errors("ENCRYPTION_KEY_FILE: ")
    def read(self) -> MultiFernet:
        """Return the cipher of the present keys; raise StorageError."""
        path: Path = current_app.config["ENCRYPTION_KEY_FILE"]
        try:
            state = path.stat()
            version = (state.st_dev, state.st_ino, state.st_size, state.st_ctime_ns)
            if version != self.version:
                # Before Linux 6.13, two changes within 4 ms (or 10) leave the same time.
                is_young = abs(time() - state.st_ctime) < 0.1
                if not path.is_file():  # a FIFO would block
                    raise StorageError(f"ENCRYPTION_KEY_FILE must name a regular file, not {path}.")
                self.cipher = MultiFernet([Fernet(key) for key in path.read_bytes().split()])
                for place in (self.path, self.path.parent):  # its writer may not have waited
                    with suppress(OSError):  # which a folder or a file system may not permit
                        sync(place)
                self.version = () if is_young else version
        except (FileNotFoundError, ValueError) as error:
            cause = getattr(error, "strerror", "not one Fernet key per line")
            fault = f"ENCRYPTION_KEY_FILE: {self.path}: {cause}."
            raise KeyFileError(f"{fault} {KeyFileError.remedy}") from error
        return self.cipher

    def encrypt(self, text: str) -> str:
        """Encrypt with the newest key, within the caller's transaction; raise StorageError."""
        if not current_app.config["ENCRYPTION_KEY_FILE"].exists():
            self.create()  # what the lost one encrypted is about to be replaced
        return self.read().encrypt(text.encode()).decode()

    def decrypt(self, token: str) -> str:
        """Decrypt with any of the keys; raise StorageError."""
        try:
            return self.read().decrypt(token).decode()
        except (InvalidToken, TypeError, ValueError) as error:
            fault = f"ENCRYPTION_KEY_FILE: {self.path}: no key in it decrypts what is stored."
            raise KeyFileError(f"{fault} {KeyFileError.remedy}") from error

    def create(self) -> None:
        """Generate the file, unless anything has its name, within the caller's transaction."""
        if not os.path.lexists(self.path):
            self._write()
            current_app.logger.warning("Generated encryption key file %s.", self.path)

    def add_key(self) -> None:
        """Put a new key before the others, within the caller's transaction; raise StorageError."""
        self.read()
        self._write(self.path.read_bytes())

    @storage_errors("ENCRYPTION_KEY_FILE: ")
    def prepare(self) -> None:
        """Remove what a killed rotation left; raise StorageError, or warn of others' access."""
        leftover = Path(f"{self.path}.new")
        if os.path.lexists(leftover):  # or another process is about to rename it
            with transaction():
                leftover.unlink(missing_ok=True)
        if os.path.lexists(self.path):
            self.read()
            if self.path.stat().st_mode & 0o026:  # the group may read
                current_app.logger.warning("Others can access keys. Run: chmod 600 %s", self.path)

    @storage_errors("ENCRYPTION_KEY_FILE: ")
    def _write(self, former: bytes | None = None) -> None:
        # Writes all or nothing: a new key before the former ones, in place of their file alone.
        new = Path(os.path.realpath(self.path.parent, strict=True), f"{self.path.name}.new")
        try:
            new.unlink(missing_ok=True)  # a killed creation leaves a link to the key file itself
            new.touch(0o600)
            new.chmod(0o600)  # whatever the umask
            new.write_bytes(Fernet.generate_key() + b"\n" + (former or b""))
            sync(new)
            if former is None:
                os.link(new, self.path)
            else:
                status = self.path.stat()  # it is root, perhaps, who replaces it for the service
                os.chown(new, status.st_uid, status.st_gid)
                new.chmod(status.st_mode)
                if self.path.read_bytes() != former:  # another has written without the lock
                    raise StorageError(f"ENCRYPTION_KEY_FILE: {self.path} was changed meanwhile.")
                new.replace(self.path)
            sync(new.parent)
        finally:
            new.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk; raise OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


key_file = KeyFile()
