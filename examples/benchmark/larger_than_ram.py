# SPDX-License-Identifier: BSD-3-Clause
"""Trains tables that are larger than RAM, and the same rows as small tables in RAM; compares every bit.

    python examples/benchmark/larger_than_ram.py --table_dir DIR --stride 9

Small tables have `--num_embeddings` rows each. The large ones have `--stride` times as many, of which every so many-th
is used, with the same values. Both train on the same ids, in processes of their own. At the end all rows that can have
been used, weights and optimizer states, have the same SHA-256; else the exit status is 1. With the default shape and a
stride of 9 the files take 60 GB, and as much has to be free in DIR, and a tenth more.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torchrec.datasets.utils import Batch

ROWS_TOGETHER = 1 << 16


def train(args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own."""
    import torch
    import torch.distributed as dist
    from rivals import RIVALS, Contender, Shape
    from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
    from workloads import PowerLawBatches, Workload

    from torchrec_scratchpipe import scratchpad_stats
    from torchrec_scratchpipe.sharding.kernel import ScratchpadKernel

    stride = args.stride if args.size == "large" else 1
    # All rows are written below, once.
    ShardedEmbeddingBagCollection.reset_parameters = lambda self: None  # type: ignore[method-assign]
    ScratchpadKernel._draw_as_stock = lambda self: None  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
    workload = Workload("large", args.num_tables, args.num_embeddings * stride, args.embedding_dim, 1, args.batch_size)
    kwargs = {"ram_budget_gb": args.ram_budget_gb}
    RIVALS["scratchpipe"] = dataclasses.replace(RIVALS["scratchpipe"], sharder_kwargs=kwargs)
    shape = Shape(workload, "rowwise_adagrad", args.num_slots / workload.num_rows, 2)
    table_dir = args.table_dir if args.size == "large" else None
    start_s = time.perf_counter()
    contender = Contender("scratchpipe", shape, torch.device("cpu"), table_dir)
    weights = tables_of(contender.model.state_dict())
    for index, weight in enumerate(weights):
        generator = torch.Generator().manual_seed(index)
        for first in range(0, args.num_embeddings, ROWS_TOGETHER):
            last = min(first + ROWS_TOGETHER, args.num_embeddings)
            values = torch.rand(last - first, args.embedding_dim, generator=generator, dtype=torch.float32) - 0.5
            weight[first * stride : last * stride].copy_(values.repeat_interleave(stride, dim=0))
    built_s = time.perf_counter() - start_s
    print(f"{args.size}: built in {built_s:.0f} s", file=sys.stderr, flush=True)
    contender.start(args.zipf, 2, seed=1, num_batches=0)
    assert contender.pipeline is not None
    # Ids of the small tables; those of the large ones lie further apart.
    small = dataclasses.replace(workload, num_embeddings=args.num_embeddings)
    batches = map(spread(stride), PowerLawBatches(small, args.zipf, 1, torch.device("cpu"), args.steps))
    start_s, num_trained = time.perf_counter(), 0
    with contextlib.suppress(StopIteration):
        while True:
            contender.pipeline.progress(batches)
            num_trained += 1
    train_s = time.perf_counter() - start_s
    (stats,) = scratchpad_stats(contender.model)
    print(f"trained {num_trained} batches in {train_s:.0f} s", file=sys.stderr, flush=True)
    start_s = time.perf_counter()
    states = [
        state
        for of_table in contender.model.fused_optimizer.state_dict()["state"].values()
        for state in tables_of(of_table)
    ]
    weights = tables_of(contender.model.state_dict())
    digest = hashlib.sha256()
    for values in (*weights, *states):
        for first in range(0, args.num_embeddings, ROWS_TOGETHER):
            last = min(first + ROWS_TOGETHER, args.num_embeddings)
            digest.update(values[first * stride : last * stride : stride].contiguous().numpy().tobytes())
    return {
        "digest": digest.hexdigest(),
        "num_weights_and_states": [len(weights), len(states)],
        "table_gb": stats.table_bytes / 1e9,
        "num_batches": num_trained,
        "build_s": built_s,
        "step_ms": 1e3 * train_s / num_trained,
        "compare_s": time.perf_counter() - start_s,
        "victims": stats.num_victims,
        "rows_from_disk": stats.num_disk_rows_read,
        "written_gb": stats.disk_bytes_written / 1e9,
    }


def tables_of(state_dict: Mapping[str, Any]) -> list["Tensor"]:
    """What a state dict has of tables on this rank, in its order."""
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    return [value.local_shards()[0].tensor for value in state_dict.values() if isinstance(value, ShardedTensor)]


def spread(stride: int) -> Callable[["Batch"], "Batch"]:
    """Multiply the ids of batches."""
    from torchrec.datasets.utils import Batch
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    def spread_one(batch: Batch) -> Batch:
        ids = batch.sparse_features
        further = KeyedJaggedTensor(keys=ids.keys(), values=ids.values() * stride, lengths=ids.lengths())
        return Batch(batch.dense_features, further, batch.labels)

    return spread_one


def run(args: argparse.Namespace, *, is_large: bool) -> dict[str, Any]:
    """One of the two, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--size", "large" if is_large else "small"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{command[-1]}: it ended with {result.returncode}")
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    print(f"{command[-1]}: " + "  ".join(f"{name} {value}" for name, value in figures.items()), flush=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table_dir", required=True, help="where the large tables are kept")
    parser.add_argument("--stride", type=int, default=9, help="rows of large tables for each row of small ones")
    parser.add_argument("--num_tables", type=int, default=26)
    parser.add_argument("--num_embeddings", type=int, default=1_000_000, help="of each small table")
    parser.add_argument("--embedding_dim", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--zipf", type=float, default=1.05)
    parser.add_argument("--num_slots", type=int, default=400_000, help="of all tables, in the scratchpad")
    parser.add_argument("--ram_budget_gb", type=float, default=0.5, help="GiB for rows that left the scratchpad")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", help="where the figures go")
    parser.add_argument("--size", choices=("large", "small"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.size:
        print(json.dumps(train(args)), flush=True)
        os._exit(0)  # to free all this takes long
    large, small = (run(args, is_large=is_large) for is_large in (True, False))
    if args.json:
        Path(args.json).write_text(json.dumps({"args": vars(args), "large": large, "small": small}, indent=1))
    is_same = large["digest"] == small["digest"]
    print("the same bits" if is_same else "DIFFERENT BITS")
    return 0 if is_same and min(large["victims"], large["rows_from_disk"]) > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
