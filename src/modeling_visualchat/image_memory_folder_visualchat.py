# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""A folder of image memory files that several processes share, and its limit."""

import os
import re
import time
from collections import OrderedDict
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)

# Other files in the folder are neither counted nor deleted
MEMORY_FILE = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.safetensors")
UNFINISHED_FILE = re.compile(MEMORY_FILE.pattern + r"\.[0-9a-f-]+\.part")
# Between two readings of the whole folder, which may hold thousands of files
SCAN_SECONDS = 60.0
# A file that has not been written to for so long is one of a process that has died
UNFINISHED_SECONDS = 3600.0


class ImageMemoryFolder:
    """
    The files of an [`ImageMemoryStore`], and how many bytes of them there may be. Those used least recently go first: the
    modification time of a file says when it was used.

    Several processes may share a folder, without a lock. Each makes room for what it writes itself. It counts the files that
    others have written when it reads the folder, at most once a minute; until then the folder may hold more than `max_bytes`
    by as much. A file that another process has deleted is no error.

    Args:
        path (`str` or `os.PathLike`): The folder, made if it does not exist.
        max_bytes (`int`): Of all image memory files in it, of whatever model.
    """

    def __init__(self, path: str | os.PathLike, max_bytes: int):
        self.path, self.max_bytes = Path(path), max_bytes
        self.path.mkdir(parents=True, exist_ok=True)
        # As far as this process knows: bytes and time of use in nanoseconds, by name, used least recently first
        self._files: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._nbytes = 0
        self._scanned = -SCAN_SECONDS

    def locate(self, key: str) -> Path:
        """The path of a memory's file."""
        return self.path / f"{key}.safetensors"

    def touch(self, key: str) -> None:
        """Notes that a memory is used now."""
        path = self.locate(key)
        try:
            os.utime(path)
        except OSError:  # deleted meanwhile, or another user's file
            return
        if path.name in self._files:
            self._files[path.name] = self._files[path.name][0], time.time_ns()
            self._files.move_to_end(path.name)

    def make_room(self, nbytes: int) -> bool:
        """
        Deletes what was used least recently until there is room for a new file.

        Args:
            nbytes (`int`): Bytes of the file.

        Returns:
            `bool`: Whether there is room; a file that is larger than `max_bytes` has none, and nothing is deleted for it.
        """
        if nbytes > self.max_bytes:
            return False
        if time.monotonic() - self._scanned >= SCAN_SECONDS:
            self._scan()
        while self._files and self._nbytes + nbytes > self.max_bytes:
            self._delete_oldest()
        return True

    def add(self, key: str) -> None:
        """Counts a file that was written."""
        path = self.locate(key)
        self._nbytes -= self._files.pop(path.name, (0, 0))[0]
        found = path.stat()
        self._files[path.name] = found.st_size, found.st_mtime_ns
        self._nbytes += found.st_size

    def _scan(self) -> None:
        found = []
        for entry in os.scandir(self.path):
            is_memory = MEMORY_FILE.fullmatch(entry.name)
            if not (is_memory or UNFINISHED_FILE.fullmatch(entry.name)) or not entry.is_file(follow_symlinks=False):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
                if is_memory:
                    found.append((status.st_mtime_ns, entry.name, status.st_size))
                elif time.time() - status.st_mtime > UNFINISHED_SECONDS:
                    os.unlink(entry)
            except OSError:  # another process has deleted it, or it is another user's
                continue
        self._files = OrderedDict((name, (size, used)) for used, name, size in sorted(found))
        self._nbytes = sum(size for _, _, size in found)
        self._scanned = time.monotonic()

    def _delete_oldest(self) -> None:
        name, (size, used) = self._files.popitem(last=False)
        self._nbytes -= size
        path = self.path / name
        try:
            status = path.stat()
            if status.st_mtime_ns > used:  # by another process
                self._files[name] = status.st_size, status.st_mtime_ns
                self._nbytes += status.st_size
            else:
                path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning_once(f"{path} cannot be deleted, so {self.path} may exceed its limit: {error}")
