"""What a process and its descendants use, read from /proc."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

PROC = Path("/proc")
Usage = tuple[int, int]  # number of processes, resident bytes


def tree_usage(root: int) -> Usage:
    """Number of processes and resident bytes of `root` and everything below it. (0, 0) where there is no /proc."""
    children: dict[int, list[int]] = defaultdict(list)
    pages: dict[int, int] = {}
    for entry in os.listdir(PROC) if PROC.is_dir() else ():
        if entry.isdigit() and (fields := _stat(entry)):
            children[int(fields[1])].append(int(entry))
            pages[int(entry)] = int(fields[21])
    todo, found = [root], []
    while todo:
        found.append(todo.pop())
        todo += children[found[-1]]
    living = [pid for pid in found if pid in pages]
    return len(living), sum(pages[pid] for pid in living) * os.sysconf("SC_PAGE_SIZE")


def _stat(pid: str) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may hold anything; nothing if the process has gone."""
    try:
        return (PROC / pid / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
