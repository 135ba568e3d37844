"""Stages of a run: each writes one folder, whole or not at all, and is skipped where nothing it
depends on has changed."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from curvature.artifacts import fingerprint, read_json, write_json

PACKAGES = ("curvature", "surgery", "evals", "rl")


@cache
def code_sha256() -> str:
    """Hash of Lethe's own sources: a result of other code is not reused."""
    root = Path(__file__).resolve().parent.parent
    files = [root / "run.py", *(p for name in PACKAGES for p in (root / name).rglob("*.py"))]
    return fingerprint(
        **{str(p.relative_to(root)): p.read_text(encoding="utf-8") for p in sorted(files)}
    )


@dataclass(frozen=True)
class Stage:
    """A finished stage. value: what it computed, as JSON. folder: its files. seconds: what it took
    when it ran.

    peak_memory: the process's peak resident memory when it ended, bytes. reused: it was found, not
        run.
    """

    name: str
    value: Any
    folder: Path
    fingerprint: str
    seconds: float
    peak_memory: int
    reused: bool


class Stages:
    """The stages of one run folder.

    A stage computes in `stages/.<name>.partial`; only when all its files are there is that folder
    renamed to `stages/<name>`. A process killed at any point therefore leaves finished stages and
    at most one partial folder, which the next run throws away.
    """

    def __init__(
        self, folder: Path, announce: Callable[[str, bool], None] = lambda name, reused: None
    ) -> None:
        self.folder = folder / "stages"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.announce = announce
        self.done: dict[str, Stage] = {}

    def run(self, name: str, depends: Mapping[str, Any], compute: Callable[[Path], Any]) -> Stage:
        """The stage `name`: read back where its fingerprint (of `depends` and the code) matches,
        computed otherwise.

        compute(folder) writes the stage's files into `folder` and returns its value, plain JSON
        data.
        """
        mark = fingerprint(stage=name, code=code_sha256(), **depends)
        if name in self.done and self.done[name].fingerprint == mark:
            return self.done[name]
        final, partial = self.folder / name, self.folder / f".{name}.partial"
        record_file = final / "stage.json"
        if record_file.exists():
            record = read_json(record_file)
            if record["fingerprint"] == mark:
                self.announce(name, True)
                stage = Stage(
                    name,
                    record["value"],
                    final,
                    mark,
                    record["seconds"],
                    record["peak_memory"],
                    True,
                )
                self.done[name] = stage
                return stage
        self.announce(name, False)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        started = time.perf_counter()
        try:
            value = compute(partial)
            seconds = time.perf_counter() - started
            record = {
                "fingerprint": mark,
                "seconds": seconds,
                "peak_memory": peak_memory(),
                "value": value,
            }
            write_json(partial / "stage.json", record)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if final.exists():
            stale = self.folder / f".{name}.stale"
            shutil.rmtree(stale, ignore_errors=True)
            os.replace(final, stale)
            os.replace(partial, final)
            shutil.rmtree(stale)
        else:
            os.replace(partial, final)
        # Read back rather than handed on, so that a run and its replay see the very same value.
        stage = Stage(
            name,
            read_json(record_file)["value"],
            final,
            mark,
            seconds,
            record["peak_memory"],
            False,
        )
        self.done[name] = stage
        return stage


def peak_memory() -> int:
    """Peak resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; a second run on it is refused with a ValueError. Freed
    when the process ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder}: another run is at work in this folder; "
                "wait for it or choose another --out"
            ) from error
        yield
