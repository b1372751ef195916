# SPDX-License-Identifier: BSD-3-Clause
"""Times a DLRM training step with each way to hold the tables, interleaved in one process.

    python examples/benchmark/train_step.py --caches fused,scratchpipe --num_tables 26 --num_embeddings 1000000 \
        --embedding_dim 64 --batch_size 4096 --zipf 1.05 --load_factor 0.05 --steps 30 --json result.json

`fused` is stock TorchRec with all tables in memory. Both train on the same batches. Steps alternate in short blocks; a
block's last step also waits for the stages of coming batches, so none of their work is left to the other's time.
Before the first step the scratchpad is filled, so that every measured batch evicts.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import CacheParams
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from torchrec_scratchpipe import (
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeShardingPlanner,
    ScratchPipeTrainPipeline,
    scratchpad_stats,
    stage_spans,
)

NUM_DENSE = 13
BLOCK_STEPS = 5
NUM_WARMUP_STEPS = 5
OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rowwise_adagrad": RowWiseAdagrad}


class ZipfBatches:
    """Endless batches whose ids follow a bounded Zipf law, one id per feature and sample."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self._args = args
        self._rng = np.random.default_rng(seed)
        weights = np.arange(1, args.num_embeddings + 1, dtype=np.float64) ** -args.zipf
        self._cdf = np.cumsum(weights) / weights.sum()
        self._spread = np.random.default_rng(args.seed).permutation(args.num_embeddings)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        num_tables, batch_size = self._args.num_tables, self._args.batch_size
        ranks = np.searchsorted(self._cdf, self._rng.random(num_tables * batch_size))
        ids = torch.from_numpy(self._spread[np.minimum(ranks, self._args.num_embeddings - 1)])
        return Batch(
            dense_features=torch.from_numpy(self._rng.random((batch_size, NUM_DENSE), dtype=np.float32)),
            sparse_features=KeyedJaggedTensor.from_lengths_sync(
                keys=[f"f{i}" for i in range(num_tables)],
                values=ids,
                lengths=torch.ones(num_tables * batch_size, dtype=torch.int32),
            ),
            labels=torch.from_numpy(self._rng.integers(0, 2, batch_size)),
        )


@dataclass
class Contender:
    """One way to hold the tables, ready to train."""

    name: str
    model: DistributedModelParallel
    pipeline: TrainPipelineSparseDist[Any, Any]
    step_ms: list[float]

    def settle(self) -> None:
        """Wait until the stages of all batches in flight have run."""
        for context in self.pipeline.contexts:
            for module_context in context.module_contexts.values():
                for batches in getattr(module_context, "planned_batches", {}).values():
                    for batch in batches:
                        batch.done.wait()


def make_contender(name: str, args: argparse.Namespace, device: torch.device) -> Contender:
    torch.manual_seed(args.seed)
    tables = [
        EmbeddingBagConfig(
            name=f"t{i}",
            embedding_dim=args.embedding_dim,
            num_embeddings=args.num_embeddings,
            feature_names=[f"f{i}"],
        )
        for i in range(args.num_tables)
    ]
    model = DLRMTrain(
        DLRM(
            embedding_bag_collection=EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
            dense_in_features=NUM_DENSE,
            dense_arch_layer_sizes=[512, 256, args.embedding_dim],
            over_arch_layer_sizes=[512, 512, 256, 1],
        )
    )
    apply_optimizer_in_backward(OPTIMIZERS[args.optimizer], model.model.sparse_arch.parameters(), {"lr": 0.01})
    kernel = {"fused": "fused", "scratchpipe": "fused_uvm_caching"}[name]
    planner = ScratchPipeShardingPlanner(
        topology=Topology(world_size=1, compute_device=device.type, ddr_cap=1 << 40),
        batch_size=args.batch_size,
        constraints={
            table.name: ParameterConstraints(
                sharding_types=["table_wise"],
                compute_kernels=[kernel],
                cache_params=CacheParams(load_factor=args.load_factor) if name == "scratchpipe" else None,
            )
            for table in tables
        },
        debug=False,
    )
    sharder = (
        EmbeddingBagCollectionSharder()
        if name == "fused"
        else ScratchPipeEmbeddingBagCollectionSharder(table_dir=args.table_dir, overlap=not args.no_overlap)
    )
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    model = DistributedModelParallel(model, device=device, plan=plan, sharders=[sharder])
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())), lambda params: torch.optim.SGD(params, lr=0.01)
    )
    optimizer = CombinedOptimizer([model.fused_optimizer, dense])
    pipeline = (
        TrainPipelineSparseDist(model, optimizer, device)
        if name == "fused"
        else ScratchPipeTrainPipeline(model, optimizer, device, lookahead=args.lookahead)
    )
    return Contender(name, model, pipeline, [])


def fill_scratchpads(contender: Contender, batches: ZipfBatches) -> None:
    """Look batches up without training until every slot is taken."""
    ebc = contender.model.module.model.sparse_arch.embedding_bag_collection
    with torch.no_grad(), tqdm(desc="filling the scratchpad", unit="slots", unit_scale=True) as bar:
        while any(stats.num_resident_rows < stats.num_slots for stats in scratchpad_stats(contender.model)):
            ebc(next(batches).sparse_features).wait()
            bar.n = sum(stats.num_resident_rows for stats in scratchpad_stats(contender.model))
            bar.refresh()


def run_block(contender: Contender, batches: Iterator[Batch], num_steps: int) -> None:
    for step in range(num_steps):
        start = time.perf_counter()
        contender.pipeline.progress(batches)
        if step == num_steps - 1:
            contender.settle()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        contender.step_ms.append(1e3 * (time.perf_counter() - start))


def stage_ms(contender: Contender) -> dict[str, float]:
    """Median time of each stage over the last 50 batches of the first pool."""
    times: dict[str, list[float]] = {}
    for span in stage_spans(contender.model)[0]:
        times.setdefault(span.stage.value, []).append(1e3 * (span.end_s - span.start_s))
    return {stage: statistics.median(values[-50:]) for stage, values in times.items()}


def report(contenders: list[Contender], args: argparse.Namespace) -> dict[str, Any]:
    medians = {c.name: statistics.median(c.step_ms) for c in contenders}
    result: dict[str, Any] = {
        "args": vars(args),
        "torch": torch.__version__,
        "machine": {"cpu": platform.processor() or platform.machine(), "num_threads": torch.get_num_threads()},
        "date": time.strftime("%Y-%m-%d"),
        "step_ms_p50": medians,
        "step_ms_p90": {c.name: float(np.percentile(c.step_ms, 90)) for c in contenders},
        "step_ms": {c.name: c.step_ms for c in contenders},
    }
    if "fused" in medians:
        result["ratio_to_fused"] = {name: ms / medians["fused"] for name, ms in medians.items() if name != "fused"}
        if len(result["ratio_to_fused"]) == 1:
            result["ratio_to_fused"] = next(iter(result["ratio_to_fused"].values()))
    for contender in contenders:
        if contender.name == "scratchpipe":
            result["scratchpad"] = [asdict(stats) for stats in scratchpad_stats(contender.model)]
            result["stage_ms"] = stage_ms(contender)
            lookups = args.num_tables * args.batch_size
            result["plan_lookups_per_second"] = 1e3 * lookups / result["stage_ms"]["plan"]
    return result


def print_report(result: dict[str, Any]) -> None:
    for name, median in result["step_ms_p50"].items():
        print(f"{name:12s} step {median:8.1f} ms (P90 {result['step_ms_p90'][name]:.1f})")
    for stats in result.get("scratchpad", []):
        per_batch = 1 / max(1, stats["num_batches"])
        print(
            f"scratchpad   {stats['num_slots']:,} slots of {stats['num_rows']:,} rows; per batch "
            f"{stats['num_unique_ids'] * per_batch:,.0f} unique rows, {stats['num_unique_misses'] * per_batch:,.0f} "
            f"misses, {stats['num_victims'] * per_batch:,.0f} victims; misses at Train {stats['num_misses_at_train']}"
        )
        stages = ", ".join(f"{stage} {ms:.1f}" for stage, ms in result["stage_ms"].items())
        print(f"stages (ms)  {stages}; Plan {result['plan_lookups_per_second'] / 1e6:.1f} M lookups/s")
    if "ratio_to_fused" in result:
        print(f"ratio_to_fused {result['ratio_to_fused']}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", default="fused,scratchpipe", help="which contenders, comma-separated")
    parser.add_argument("--num_tables", type=int, default=26)
    parser.add_argument("--num_embeddings", type=int, default=1_000_000, help="rows of each table")
    parser.add_argument("--embedding_dim", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument("--zipf", type=float, default=1.05, help="exponent of the id distribution; 0 is uniform")
    parser.add_argument("--load_factor", type=float, default=0.05)
    parser.add_argument("--lookahead", type=int, default=2)
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="rowwise_adagrad")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each contender")
    parser.add_argument("--table_dir", help="existing directory for memory-mapped tables; default: RAM")
    parser.add_argument("--no_overlap", action="store_true", help="run the stages on the training thread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write all figures there")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{store.name}", rank=0, world_size=1
        )
        contenders = [make_contender(name, args, device) for name in args.caches.split(",")]
        batches = {c.name: ZipfBatches(args, seed=args.seed + 1) for c in contenders}
        for contender in contenders:
            fill_scratchpads(contender, ZipfBatches(args, seed=args.seed + 2))
        for contender in contenders:
            run_block(contender, batches[contender.name], NUM_WARMUP_STEPS)
            contender.step_ms.clear()
        with tqdm(total=args.steps, desc="steps") as bar:
            while len(contenders[0].step_ms) < args.steps:
                num_steps = min(BLOCK_STEPS, args.steps - len(contenders[0].step_ms))
                for contender in contenders:
                    run_block(contender, batches[contender.name], num_steps)
                contenders.reverse()  # whoever went second goes first
                bar.update(num_steps)
        result = report(sorted(contenders, key=lambda c: args.caches.index(c.name)), args)
        dist.destroy_process_group()
    print_report(result)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
