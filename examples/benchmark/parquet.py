# SPDX-License-Identifier: BSD-3-Clause
"""How many samples ParquetBatches gives in a second on one core, beside pyarrow that reads and converts nothing.

    python examples/benchmark/parquet.py --json PATH

A file of the shape of Criteo is generated: a label, 13 integers and 26 ids of 32 bits, some of them missing. Both read
the same columns on one thread, in turns, so that both meet the same noise.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import torch
from pyarrow import parquet

from torchrec_scratchpipe.data import ParquetBatches

DENSE = [f"int_{i}" for i in range(13)]
SPARSE = [f"cat_{i}" for i in range(26)]


def write_file(path: Path, num_rows: int, rows_per_group: int, missing: float) -> None:
    """A file of the shape of Criteo.

    Args:
        path: Where it goes.
        num_rows: Samples.
        rows_per_group: Samples of a row group.
        missing: Share of the values that are missing.
    """
    rng = np.random.default_rng(0)

    def column(values: np.ndarray) -> pyarrow.Array:
        return pyarrow.array(values, mask=rng.random(values.size) < missing if missing else None)

    columns = {"label": pyarrow.array(rng.integers(0, 2, num_rows, dtype=np.int32))}
    columns |= {name: column(rng.geometric(0.02, num_rows).astype(np.int32)) for name in DENSE}
    for name in SPARSE:
        ranks = np.minimum(rng.zipf(1.2, num_rows), 10_000_000).astype(np.uint32)
        columns[name] = column(ranks * np.uint32(0x9E3779B1))
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_per_group)


def read_batches(path: Path, batch_size: int, num_readers: int) -> None:
    batches = ParquetBatches(
        path,
        label="label",
        dense=DENSE,
        sparse=SPARSE,
        batch_size=batch_size,
        hash_sizes=1_000_000,
        dense_transform="log1p",
        num_readers=num_readers,
    )
    for _ in batches:
        pass


def read_tables(path: Path) -> None:
    with parquet.ParquetFile(path) as file:
        for index in range(file.metadata.num_row_groups):
            file.read_row_group(index, columns=["label", *DENSE, *SPARSE], use_threads=False)


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Samples per second, and our share of pyarrow's, without and with missing values."""
    figures = {}
    for name, missing in (("no value missing", 0.0), ("5 % missing", 0.05)):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "criteo.parquet"
            write_file(path, args.num_rows, args.rows_per_group, missing)
            ours: list[float] = []
            theirs: list[float] = []
            for _ in range(args.rounds):
                ours.append(_seconds(lambda path=path: read_batches(path, args.batch_size, args.num_readers)))
                theirs.append(_seconds(lambda path=path: read_tables(path)))
        figures[name] = {
            "samples_per_s": args.num_rows / statistics.median(ours),
            "pyarrow_samples_per_s": args.num_rows / statistics.median(theirs),
            "ratio": statistics.median(t / o for o, t in zip(ours, theirs, strict=True)),
        }
    return figures


def _seconds(work: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_rows", type=int, default=1_000_000, help="samples of the file")
    parser.add_argument("--rows_per_group", type=int, default=65_536, help="samples of a row group")
    parser.add_argument("--batch_size", type=int, default=4096, help="samples of a batch")
    parser.add_argument("--num_readers", type=int, default=1, help="threads that read ahead")
    parser.add_argument("--rounds", type=int, default=5, help="times that each of the two reads the file")
    parser.add_argument("--json", help="where the figures go, too")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity") and args.num_readers == 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    figures = measure(args)
    for name, each in figures.items():
        print(
            f"{name}: {each['samples_per_s']:,.0f} samples/s on one core, pyarrow alone "
            f"{each['pyarrow_samples_per_s']:,.0f}, ratio {each['ratio']:.2f}"
        )
    if args.json is not None:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
