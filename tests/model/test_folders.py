"""Damaged folders: a good one with one thing damaged ends in a named error, or loads as what it is.

A few in CI, by hand as many as one likes, with time and memory: `python -m tests.model.test_folders 5000`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.course.training.bpe import train_tokenizer
from minillm.course.training.checkpoint import save_checkpoint
from minillm.errors import CheckpointError, RequestError
from minillm.model.loader import load_model
from minillm.model.tokenizer import load_tokenizer
from tests.model.test_loader import shard, unpacked
from tests.model.test_tokenizer import CODE, write_model_folder

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2.5,
    10**12,
    10**30,
    float("nan"),
    "",
    "x",
    "64",
    [],
    [[0]],
    {},
    {"a": 1},
    "\ud800",
]
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
HELLO = [{"role": "user", "content": "hello"}]


def good_folder(folder: Path, sharded: bool) -> Path:
    save_checkpoint(unpacked("qwen3", vocab_size=320), folder, dtype=torch.float32)
    write_model_folder(folder, train_tokenizer([CODE * 3], vocab_size=320), chat_template=CHAT)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7], "temperature": 0.6}')
    if sharded:
        shard(folder)
    return folder


def places(value: Any, depth: int = 0) -> list[Callable[[Any], None]]:
    """Functions that put another value somewhere into a JSON value; the last entries of long lists are left alone."""
    found: list[Callable[[Any], None]] = []
    if isinstance(value, dict | list) and depth < 4:
        for key in list(value)[:40] if isinstance(value, dict) else range(min(len(value), 5)):
            found.append(lambda new, key=key: value.__setitem__(key, new))
            found += places(value[key], depth + 1)
    return found


def damage_json(path: Path, rng: random.Random) -> str:
    """One value of a JSON file replaced, removed or doubled."""
    content = json.loads(path.read_text())
    key = rng.choice(sorted(content))
    kind = rng.choice(("replace", "replace", "replace", "drop", "all"))
    if kind == "drop":
        del content[key]
    elif kind == "all":
        content = rng.choice(ODD)
    else:
        new = rng.choice(ODD)
        rng.choice(places(content))(new)
    path.write_text(json.dumps(content))
    return kind


def damage_bytes(path: Path, rng: random.Random) -> str:
    """A file cut, lengthened, or with some of its first bytes changed."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(("cut", "longer", "flip", "flip", "empty", "text"))
    if kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "longer":
        data += bytes(rng.randrange(1, 99))
    elif kind == "flip":
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(min(len(data), 2000))] = rng.randrange(256)
    else:
        data = bytearray(b"" if kind == "empty" else b"[" * 100_000)
    path.write_bytes(data)
    return kind


def damage_file(path: Path, rng: random.Random) -> str:
    """Something else in the file's place."""
    kind = rng.choice(("missing", "directory", "fifo", "zero", "dangling", "loop"))
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to({"zero": "/dev/zero", "dangling": "/nowhere", "loop": path}[kind])
    return kind


def damage(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    ways = [damage_bytes, damage_file] + [damage_json] * 2 * (path.suffix == ".json")
    how = rng.choice(ways)
    return f"{path.name}: {how(path, rng)}"


def outcome(folder: Path) -> str:
    """What the whole folder ends as; anything but a named error passes through."""
    try:
        load_model(folder, device="cpu", dtype="float32", progress=False)
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        assert "def" in tokenizer.decode(tokenizer.encode("def f")) or len(tokenizer.vocabulary) < 320
        try:
            tokenizer.apply_chat_template(HELLO)
        except RequestError as error:
            if "no chat template" not in str(error):
                raise
    except (CheckpointError, RequestError) as error:
        assert len(str(error)) > 20
        return type(error).__name__
    return "loaded"


@pytest.mark.parametrize("seed", range(6))
def test_one_damage_is_named_or_harmless(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    original = good_folder(tmp_path / "good", sharded=seed % 2 == 1)
    assert outcome(original) == "loaded"
    seen: Counter[str] = Counter()
    for count in range(12):
        folder = tmp_path / f"damaged{count}"
        shutil.copytree(original, folder)
        what = damage(folder, rng)
        try:
            seen[outcome(folder)] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}, folder {count}, {what}") from error
    assert seen["CheckpointError"], f"seed {seed}: {seen}"


def main(count: int) -> None:
    root = Path(tempfile.mkdtemp())
    originals = [good_folder(root / name, sharded) for name, sharded in (("one", False), ("several", True))]
    seen: Counter[str] = Counter()
    slowest = (0.0, "")
    for seed in range(count):
        rng, folder = random.Random(seed), root / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(rng.choice(originals), folder)
        what = f"seed {seed}, {damage(folder, rng)}"
        begin = time.perf_counter()
        try:
            seen[outcome(folder)] += 1
        except Exception as error:
            seen["UNNAMED"] += 1
            print(f"{what}: {type(error).__name__}: {error!s:.200}")
        slowest = max(slowest, (time.perf_counter() - begin, what))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{count} folders: {dict(seen)}; slowest {slowest[0]:.1f} s ({slowest[1]}); peak {peak} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]))
