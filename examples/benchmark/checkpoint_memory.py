# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory and time of saving and loading, by size of the tables.

    python examples/benchmark/checkpoint_memory.py --sizes_gb 1,4,8 --dir /fast/disk

Each row is a process of its own: tables with Adagrad states, RAM or memory-mapped, trained for some batches, then saved
and loaded. Memory is anonymous memory (RssAnon of /proc/self/status) beyond what there was just before, sampled every 5
ms. The write buffer of memory-mapped tables, which training fills, is limited to 64 MB here, lest it be taken for
memory of saving.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.types import CacheParams
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import (
    CheckpointManager,
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeShardingPlanner,
    ScratchPipeTrainPipeline,
)

NUM_TABLES, DIM, BATCH_SIZE = 4, 64, 4096
SAMPLE_S = 0.005


class Bags(nn.Module):
    """Four equal tables; the loss makes every row that is used change."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=f"t{i}", embedding_dim=DIM, num_embeddings=num_rows, feature_names=[f"f{i}"])
                for i in range(NUM_TABLES)
            ],
            device=torch.device("meta"),
        )

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean square of all bags."""
        loss = self.bags(features).values().square().mean()
        return loss, loss.detach()


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no RssAnon: this needs Linux")


def measure(do: Callable[[], object]) -> dict[str, float]:
    """Peak anonymous memory beyond what there is now, and seconds."""
    before = peak = anonymous_bytes()
    is_done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not is_done.wait(SAMPLE_S):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start_s = time.perf_counter()
    do()
    seconds = time.perf_counter() - start_s
    is_done.set()
    sampler.join()
    return {"peak_mb": (peak - before) / 1e6, "seconds": seconds}


def batches(num_rows: int, seed: int) -> Iterator[KeyedJaggedTensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = (
            (torch.rand(NUM_TABLES * BATCH_SIZE, generator=generator, dtype=torch.float32) ** 4 * num_rows)
            .long()
            .clamp_(max=num_rows - 1)
        )
        lengths = torch.ones(NUM_TABLES * BATCH_SIZE, dtype=torch.int64)
        yield KeyedJaggedTensor([f"f{i}" for i in range(NUM_TABLES)], ids, lengths=lengths)


def run(size_gb: float, is_mapped: bool, directory: Path) -> dict[str, Any]:
    num_rows = int(size_gb * 1e9 / NUM_TABLES / (2 * 4 * DIM))
    model = Bags(num_rows)
    apply_optimizer_in_backward(torch.optim.Adagrad, model.parameters(), {"lr": 0.1})
    constraints = {
        f"t{i}": ParameterConstraints(
            compute_kernels=["fused_uvm_caching"], cache_params=CacheParams(load_factor=min(1.0, 50_000 / num_rows))
        )
        for i in range(NUM_TABLES)
    }
    planner = ScratchPipeShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu", ddr_cap=1 << 40),
        batch_size=BATCH_SIZE,
        constraints=constraints,
        debug=False,
    )
    table_dir = str(directory) if is_mapped else None
    sharders = [ScratchPipeEmbeddingBagCollectionSharder(table_dir=table_dir, ram_budget_gb=0.064)]
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    optimizer = sharded.fused_optimizer
    pipeline = ScratchPipeTrainPipeline(sharded, optimizer, torch.device("cpu"))
    iterator = batches(num_rows, seed=0)

    def train(num_batches: int) -> None:
        for _ in range(num_batches):
            pipeline.progress(iterator)

    train(50)
    manager = CheckpointManager(directory / "ours")
    figures: dict[str, Any] = {"size_gb": size_gb, "tables": "memory-mapped" if is_mapped else "RAM"}
    figures["save"] = measure(lambda: manager.save(1, sharded, optimizer))
    num_trained = 0

    def save_while_training() -> None:
        nonlocal num_trained
        pending = manager.async_save(2, sharded, optimizer)
        while not pending.done():
            train(1)
            num_trained += 1
        pending.result()

    train_ms = 1e3 * measure(lambda: train(20))["seconds"] / 20
    figures["async_save"] = measure(save_while_training)
    figures["async_save"] |= {
        "num_trained": num_trained,
        "step_ratio": 1e3 * figures["async_save"]["seconds"] / max(1, num_trained) / train_ms,
    }
    figures["load"] = measure(lambda: manager.load(sharded, optimizer))
    shutil.rmtree(directory / "ours")
    state = {"model": sharded.state_dict(), "optimizer": optimizer.state_dict()}
    figures["torch.distributed.checkpoint.save"] = measure(lambda: dcp.save(state, checkpoint_id=directory / "stock"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes_gb", default="1,4,8", help="of tables with optimizer states")
    parser.add_argument(
        "--dir", default=tempfile.gettempdir(), help="existing directory with room for three times the largest"
    )
    parser.add_argument("--json", help="write all figures there")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # size, RAM or memory-mapped: what the parent asks of a child
    args = parser.parse_args()
    if args.one:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        size_gb, storage = args.one.split(",")
        with tempfile.TemporaryDirectory(dir=args.dir) as directory:
            dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
            figures = run(float(size_gb), storage == "mapped", Path(directory))
            dist.destroy_process_group()
        print(json.dumps(figures))
        return
    rows = []
    names = ["save", "async_save", "load", "torch.distributed.checkpoint.save"]
    print("| tables (GB) | in | " + " | ".join(f"{name}: MB, s" for name in names) + " | step while saving |")
    print("|---" * (len(names) + 3) + "|")
    for size in args.sizes_gb.split(","):
        for storage in ("ram", "mapped"):
            command = [sys.executable, os.path.abspath(__file__), "--dir", args.dir, "--one", f"{size},{storage}"]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
            cells = [f"{rows[-1][name]['peak_mb']:,.0f}, {rows[-1][name]['seconds']:.1f}" for name in names]
            ratio = rows[-1]["async_save"]["step_ratio"]
            print(f"| {size} | {rows[-1]['tables']} | " + " | ".join(cells) + f" | {ratio:.2f} |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
