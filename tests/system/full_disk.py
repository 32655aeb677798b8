"""Full disks: a limit on the size of this process's files, or a small file system that a test fills."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def no_file_above(most_bytes: int) -> Iterator[None]:
    """No file of this process can grow above this size; writing more fails with EFBIG (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class SmallDisk:
    """A file system of a few megabytes, mounted at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, leave: int = 8192) -> None:
        """Fills the disk, except for the given number of bytes."""
        with self._filler.open("ab", buffering=0) as stream:
            with contextlib.suppress(OSError):
                while stream.write(bytes(4096)):
                    pass
            assert shutil.disk_usage(self.folder).free == 0
            stream.truncate(max(stream.tell() - leave, 0))

    def empty(self) -> None:
        """Removes what `fill` has written."""
        self._filler.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 4) -> Iterator[SmallDisk]:
    """Mounts a small disk in a new folder. Skips the test where this user may not mount."""
    folder.mkdir(parents=True)
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    mount = [*sudo, "mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=777", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk needs a mount: root, or sudo without a password")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run([*sudo, "umount", "-l", str(folder)], check=True, capture_output=True)
