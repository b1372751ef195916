# SPDX-License-Identifier: BSD-3-Clause
"""Files that grow past the page cache hold what was appended, whatever the file system can do."""

import errno
import fcntl
import os
import random
import resource
from pathlib import Path

import pytest

from torchrec_scratchpipe.checkpoint import appending
from torchrec_scratchpipe.checkpoint.appending import PAGE_BYTES, AppendedFile

pytestmark = pytest.mark.any_torchrec


@pytest.fixture(params=["direct", "refused when opened", "refused when written"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the file system does with O_DIRECT."""
    set_flags, write = fcntl.fcntl, os.pwrite

    def refuse_flag(descriptor: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return set_flags(descriptor, command, value)

    def refuse_write(descriptor: int, data: memoryview, offset: int) -> int:
        if set_flags(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "larger blocks")
        return write(descriptor, data, offset)

    if request.param == "refused when opened":
        monkeypatch.setattr(fcntl, "fcntl", refuse_flag)
    elif request.param == "refused when written":
        monkeypatch.setattr(os, "pwrite", refuse_write)
    return str(request.param)


def test_it_holds_what_was_appended(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appending, "BUFFER_BYTES", 2 * PAGE_BYTES)
    rng = random.Random(0)
    num_truncated = num_large = 0
    for history in range(20):
        path = tmp_path / str(history)
        file = AppendedFile(path)
        expected = b""
        for _ in range(40):
            act = rng.choice(["append", "append", "append", "flush", "sync", "truncate", "finish"])
            if act == "append":
                data = rng.randbytes(rng.choice([0, 1, 40, PAGE_BYTES - 1, PAGE_BYTES, rng.randrange(20_000)]))
                num_large += len(data) > 2 * PAGE_BYTES
                file.append(data)
                expected += data
            elif act == "truncate":
                file.flush()
                kept = rng.randrange(len(expected) // PAGE_BYTES + 1) * PAGE_BYTES
                num_truncated += kept < len(expected)
                file.truncate(kept)
                expected = expected[:kept]
                assert path.read_bytes() == expected
            elif act == "finish":
                file.finish()
                assert path.read_bytes() == expected
            else:
                file.flush() if act == "flush" else file.sync()
                found = path.read_bytes()
                assert found[: len(expected)] == expected
                assert len(found) % PAGE_BYTES == 0
                assert len(found) - len(expected) < PAGE_BYTES
                assert not any(found[len(expected) :])
            assert file.num_bytes == len(expected)
        file.close()
    assert num_truncated > 20
    assert num_large > 20


def test_a_file_that_may_grow_no_more_says_so_and_goes_on_later(tmp_path: Path) -> None:
    file = AppendedFile(tmp_path / "file")
    first, second = (random.Random(seed).randbytes(50_000) for seed in range(2))
    file.append(first[: 4 * PAGE_BYTES])
    file.sync()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * PAGE_BYTES + 100, limit[1]))
        file.append(first[4 * PAGE_BYTES :])
        with pytest.raises(OSError, match="File too large"):
            file.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    file.truncate(4 * PAGE_BYTES)
    file.append(second)
    file.sync()
    file.close()
    content = (tmp_path / "file").read_bytes()
    assert content[: 4 * PAGE_BYTES] == first[: 4 * PAGE_BYTES]
    assert content[4 * PAGE_BYTES :][:50_000] == second


def test_the_page_cache_is_left_alone(tmp_path: Path) -> None:
    file = AppendedFile(tmp_path / "file")
    if not fcntl.fcntl(file._descriptor, fcntl.F_GETFL) & os.O_DIRECT:
        pytest.skip("this file system has no O_DIRECT")
    file.append(bytes([1]) * (3 * appending.BUFFER_BYTES // 2))
    file.sync()
    assert fcntl.fcntl(file._descriptor, fcntl.F_GETFL) & os.O_DIRECT, "it was given up"
    file.close()
    assert (tmp_path / "file").read_bytes() == bytes([1]) * (3 * appending.BUFFER_BYTES // 2)
