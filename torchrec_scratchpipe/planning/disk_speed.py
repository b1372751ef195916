# SPDX-License-Identifier: BSD-3-Clause
"""How fast is a disk for tables? Measures it in the way in which training uses it.

Installed, it is `torchrec-scratchpipe disk`.

    python -m torchrec_scratchpipe.disk /fast/disk

Writes one file in order, has the system forget it, and reads pages of it at random: one after another, and many at a
time. The file never has a name, and is gone at the end.
"""

import argparse
import json
import mmap
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from torchrec_scratchpipe.core.disk import MappedStorage
from torchrec_scratchpipe.core.disk_reads import MAX_DEPTH, DiskReader, Pieces
from torchrec_scratchpipe.core.row_log import SEGMENT_BYTES
from torchrec_scratchpipe.errors import ScratchPipeError

__all__ = ["DiskSpeed", "main", "measure_disk"]

DEPTHS = (1, 32, 128, MAX_DEPTH)  # reads in flight; training has the last so many


@dataclass(frozen=True)
class DiskSpeed:
    """What a disk did: pages of :data:`mmap.PAGESIZE` bytes a second, by reads in flight."""

    directory: str
    file_bytes: int
    write_bytes_per_s: float
    reads_per_s: dict[int, float]
    one_read_p50_ms: float
    one_read_p99_ms: float

    @property
    def best_reads_per_s(self) -> float:
        """At the best number of reads in flight."""
        return max(self.reads_per_s.values())

    def __str__(self) -> str:
        many = ", ".join(f"{reads:,.0f} with {depth}" for depth, reads in self.reads_per_s.items() if depth > 1)
        hidden = ", ".join(f"{self.best_reads_per_s * ms / 1000:,.0f} in {ms} ms" for ms in (50, 100, 200))
        return (
            f"{self.directory}: reads of {mmap.PAGESIZE:,} bytes at random: {self.reads_per_s[1]:,.0f} a second one by "
            f"one ({self.one_read_p50_ms:.3f} ms, P99 {self.one_read_p99_ms:.3f} ms); in flight: {many}\n"
            f"writes in order: {self.write_bytes_per_s / 1e6:,.0f} MB a second\n"
            f"rows that a step can have from this disk without waiting for it: {hidden}\n"
            f"A plan says how many it needs: torchrec-scratchpipe plan --disk_reads_per_s {self.best_reads_per_s:.0f} "
            "--ram_budget_gb ..."
        )


def measure_disk(directory: str | os.PathLike[str], seconds: float = 20.0, file_gb: float = 2.0) -> DiskSpeed:
    """Measure the disk of a directory.

    Args:
        directory: Existing; tables may be kept there.
        seconds: How long reads are measured; writing the file comes before.
        file_gb: Size of the file, in GiB. Larger than the cache of a RAID controller.

    Returns:
        What it did.

    Raises:
        TableStorageError: The directory is missing, read-only or full.
        ScratchPipeError: The file stays in RAM, as in a tmpfs.
    """
    storage = MappedStorage(directory)
    num_pages = max(len(DEPTHS) * DEPTHS[-1], int(file_gb * 1024**3) // mmap.PAGESIZE)
    pages = storage.allocate(num_pages * mmap.PAGESIZE, torch.uint8, "a file to measure the disk").view(num_pages, -1)
    # 1. In order.
    start_s = time.perf_counter()
    for some in pages.split(SEGMENT_BYTES // mmap.PAGESIZE):
        some.fill_(1)
    storage.persist()
    write_bytes_per_s = pages.nbytes / (time.perf_counter() - start_s)
    # 2. At random, each page once.
    storage.forget_pages()
    file, reader = storage.file_of(pages), DiskReader()
    assert file is not None, "the file was just allocated"
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))
    first, reads_per_s, waits_ms = 0, {}, []
    bytes_before = _bytes_from_disks()
    for depth in DEPTHS:
        begin, start_s = first, time.perf_counter()
        last = begin + num_pages // len(DEPTHS)
        while (now_s := time.perf_counter()) < start_s + seconds / len(DEPTHS) and first + depth <= last:
            begins = order[first : first + depth].sort().values * mmap.PAGESIZE
            reader.read([Pieces(file, begins, mmap.PAGESIZE)])
            first += depth
            if depth == 1:
                waits_ms.append(1e3 * (time.perf_counter() - now_s))
        reads_per_s[depth] = (first - begin) / (time.perf_counter() - start_s)
    if bytes_before is not None and bytes_before == _bytes_from_disks():
        raise ScratchPipeError(
            f"{str(directory)!r}: the file did not leave RAM, so that no disk was measured. Is it a tmpfs? Name a "
            "directory on the disk that is to have the tables."
        )
    waits = torch.tensor(waits_ms, dtype=torch.float64)
    p50, p99 = waits.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return DiskSpeed(str(directory), pages.nbytes, write_bytes_per_s, reads_per_s, p50, p99)


def _bytes_from_disks() -> int | None:
    """All that this process had read from disks so far; None if the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print, or say why not.

    Args:
        arguments: Of the command line; None for the process's own.

    Returns:
        The exit status: 0, or 1 with one line that says why.
    """
    parser = argparse.ArgumentParser(
        prog="torchrec-scratchpipe disk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="an existing one on the disk, the table_dir of a sharder")
    parser.add_argument("--seconds", type=float, default=20.0, help="of reading, after the file is written")
    parser.add_argument("--file_gb", type=float, default=2.0, help="size of the file, in GiB")
    parser.add_argument("--json", help="where the figures go, too")
    args = parser.parse_args(arguments)
    if not (args.seconds > 0 and 0 < args.file_gb < 1e6):
        parser.error("--seconds and --file_gb must be numbers above 0")
    try:
        speed = measure_disk(args.directory, args.seconds, args.file_gb)
        if args.json:
            Path(args.json).write_text(json.dumps(asdict(speed), indent=1) + "\n")
    except (ScratchPipeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(speed)
    return 0
