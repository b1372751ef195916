# SPDX-License-Identifier: BSD-3-Clause
"""How fast rows travel between table and scratchpad, beside a plain copy of as many bytes.

    python examples/benchmark/bandwidth.py --embedding_dim 128 --rows_per_batch 100000 --json PATH

On a GPU: plain copies between page-locked and device memory, each way and both ways at once, then the kernels that
gather and scatter rows in place, with different numbers of programs. On a CPU: what the stages do there, beside a copy
of RAM.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from torchrec_scratchpipe.core.rows import read_rows, write_rows
from torchrec_scratchpipe.core.slot_ops import Count
from torchrec_scratchpipe.core.storage import PageLockedStorage, RamStorage, TableStorage

NUM_REPEATS = 10


def measure_bandwidth(device: torch.device, dim: int, rows_per_batch: int, num_rows: int = 2_000_000) -> dict[str, Any]:
    """GB/s of every way that rows are moved.

    Args:
        device: Where scratchpads are.
        dim: Float32 values per row.
        rows_per_batch: Rows that are moved at a time.
        num_rows: Rows of the table that they are spread over.

    Returns:
        GB/s, of one direction unless the name says ``both``, then of the two together.
    """
    storage: TableStorage = PageLockedStorage() if device.type == "cuda" else RamStorage()
    table = storage.allocate(num_rows * dim, torch.float32, "table").view(num_rows, dim)
    table.fill_(1.0)
    slots = torch.zeros(2 * rows_per_batch, dim, dtype=torch.float32, device=device)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(num_rows, generator=generator, dtype=torch.int64)[: 2 * rows_per_batch].to(device)
    places = torch.randperm(2 * rows_per_batch, generator=generator, dtype=torch.int64).to(device)
    num_bytes = rows_per_batch * dim * 4
    if device.type == "cuda":
        return _measure_cuda(table, slots, rows, places, num_bytes)
    out = torch.empty(rows_per_batch, dim, dtype=torch.float32)
    first = rows[:rows_per_batch]
    return {
        "plain copy": _gb_per_s(lambda: out.copy_(table[:rows_per_batch]), num_bytes),
        "gather rows of the table": _gb_per_s(lambda: read_rows([table], first, [out]), num_bytes),
        "scatter rows to the table": _gb_per_s(lambda: write_rows([table], first, [out]), num_bytes),
    }


def _measure_cuda(table: Tensor, slots: Tensor, rows: Tensor, places: Tensor, num_bytes: int) -> dict[str, Any]:
    from torchrec_scratchpipe.core import triton_ops

    half = rows.numel() // 2
    staging = torch.empty(half, table.shape[1], dtype=torch.float32, pin_memory=True)
    back = torch.empty(half, table.shape[1], dtype=torch.float32, pin_memory=True)
    streams = [torch.cuda.Stream() for _ in range(2)]
    counts = torch.full((len(Count),), half, dtype=torch.int64, device=slots.device)
    ops = triton_ops.TritonOps()

    def on_both(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for stream, operation in zip(streams, (first, second), strict=True):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    operation()
            for stream in streams:
                torch.cuda.current_stream().wait_stream(stream)

        return run

    def copy_in() -> None:
        slots[:half].copy_(staging, non_blocking=True)

    def copy_out() -> None:
        back.copy_(slots[half:], non_blocking=True)

    def fill() -> None:
        ops.move(table, rows[:half], slots, places[:half].int(), counts, Count.FILLS)

    def write_back() -> None:
        ops.move(slots, places[half:].int(), table, rows[half:], counts, Count.WRITEBACKS)

    def staged_fill() -> None:
        read_rows([table], rows[:half].cpu(), [staging])
        slots.index_copy_(0, places[:half], staging.to(slots.device, non_blocking=True))

    speeds: dict[str, Any] = {
        "plain copy to device": _gb_per_s(copy_in, num_bytes),
        "plain copy to host": _gb_per_s(copy_out, num_bytes),
        "plain copy, both": _gb_per_s(on_both(copy_in, copy_out), 2 * num_bytes),
        "staged fill": _gb_per_s(staged_fill, num_bytes),
    }
    for order in ("any order", "order of addresses"):
        for num_programs in (1, 2, 4, 8):
            with patch.dict(triton_ops.NUM_MOVE_PROGRAMS, dict.fromkeys(triton_ops.NUM_MOVE_PROGRAMS, num_programs)):
                name = f"{num_programs} programs, {order}"
                speeds[f"fill, {name}"] = _gb_per_s(fill, num_bytes)
                speeds[f"writeback, {name}"] = _gb_per_s(write_back, num_bytes)
                speeds[f"both, {name}"] = _gb_per_s(on_both(fill, write_back), 2 * num_bytes)
        rows[:half], rows[half:] = rows[:half].sort().values, rows[half:].sort().values
    return speeds


def _gb_per_s(operation: Callable[[], Any], num_bytes: int) -> float:
    times = []
    for _ in range(NUM_REPEATS + 2):
        start = time.perf_counter()
        operation()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return num_bytes / statistics.median(times[2:]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedding_dim", type=int, default=128)
    parser.add_argument("--rows_per_batch", type=int, default=100_000)
    parser.add_argument("--num_rows", type=int, default=2_000_000, help="rows of the table")
    parser.add_argument("--json", help="write all figures there")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speeds = measure_bandwidth(device, args.embedding_dim, args.rows_per_batch, args.num_rows)
    for name, speed in speeds.items():
        print(f"{name:30s} {speed:7.1f} GB/s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"args": vars(args), "gb_per_s": speeds}, file, indent=2)


if __name__ == "__main__":
    main()
