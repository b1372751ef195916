# SPDX-License-Identifier: BSD-3-Clause
"""Trains a DLRM on Criteo rows, its embedding tables in host memory behind a lookahead scratchpad.

    python examples/criteo_dlrm/main.py --criteo_tsv train.txt --batch_size 4096 --scratchpad_budget_gb 2 --adagrad
    torchrun --nproc_per_node 2 examples/criteo_dlrm/main.py --limit_train_batches 50 --limit_val_batches 10

    python examples/criteo_dlrm/main.py --save_dir checkpoints --save_every 1000 --resume

Flags keep the names of facebookresearch/dlrm's torchrec_dlrm/dlrm_main.py. `--embedding_cache fused` is stock TorchRec
with all tables in memory; `--verify` trains both on the same batches and compares every bit.
"""

import argparse
import json
import logging
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torchmetrics
from data import (
    FEATURE_NAMES,
    KAGGLE_CARDINALITIES,
    NUM_DENSE,
    NUM_SPARSE,
    BatchSource,
    CriteoTsv,
    GeneratedCriteo,
    Share,
)
from report import Measurements, Trace, plot, print_plan, summary_line
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.func import functional_call
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import CacheParams, ShardingPlan
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage
from tqdm import tqdm
from verify import Twin

from torchrec_scratchpipe import (
    CheckpointManager,
    PlanReport,
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeShardingPlanner,
    ScratchPipeTrainPipeline,
    WorkingSets,
    measure_working_set,
    scratchpad_stats,
    stage_spans,
    to_stock,
)

COLLECTION_PATH = "model.sparse_arch.embedding_bag_collection"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--criteo_tsv", help="raw Criteo TSV; default: generated Criteo-shaped rows")
    data.add_argument("--epochs", type=int, default=1)
    data.add_argument("--batch_size", type=int, default=1024, help="samples per rank")
    data.add_argument("--limit_train_batches", type=int, help="per rank; generated rows: default 100")
    data.add_argument("--limit_val_batches", type=int, help="per rank; generated rows: default 20")
    data.add_argument("--num_embeddings", type=int, help="rows of every table; default: Criteo Kaggle's")
    data.add_argument("--num_embeddings_per_feature", help="26 numbers of rows, comma-separated")
    data.add_argument("--max_num_embeddings", type=int, help="cap on the rows of every table")
    data.add_argument("--seed", type=int, default=0)
    model = parser.add_argument_group("model")
    model.add_argument("--embedding_dim", type=int, default=64)
    model.add_argument("--dense_arch_layer_sizes", default="512,256,64")
    model.add_argument("--over_arch_layer_sizes", default="512,512,256,1")
    model.add_argument("--interaction_type", choices=["original", "dcn", "projection"], default="original")
    model.add_argument("--interaction_branch1_layer_sizes", default="512,256")
    model.add_argument("--interaction_branch2_layer_sizes", default="512,256")
    model.add_argument("--dcn_num_layers", type=int, default=3)
    model.add_argument("--dcn_low_rank_dim", type=int, default=64)
    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--learning_rate", type=float, default=0.02)
    optimizer.add_argument("--eps", type=float, default=1e-8)
    optimizer.add_argument("--adagrad", action="store_true", help="Adagrad for embeddings and dense; default: SGD")
    optimizer.add_argument("--lr_warmup_steps", type=int, default=0)
    optimizer.add_argument("--lr_decay_start", type=int, default=0)
    optimizer.add_argument("--lr_decay_steps", type=int, default=0)
    cache = parser.add_argument_group("embedding cache")
    cache.add_argument("--embedding_cache", choices=["scratchpipe", "fused"], default="scratchpipe")
    size = cache.add_mutually_exclusive_group()
    size.add_argument("--load_factor", type=float, help="slots per row of every table, in (0, 1]; default: 0.1")
    size.add_argument("--hbm_budget_gb", type=float, help="on a GPU: device memory per rank for embeddings")
    size.add_argument("--scratchpad_budget_gb", type=float, help="on a CPU: RAM per rank for scratchpads")
    cache.add_argument("--working_sets", help="saved measurement of the data; measured and written there if missing")
    cache.add_argument("--num_measured_batches", type=int, default=200, help="of the first batches, for a budget")
    cache.add_argument(
        "--lookahead", type=int, help="batches planned ahead of Train; default: 2, or what the budget allows"
    )
    cache.add_argument("--num_batches_seen_ahead", type=int, default=0, help="known beyond those, to evict less")
    cache.add_argument("--host_access", choices=["direct", "staged"], default="direct", help="how a GPU reaches tables")
    cache.add_argument("--table_dir", help="existing directory for memory-mapped tables; default: RAM")
    saving = parser.add_argument_group("checkpoints")
    saving.add_argument(
        "--save_dir", help="directory that all ranks share; saves at the end, and on SIGTERM, which ends the run"
    )
    saving.add_argument(
        "--save_every", type=int, help="save after so many training batches too, while training goes on"
    )
    saving.add_argument("--keep_last", type=int, help="keep so many checkpoints; default: all")
    saving.add_argument("--resume", action="store_true", help="go on from the latest checkpoint, if there is one")
    output = parser.add_argument_group("output")
    output.add_argument("--validation_freq_within_epoch", type=int, help="validate every so many training batches")
    output.add_argument("--print_lr", action="store_true")
    output.add_argument("--print_sharding_plan", action="store_true", help="also print the planner's own report")
    output.add_argument("--verify", action="store_true", help="train a stock twin and compare every bit")
    output.add_argument("--evaluate_stock", action="store_true", help="evaluate plain TorchRec modules in the end, too")
    output.add_argument("--profile_trace", help="write a trace of a few steps there, a JSON file for Perfetto")
    output.add_argument("--json", help="write all figures there")
    output.add_argument("--plot", help="write a picture of the stages there (needs matplotlib)")
    args = parser.parse_args()
    args.budget_gb = args.hbm_budget_gb if torch.cuda.is_available() else args.scratchpad_budget_gb
    if args.budget_gb is None and (args.hbm_budget_gb or args.scratchpad_budget_gb):
        parser.error("--hbm_budget_gb is for a GPU, --scratchpad_budget_gb for a CPU; give the other one")
    if args.verify and args.embedding_cache == "fused":
        parser.error("--verify compares scratchpipe with fused; use it with --embedding_cache scratchpipe")
    if (args.save_every or args.keep_last or args.resume) and not args.save_dir:
        parser.error("--save_every, --keep_last and --resume need --save_dir")
    if args.evaluate_stock and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--evaluate_stock is for one process: only rank 0 gets the plain modules")
    return args


def rows_per_table(args: argparse.Namespace) -> list[int]:
    if args.num_embeddings_per_feature:
        rows = [int(number) for number in args.num_embeddings_per_feature.split(",")]
        if len(rows) != NUM_SPARSE:
            raise SystemExit(f"--num_embeddings_per_feature: {len(rows)} numbers, expected {NUM_SPARSE}")
    else:
        rows = [args.num_embeddings] * NUM_SPARSE if args.num_embeddings else KAGGLE_CARDINALITIES
    return [min(number, args.max_num_embeddings or number) for number in rows]


def make_source(args: argparse.Namespace, share: Share) -> BatchSource:
    if args.criteo_tsv:
        source: BatchSource = CriteoTsv(args.criteo_tsv, rows_per_table(args), args.batch_size, share)
        source.num_train_batches = min(source.num_train_batches, args.limit_train_batches or source.num_train_batches)
        source.num_val_batches = min(source.num_val_batches, args.limit_val_batches or source.num_val_batches)
        return source
    return GeneratedCriteo(
        rows_per_table(args),
        args.batch_size,
        args.limit_train_batches or 100,
        args.limit_val_batches or 20,
        args.seed,
        share,
    )


def layer_sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def make_dlrm(args: argparse.Namespace) -> DLRMTrain:
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"t_{feature}", embedding_dim=args.embedding_dim, num_embeddings=rows, feature_names=[feature]
            )
            for feature, rows in zip(FEATURE_NAMES, rows_per_table(args), strict=True)
        ],
        device=torch.device("meta"),
    )
    common: dict[str, Any] = {
        "embedding_bag_collection": collection,
        "dense_in_features": NUM_DENSE,
        "dense_arch_layer_sizes": [*layer_sizes(args.dense_arch_layer_sizes)[:-1], args.embedding_dim],
        "over_arch_layer_sizes": layer_sizes(args.over_arch_layer_sizes),
    }
    if args.interaction_type == "dcn":
        return DLRMTrain(DLRM_DCN(**common, dcn_num_layers=args.dcn_num_layers, dcn_low_rank_dim=args.dcn_low_rank_dim))
    if args.interaction_type == "projection":
        branches = (args.interaction_branch1_layer_sizes, args.interaction_branch2_layer_sizes)
        # The projection multiplies both branches as matrices of embedding_dim columns.
        first, second = ([*layer_sizes(branch)[:-1], 8 * args.embedding_dim] for branch in branches)
        return DLRMTrain(
            DLRM_Projection(**common, interaction_branch1_layer_sizes=first, interaction_branch2_layer_sizes=second)
        )
    return DLRMTrain(DLRM(**common))


def make_model(args: argparse.Namespace) -> DLRMTrain:
    """The unsharded model; its embedding tables know the optimizer that updates them in backward."""
    model = make_dlrm(args)
    optimizer_class = torch.optim.Adagrad if args.adagrad else torch.optim.SGD
    optimizer_kwargs = {"lr": args.learning_rate} | ({"eps": args.eps} if args.adagrad else {})
    apply_optimizer_in_backward(optimizer_class, model.model.sparse_arch.parameters(), optimizer_kwargs)
    return model


def make_optimizer(args: argparse.Namespace, model: DistributedModelParallel) -> KeyedOptimizer:
    dense_parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    dense = KeyedOptimizerWrapper(
        dense_parameters,
        lambda params: (
            torch.optim.Adagrad(params, lr=args.learning_rate, eps=args.eps)
            if args.adagrad
            else torch.optim.SGD(params, lr=args.learning_rate)
        ),
    )
    combined = CombinedOptimizer([model.fused_optimizer, dense])
    stages = []
    if args.lr_warmup_steps:
        stages.append(WarmupStage(policy=WarmupPolicy.LINEAR, max_iters=args.lr_warmup_steps, value=0.1))
    if args.lr_decay_steps:
        flat_steps = max(0, args.lr_decay_start - args.lr_warmup_steps)
        stages.append(WarmupStage(policy=WarmupPolicy.CONSTANT, max_iters=flat_steps, value=1.0))
        stages.append(WarmupStage(policy=WarmupPolicy.POLY, max_iters=args.lr_decay_steps, value=2.0))
    return WarmupOptimizer(combined, stages, lr=args.learning_rate) if stages else combined


def get_working_sets(args: argparse.Namespace, source: BatchSource, model: DLRMTrain) -> WorkingSets:
    """What the first batches use of each table, from a file if there is one."""
    if args.working_sets and os.path.exists(args.working_sets):
        return WorkingSets.load(args.working_sets)
    working_sets = measure_working_set(
        source.train(),
        model,
        lookahead=args.lookahead or 2,
        num_batches_seen_ahead=args.num_batches_seen_ahead,
        max_batches=args.num_measured_batches,
    )
    if args.working_sets and dist.get_rank() == 0:
        working_sets.save(args.working_sets)
    return working_sets


def make_planner(
    args: argparse.Namespace, source: BatchSource, model: DLRMTrain, device: torch.device
) -> ScratchPipeShardingPlanner:
    """A planner that is given a budget, or a load factor for every table, or is as good as stock."""
    topology = Topology(
        world_size=dist.get_world_size(),
        compute_device=device.type,
        hbm_cap=int(args.hbm_budget_gb * 1024**3) if args.hbm_budget_gb else None,
        ddr_cap=1 << 40,
    )
    common: dict[str, Any] = {
        "topology": topology,
        "batch_size": args.batch_size,
        "debug": args.print_sharding_plan,
    }
    if args.embedding_cache == "fused":
        return ScratchPipeShardingPlanner(**common)
    if args.budget_gb is not None:
        return ScratchPipeShardingPlanner(
            **common,
            working_sets=get_working_sets(args, source, model),
            lookahead=args.lookahead,
            scratchpad_bytes=int(args.budget_gb * 1024**3),
            storage_reservation=FixedPercentageStorageReservation(0.0),
        )
    constraints = {
        f"t_{feature}": ParameterConstraints(
            compute_kernels=["fused_uvm_caching"], cache_params=CacheParams(load_factor=args.load_factor or 0.1)
        )
        for feature in FEATURE_NAMES
    }
    return ScratchPipeShardingPlanner(**common, constraints=constraints)


def shard(
    args: argparse.Namespace, source: BatchSource, device: torch.device
) -> tuple[DistributedModelParallel, KeyedOptimizer, ShardingPlan, PlanReport | None]:
    """Plan and shard; with stock TorchRec in its place, planner, sharder and pipeline change and nothing else."""
    torch.manual_seed(args.seed)
    model = make_model(args)
    is_cached = args.embedding_cache == "scratchpipe"
    planner = make_planner(args, source, model, device)
    sharders = [
        ScratchPipeEmbeddingBagCollectionSharder(table_dir=args.table_dir, host_access=args.host_access)
        if is_cached
        else EmbeddingBagCollectionSharder()
    ]
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    args.lookahead = args.lookahead or planner.lookahead
    model = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    return model, make_optimizer(args, model), plan, planner.report


def make_pipeline(
    args: argparse.Namespace, model: DistributedModelParallel, optimizer: KeyedOptimizer, device: torch.device
) -> TrainPipelineSparseDist[Batch, Any]:
    if args.embedding_cache == "scratchpipe":
        return ScratchPipeTrainPipeline(
            model,
            optimizer,
            device,
            lookahead=args.lookahead,
            num_batches_seen_ahead=args.num_batches_seen_ahead,
        )
    return TrainPipelineSparseDist(model, optimizer, device)


class TerminatedError(Exception):
    """SIGTERM ended training; everything is saved."""


class Trainer:
    """The main job: one pipeline that trains, validates and goes on training."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self._args = args
        self._is_main = dist.get_rank() == 0
        self._source = make_source(args, Share(dist.get_rank(), dist.get_world_size()))
        self.model, self._optimizer, self.plan, self._report = shard(args, self._source, device)
        self._pipeline = make_pipeline(args, self.model, self._optimizer, device)
        self._checkpoints = CheckpointManager(args.save_dir, args.keep_last) if args.save_dir else None
        if self._checkpoints is not None and self._checkpoints.steps() and not args.resume:
            raise SystemExit(
                f"--save_dir {args.save_dir} has checkpoints of another run; give --resume or another directory"
            )
        self._num_steps = 0  # batches trained; the data loader is ahead of it, but all that counts is what has trained
        self._twin = Twin(args, self.model, self.plan, make_model, make_optimizer, device) if args.verify else None
        if args.resume and self._checkpoints is not None:
            found = self._checkpoints.load(self.model, self._optimizer)
            self._num_steps = found.step if found is not None else 0
            if self._twin is not None:
                self._twin.load(self._checkpoints)
        self._is_terminated = False
        if self._checkpoints is not None:
            signal.signal(signal.SIGTERM, self._note_sigterm)
        self._device = device
        self.measurements = Measurements()
        num_steps = args.epochs * self._source.num_train_batches - self._num_steps
        self._trace = Trace(args.profile_trace if self._is_main else None, num_steps)
        self._misses_at: dict[int, int] = {}  # after so many training batches
        if self._is_main:
            if self._report is not None:
                print(self._report)
            print_plan(self.plan.plan[COLLECTION_PATH], scratchpad_stats(self.model))

    def run(self) -> dict[str, Any]:
        """Train all epochs, validate, and gather every figure."""
        first_epoch = self._num_steps // max(1, self._source.num_train_batches)
        metrics: dict[str, float] = {}
        for epoch in range(first_epoch, self._args.epochs):
            metrics = self._train_epoch(epoch)
        self._trace.stop()
        if first_epoch >= self._args.epochs:  # the checkpoint was the end
            metrics = self._validate()
        if self._args.evaluate_stock:
            metrics |= {f"stock_{name}": value for name, value in self._validate_stock().items()}
        self._save_at_the_end()
        figures: dict[str, Any] = {
            "args": vars(self._args),
            **metrics,
            **self.measurements.figures(self._args.batch_size * dist.get_world_size()),
            "scratchpad": [asdict(stats) for stats in scratchpad_stats(self.model)],
        }
        if self._report is not None and len(self._misses_at) == 2:  # it was not resumed half-way
            figures["misses_per_batch"] = self._compare_misses(self._report)
        if self._twin is not None:
            figures["verify"] = self._twin.compare(self.model, self._optimizer)
        return figures

    def _compare_misses(self, report: PlanReport) -> dict[str, float]:
        """The plan's word on this rank's misses, once scratchpads are full, and what the second half of training counted."""
        first, last = min(self._misses_at), max(self._misses_at)
        counted = (self._misses_at[last] - self._misses_at[first]) / max(last - first, 1)
        return {"planned": sum(table.num_misses for table in report.tables), "counted": counted}

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        num_batches = self._source.num_train_batches
        period = self._args.validation_freq_within_epoch or num_batches
        done = self._num_steps - epoch * num_batches  # not 0 where it is resumed
        batches = self._source.train(done)
        metrics: dict[str, float] = {}
        with tqdm(total=num_batches, initial=done, desc=f"epoch {epoch}", disable=not self._is_main) as bar:
            while done < num_batches:
                num_steps = min(period - done % period, num_batches - done)
                self._train_steps(batches, num_steps, bar)
                done += num_steps
                metrics = self._validate()
                bar.set_postfix(metrics)
        return metrics

    def _train_steps(self, batches: Iterator[Batch], num_steps: int, bar: "tqdm[Any]") -> None:
        self.model.train()
        own = [next(batches) for _ in range(num_steps)] if self._twin is not None else None
        iterator = iter(own) if own is not None else _take(batches, num_steps)
        for step in range(num_steps):
            with self.measurements.step():
                loss, _, _ = self._pipeline.progress(iterator)
            if self._twin is not None and own is not None:
                self._twin.step(own[step], loss)
            if self._args.print_lr and self._is_main:
                bar.write(f"learning rate {self._optimizer.param_groups[0]['lr']:.6f}")
            self._trace.step()
            bar.update()
            self._num_steps += 1
            self._save_if_due()
            num_batches = self._source.num_train_batches
            if self._report is not None and self._num_steps in (num_batches // 2, num_batches):
                misses = sum(pool.num_unique_misses for pool in scratchpad_stats(self.model))
                self._misses_at[self._num_steps] = misses

    def _save_if_due(self) -> None:
        """The checkpoint's step says where the data goes on: all else of the position follows from it."""
        if self._checkpoints is None:
            return
        if self._is_any_terminated():
            self._save_at_the_end()
            raise TerminatedError
        if self._args.save_every and self._num_steps % self._args.save_every == 0:
            self._checkpoints.async_save(self._num_steps, self.model, self._optimizer)

    def _save_at_the_end(self) -> None:
        if self._checkpoints is None:
            return
        self._checkpoints.wait()
        if self._num_steps not in self._checkpoints.steps():  # of this run, or of the one that it went on from
            self._checkpoints.save(self._num_steps, self.model, self._optimizer)

    def _note_sigterm(self, *_: object) -> None:
        self._is_terminated = True

    def _is_any_terminated(self) -> bool:
        """Ranks get the signal at different batches, and have to save the same one."""
        if dist.get_world_size() == 1:
            return self._is_terminated
        flag = torch.tensor(int(self._is_terminated), dtype=torch.int64, device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _validate_stock(self) -> dict[str, float]:
        """With plain TorchRec modules in place of sharded ones, over the same tables; on the host, where tables are."""
        plain = to_stock(self.model)
        state = {name: value.cpu() for name, value in [*plain.named_parameters(), *plain.named_buffers()]}
        return self._measure(functional_call(plain, state, (batch,))[1] for batch in self._source.validate())

    def _validate(self) -> dict[str, float]:
        self.model.eval()
        iterator = _take(self._source.validate(), self._source.num_val_batches)
        return self._measure(self._pipeline.progress(iterator) for _ in range(self._source.num_val_batches))

    def _measure(self, outputs: Iterator[Any]) -> dict[str, float]:
        auroc = torchmetrics.AUROC(task="binary").to(self._device)
        log_loss = torchmetrics.MeanMetric().to(self._device)
        with torch.no_grad():
            for loss, logits, labels in outputs:
                auroc.update(torch.sigmoid(logits).to(self._device), labels.to(self._device))
                log_loss.update(loss.to(self._device), weight=labels.numel())
        if self._source.num_val_batches == 0:
            return {"auroc": float("nan"), "logloss": float("nan")}
        return {"auroc": float(auroc.compute()), "logloss": float(log_loss.compute())}


def _take(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    for _, batch in zip(range(count), batches, strict=False):
        yield batch


def main() -> None:
    args = parse_args()
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torchrec")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as directory:
        by_torchrun = "RANK" in os.environ
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method="env://" if by_torchrun else f"file://{directory}/store",
            rank=int(os.environ.get("RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
        )
        is_main = dist.get_rank() == 0
        trainer = Trainer(args, device)
        try:
            figures = trainer.run()
        except TerminatedError:
            dist.destroy_process_group()
            if is_main:
                print(f"SIGTERM: all is saved in {args.save_dir}; go on with --resume")
            return
        spans = stage_spans(trainer.model)
        dist.destroy_process_group()
    if not is_main:
        return
    for path in (args.json, args.plot):
        if path:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=2)
    if args.plot:
        plot(spans, args.plot)
    print(summary_line(figures))


if __name__ == "__main__":
    main()
