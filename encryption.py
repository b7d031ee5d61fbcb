"""The encryption key file."""

import os
from contextlib import suppress
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from flask import current_app

from database import StorageError, locked


class DecryptionError(StorageError):
    """A stored API key that no present encryption key decrypts; a client may read the message."""


class KeyFile:
    """The encryption key file: one Fernet key a line, of which the newest, the first, encrypts."""

    version: tuple[int, ...] = ()
    cipher: MultiFernet

    @property
    def _path(self) -> Path:
        path: Path = current_app.config["ENCRYPTION_KEY_FILE"]
        return path

    def exists(self) -> bool:
        """Return whether anything has the name of the file, readable or not."""
        return os.path.lexists(self._path)

    def read(self) -> MultiFernet:
        """Return the cipher of the present keys; raise StorageError."""
        try:
            state = self._path.stat()
            version = (state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size)
            if version != self.version:
                keys = self._path.read_bytes().split()
                self.cipher, self.version = MultiFernet([Fernet(key) for key in keys]), version
        except (OSError, ValueError) as error:
            cause = error.strerror if isinstance(error, OSError) else "not Fernet keys"
            raise StorageError(
                f"Encryption key file {self._path}: {cause}."
                " Restore it, or remove it and PUT again."
            ) from error
        return self.cipher

    def encrypt(self, text: str) -> str:
        """Return the text, encrypted with the newest key."""
        return self.read().encrypt(text.encode()).decode()

    def decrypt(self, token: str) -> str:
        """Return the text of a token; raise DecryptionError."""
        try:
            return self.read().decrypt(token).decode()
        except (InvalidToken, StorageError) as error:
            cause = str(error) or f"No key in {self._path} encrypted it."
            current_app.logger.error("The stored API key is not readable. %s", cause)
            raise DecryptionError(
                "The stored API key is not readable with the present encryption key. Restore the"
                " encryption key file, or remove it and set the provider again."
            ) from error

    def create(self) -> None:
        """Generate the file with one key, over no other file."""
        with locked(self._path.parent), suppress(FileExistsError):  # another process was first
            self._write(Fernet.generate_key() + b"\n")
            current_app.logger.warning("Generated encryption key file %s.", self._path)

    def add_key(self) -> None:
        """Put a new key before the others; raise StorageError."""
        with locked(self._path.parent):  # of two rotations at once, one would lose its key
            self.read()
            keys = Fernet.generate_key() + b"\n" + self._path.read_bytes()
            self._write(keys, replaced=self._path.stat())

    def _write(self, keys: bytes, replaced: os.stat_result | None = None) -> None:
        # Whole or not at all, and over no other file than the one given.
        new = self._path.with_name(f"{self._path.name}.new")
        try:
            with new.open("wb") as file:
                file.write(keys)
                file.flush()
                os.fsync(file.fileno())
            if replaced:  # by root, perhaps, for the user who runs the service
                os.chown(new, replaced.st_uid, replaced.st_gid)
                new.chmod(replaced.st_mode)
                new.replace(self._path)
            else:
                os.link(new, self._path)
        finally:
            new.unlink(missing_ok=True)


key_file = KeyFile()
