"""Everything that a visit has brought so far, in one file."""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path

LOG_BYTES = 2**18
"""Kept of a log, the last ones: logs say at their end what went wrong."""

LEFT_OUT = ("triton-cache",)


def pack(folder: Path, archive: Path) -> None:
    """Write `archive` (.tar.gz) anew from a folder of results, `summary.md` first.

    It is replaced in one step, so that whoever takes it gets a whole one.
    """
    paths = sorted(
        (path for path in folder.rglob("*") if path.is_file() and path != archive),
        key=lambda path: (path.name != "summary.md", path),
    )
    new = archive.with_name(f".{archive.name}.new")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(new, "w:gz", compresslevel=6) as tar:
        for path in paths:
            inside = path.relative_to(folder)
            if inside.parts[0] in LEFT_OUT or path == new or path.suffix == ".new":
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # a journal, whose run has ended meanwhile
                continue
            content = content[-LOG_BYTES if path.suffix == ".log" else 0 :]
            member = tarfile.TarInfo(f"visit/{inside.as_posix()}")
            member.size, member.mtime = len(content), int(time.time())
            tar.addfile(member, io.BytesIO(content))
    new.replace(archive)
