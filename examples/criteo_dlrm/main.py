# SPDX-License-Identifier: BSD-3-Clause
"""Trains a DLRM on Criteo rows, its embedding tables in host memory behind a lookahead scratchpad.

    python examples/criteo_dlrm/main.py --criteo_tsv train.txt --batch_size 4096 --scratchpad_budget_gb 2 --adagrad
    torchrun --nproc_per_node 2 examples/criteo_dlrm/main.py --limit_train_batches 50 --limit_val_batches 10

    python examples/criteo_dlrm/main.py --dp_noise_multiplier 1.0 --dp_clip 1.0

    torchrec-scratchpipe data criteo_to_parquet train.txt train.parquet
    python examples/criteo_dlrm/main.py --parquet train.parquet --num_readers 2

    python examples/criteo_dlrm/main.py --save_dir checkpoints --save_every 1000 --delta_every 10 --resume

Flags keep the names of facebookresearch/dlrm's torchrec_dlrm/dlrm_main.py. `--embedding_cache fused` is stock TorchRec
with all tables in memory; `--verify` trains both on the same batches and compares every bit.
"""

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torchmetrics
from arguments import (
    UsageError,
    as_size,
    available_ram_bytes,
    parse_args,
    ram_bytes,
    rows_per_table,
    table_bytes,
    values_per_table,
)
from data import FEATURE_NAMES, BatchSource, CriteoFormatError, CriteoTsv, GeneratedCriteo, Share
from dlrm import make_model, make_optimizer
from parquet_data import CriteoParquet
from picture import plot
from private_data import SAMPLE_BYTES, PoissonBatches, default_delta
from report import Measurements, ScratchpadCounts, Trace, planned_part, print_plan, summary_line
from torch.func import functional_call
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import CacheParams, ShardingPlan
from torchrec.models.dlrm import DLRMTrain
from torchrec.optim.keyed import KeyedOptimizer
from tqdm import tqdm
from verify import Twin

from torchrec_scratchpipe import (
    CheckpointManager,
    LazyDP,
    PlanReport,
    PoolStats,
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeError,
    ScratchPipeMonitor,
    ScratchPipeShardingPlanner,
    ScratchPipeTrainPipeline,
    ShardedScratchPipeEmbeddingBagCollection,
    WorkingSets,
    measure_working_set,
    scratchpad_stats,
    stage_spans,
    to_stock,
)

COLLECTION_PATH = "model.sparse_arch.embedding_bag_collection"
NUM_GENERATED_TRAIN_BATCHES = 100
NUM_GENERATED_VAL_BATCHES = 20
FLAGS = {
    "scratchpad_bytes": "--scratchpad_budget_gb",
    "hbm_cap": "--hbm_budget_gb",
}  # by what a planner's error calls them


def collection_path(args: argparse.Namespace) -> str:
    """What the sharding plan calls the embedding tables."""
    return COLLECTION_PATH if args.zch_size is None else f"{COLLECTION_PATH}.remapped"


def make_source(args: argparse.Namespace, share: Share) -> BatchSource:
    is_raw = args.zch_size is not None
    if args.criteo_tsv or args.parquet:
        source: BatchSource = (
            CriteoTsv(args.criteo_tsv, values_per_table(args), args.batch_size, share, is_raw=is_raw)
            if args.criteo_tsv
            else CriteoParquet(
                args.parquet, values_per_table(args), args.batch_size, share, args.num_readers or 1, is_raw=is_raw
            )
        )
        if args.limit_train_batches is not None:
            source.num_train_batches = min(source.num_train_batches, args.limit_train_batches)
        if args.limit_val_batches is not None:
            source.num_val_batches = min(source.num_val_batches, args.limit_val_batches)
        return source
    num_train_batches = NUM_GENERATED_TRAIN_BATCHES if args.limit_train_batches is None else args.limit_train_batches
    num_val_batches = NUM_GENERATED_VAL_BATCHES if args.limit_val_batches is None else args.limit_val_batches
    return GeneratedCriteo(
        values_per_table(args),
        args.batch_size,
        num_train_batches,
        num_val_batches,
        args.seed,
        share,
        is_raw=is_raw,
    )


class Privacy:
    """Private training: its settings, and batches that are Poisson samples if they fit into memory.

    Args:
        args: The example's arguments.
        source: Where samples come from.
        share: This rank's part.
    """

    def __init__(self, args: argparse.Namespace, source: BatchSource, share: Share) -> None:
        seeds = [int.from_bytes(os.urandom(7), "little") if args.dp_seed is None else args.dp_seed]
        dist.broadcast_object_list(seeds)
        num_samples = source.num_train_batches * args.batch_size  # of one rank
        self.is_sampled = _fits(num_samples * SAMPLE_BYTES, args)
        expected = args.batch_size * share.world_size
        total = num_samples * share.world_size
        rate = 1 / source.num_train_batches
        self.source = source
        if self.is_sampled:
            self.source = PoissonBatches(source, rate, args.epochs, seeds[0] * share.world_size + share.rank)
            total = self._count(len(self.source))
        self.settings = LazyDP(
            clip=1.0 if args.dp_clip is None else args.dp_clip,
            noise_multiplier=args.dp_noise_multiplier,
            sample_rate=rate,
            seed=seeds[0],
            expected_batch_size=max(1.0, rate * total) if self.is_sampled else expected,
        )
        self.delta = default_delta(total) if args.dp_delta is None else args.dp_delta

    @staticmethod
    def _count(num_own: int) -> int:
        number = torch.tensor(num_own, dtype=torch.int64)
        dist.all_reduce(number)
        return int(number)

    def figures(self, pipeline: TrainPipelineSparseDist[Batch, Any]) -> dict[str, Any]:
        """What training has spent; no epsilon where batches were no Poisson samples."""
        assert isinstance(pipeline, ScratchPipeTrainPipeline)
        epsilon = pipeline.epsilon(self.delta) if self.is_sampled else None
        return {
            "epsilon": epsilon,
            "delta": self.delta,
            "clip": self.settings.clip,
            "noise_multiplier": self.settings.noise_multiplier,
            "sample_rate": self.settings.sample_rate,
        }


def _fits(num_bytes: int, args: argparse.Namespace) -> bool:
    """Whether all ranks of this host can keep their training samples, beside the tables; twice, while they are read."""
    available = available_ram_bytes()
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fits = torch.tensor(available is None or 2 * num_bytes * num_ranks < available - ram_bytes(args), dtype=torch.int64)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    return bool(fits)


def get_working_sets(args: argparse.Namespace, source: BatchSource, model: DLRMTrain) -> WorkingSets:
    """What the first batches use of each table, from a file if there is one."""
    if args.working_sets is not None and os.path.exists(args.working_sets):
        return WorkingSets.load(args.working_sets)
    working_sets = measure_working_set(
        source.train(),
        model,
        lookahead=2 if args.lookahead is None else args.lookahead,
        num_batches_seen_ahead=args.num_batches_seen_ahead,
        max_batches=args.num_measured_batches,
    )
    if args.working_sets is not None and dist.get_rank() == 0:
        working_sets.save(args.working_sets)
    return working_sets


def make_planner(
    args: argparse.Namespace, source: BatchSource, model: DLRMTrain, device: torch.device
) -> ScratchPipeShardingPlanner:
    """A planner that is given a budget, or a load factor for every table, or is as good as stock."""
    topology = Topology(
        world_size=dist.get_world_size(),
        compute_device=device.type,
        hbm_cap=None if args.hbm_budget_gb is None else int(args.hbm_budget_gb * 1024**3),
        ddr_cap=1 << 40,
    )
    common: dict[str, Any] = {
        "topology": topology,
        "batch_size": args.batch_size,
        "debug": args.print_sharding_plan,
    }
    if args.embedding_cache == "fused":
        stock = {f"t_{feature}": ParameterConstraints(compute_kernels=["fused"]) for feature in FEATURE_NAMES}
        return ScratchPipeShardingPlanner(**common, constraints=None if args.zch_size is None else stock)
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
            compute_kernels=["fused_uvm_caching"],
            cache_params=CacheParams(load_factor=0.1 if args.load_factor is None else args.load_factor),
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
    bags = (
        ScratchPipeEmbeddingBagCollectionSharder(
            table_dir=args.table_dir, ram_budget_gb=args.ram_budget_gb, host_access=args.host_access
        )
        if is_cached
        else EmbeddingBagCollectionSharder()
    )
    sharders = [bags if args.zch_size is None else ManagedCollisionEmbeddingBagCollectionSharder(ebc_sharder=bags)]
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    args.lookahead = planner.lookahead if args.lookahead is None else args.lookahead
    model = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    return model, make_optimizer(args, model), plan, planner.report


def make_pipeline(
    args: argparse.Namespace,
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer,
    device: torch.device,
    privacy: LazyDP | None = None,
) -> TrainPipelineSparseDist[Batch, Any]:
    if args.embedding_cache == "scratchpipe":
        return ScratchPipeTrainPipeline(
            model,
            optimizer,
            device,
            lookahead=args.lookahead,
            num_batches_seen_ahead=args.num_batches_seen_ahead,
            privacy=privacy,
        )
    return TrainPipelineSparseDist(model, optimizer, device)


class StoppedError(Exception):
    """A signal ended training; everything is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """Notes SIGTERM and Ctrl-C, so that training ends after a batch; a second one ends the process at once."""

    def __init__(self) -> None:
        self._number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        self._number = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def of_any_rank(self) -> int:
        """Ranks get a signal at different batches, and have to save the same one.

        Returns:
            Its number; 0 for none.
        """
        number = torch.tensor(self._number, dtype=torch.int64)
        if dist.get_world_size() > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)


class Trainer:
    """The main job: one pipeline that trains, validates and goes on training."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self._args = args
        self._is_main = dist.get_rank() == 0
        self._device = device
        self._checkpoints = open_checkpoints(args)
        share = Share(dist.get_rank(), dist.get_world_size())
        self._source = make_source(args, share)
        self._privacy = None if args.dp_noise_multiplier is None else Privacy(args, self._source, share)
        if self._is_main:
            print(_about_tables(args))
        if self._privacy is not None:
            self._source = self._privacy.source
            if self._is_main and not self._privacy.is_sampled:
                print("training rows do not fit into memory: batches have a fixed size, which epsilon does not cover")
        self.model, self._optimizer, self.plan, self._report = shard(args, self._source, device)
        settings = None if self._privacy is None else self._privacy.settings
        self._pipeline = make_pipeline(args, self.model, self._optimizer, device, settings)
        self._twin = Twin(args, self.model, self.plan, make_model, make_optimizer, device) if args.verify else None
        self._num_steps = 0  # batches trained; the data loader is ahead of it, but all that counts is what has trained
        if args.resume and self._checkpoints is not None:
            self._resume(self._checkpoints)
        self._stop_signals = StopSignals() if self._checkpoints is not None else None
        self.measurements = Measurements()
        self.validated_s: list[tuple[float, float]] = []  # from when to when
        self._monitor = open_monitor(args, self.model, self._pipeline) if self._is_main else None
        num_steps = max(0, args.epochs * self._source.num_train_batches - self._num_steps)
        self._trace = Trace(args.profile_trace if self._is_main else None, num_steps)
        self._planned_part = planned_part(self._report, num_steps) if self._num_steps == 0 else None
        self._first_step, self._later_half = self._num_steps, (num_steps // 2, num_steps)
        self._counts = ScratchpadCounts(
            self._read_stats, [*self._later_half, *(self._planned_part or ())], args.lookahead
        )
        if self._is_main:
            tables = self.plan.plan[collection_path(args)]
            print_plan(tables, scratchpad_stats(self.model), self._report, args.print_sharding_plan)

    def _resume(self, checkpoints: CheckpointManager) -> None:
        found = checkpoints.load(self.model, self._optimizer)
        if found is None:
            if self._is_main:
                print(f"--resume: {self._args.save_dir} has no checkpoint, so training starts from the beginning")
            return
        self._num_steps = found.step
        if self._twin is not None:
            self._twin.load(checkpoints)
        if self._is_main:
            num_batches, num_epochs = self._source.num_train_batches, self._args.epochs
            epoch, batch = divmod(found.step, num_batches)
            where = f"epoch {epoch + 1} of {num_epochs}, batch {batch + 1} of {num_batches} is next"
            is_done = found.step >= num_epochs * num_batches
            path = checkpoints.path(found.step)
            source = path if path.exists() else f"{self._args.save_dir}, deltas up to step {found.step}"
            print(f"resumed from {source}: {'nothing is left to train' if is_done else where}")

    def run(self) -> dict[str, Any]:
        """Train all epochs, validate, and gather every figure."""
        first_epoch = self._num_steps // self._source.num_train_batches
        metrics: dict[str, float | None] = {}
        for epoch in range(first_epoch, self._args.epochs):
            metrics = self._train_epoch(epoch)
        self._trace.stop()
        self._end_watching()
        if first_epoch >= self._args.epochs:  # the checkpoint was the end
            metrics = self._validate()
        if self._args.evaluate_stock:
            metrics |= {f"stock_{name}": value for name, value in self._validate_stock().items()}
        self._save_at_the_end(for_release=self._privacy is not None)
        figures: dict[str, Any] = {
            "args": {name: value for name, value in vars(self._args).items() if name != "dp_seed"},  # a secret
            **metrics,
            **self.measurements.figures(self._args.batch_size * dist.get_world_size()),
            "scratchpad": [asdict(stats) for stats in scratchpad_stats(self.model)],
            "later_half": self._counts.between(*self._later_half),
        }
        if self._report is not None and self._planned_part is not None:
            figures["misses_per_batch"] = self._compare_misses(self._report, self._planned_part)
        if self._privacy is not None:
            figures["privacy"] = self._privacy.figures(self._pipeline)
        if self._twin is not None:
            figures["verify"] = self._twin.compare(self.model, self._optimizer)
        return figures

    def _end_watching(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            if self._args.html is not None:
                self._monitor.save_report(self._args.html)

    def _compare_misses(self, report: PlanReport, part: tuple[int, int]) -> dict[str, float]:
        """The plan's word on all ranks' misses, and what training counted over the same batches."""
        counted = self._counts.between(*part)  # None on a rank without a scratchpad
        misses = torch.tensor(0.0 if counted is None else counted["misses"], dtype=torch.float64)
        dist.all_reduce(misses)
        first_batch, last_batch = (
            (part[0] + 1, part[1]) if counted is None else (counted["first_batch"], counted["last_batch"])
        )
        planned = sum(table.num_misses for table in report.tables)
        return {"first_batch": first_batch, "last_batch": last_batch, "planned": planned, "counted": float(misses)}

    def _read_stats(self) -> list[PoolStats]:
        """Of batches whose planning has ended."""
        for collection in self.model.modules():
            if isinstance(collection, ShardedScratchPipeEmbeddingBagCollection):
                collection.wait_until_idle()
        return scratchpad_stats(self.model)

    def _train_epoch(self, epoch: int) -> dict[str, float | None]:
        num_batches = self._source.num_train_batches
        period = self._args.validation_freq_within_epoch or num_batches
        done = self._num_steps - epoch * num_batches  # not 0 where it is resumed
        # Poisson samples are not to be the same in every epoch.
        batches = self._source.train(self._num_steps if isinstance(self._source, PoissonBatches) else done)
        is_seen_by_ids = self._args.num_batches_seen_ahead > 0 and self._args.zch_size is None
        if (
            is_seen_by_ids
            and isinstance(self._source, CriteoParquet)
            and isinstance(self._pipeline, ScratchPipeTrainPipeline)
        ):
            self._pipeline.see_ahead(self._source.ids_ahead())
        metrics: dict[str, float | None] = {}
        with tqdm(total=num_batches, initial=done, desc=f"epoch {epoch}", disable=not self._is_main) as bar:
            while done < num_batches:
                num_steps = min(period - done % period, num_batches - done)
                self._train_steps(batches, num_steps, bar)
                done += num_steps
                metrics = self._validate()
                bar.set_postfix({name: value for name, value in metrics.items() if value is not None})
        return metrics

    def _train_steps(self, batches: Iterator[Batch], num_steps: int, bar: "tqdm[Any]") -> None:
        self.model.train()
        own = [next(batches) for _ in range(num_steps)] if self._twin is not None else None
        iterator = iter(own) if own is not None else _take(batches, num_steps)
        for step in range(num_steps):
            random_state = torch.get_rng_state()
            with self.measurements.step():
                loss, _, _ = self._pipeline.progress(iterator)
            if self._twin is not None and own is not None:
                self._twin.step(own[step], loss, random_state)
            if self._args.print_lr and self._is_main:
                bar.write(f"learning rate {self._optimizer.param_groups[0]['lr']:.6f}")
            self._trace.step()
            bar.update()
            self._num_steps += 1
            self._counts.step_done(self._num_steps - self._first_step)
            self._save_if_due()

    def _save_if_due(self) -> None:
        """The checkpoint's step says where the data goes on: all else of the position follows from it."""
        if self._checkpoints is None:
            return
        number = self._stop_signals.of_any_rank() if self._stop_signals is not None else 0
        if number:
            self._save_at_the_end()
            raise StoppedError(number)
        if self._args.delta_every:
            self._checkpoints.trained(self._num_steps, self.model, self._optimizer)
        is_last = self._num_steps == self._args.epochs * self._source.num_train_batches  # that one is for release
        is_left_out = self._privacy is not None and is_last
        if self._args.save_every and self._num_steps % self._args.save_every == 0 and not is_left_out:
            self._checkpoints.async_save(self._num_steps, self.model, self._optimizer)

    def _save_at_the_end(self, *, for_release: bool = False) -> None:
        if self._checkpoints is None:
            return
        self._checkpoints.wait()
        if self._num_steps not in self._checkpoints.steps():  # of this run, or of the one that it went on from
            self._checkpoints.save(self._num_steps, self.model, self._optimizer, for_release=for_release)

    def _validate_stock(self) -> dict[str, float | None]:
        """With plain TorchRec modules in place of sharded ones, over the same tables; on the host, where tables are."""
        plain = to_stock(self.model)
        state = {name: value.cpu() for name, value in [*plain.named_parameters(), *plain.named_buffers()]}
        return self._measure(functional_call(plain, state, (batch,))[1] for batch in self._source.validate())

    def _validate(self) -> dict[str, float | None]:
        self.model.eval()
        start_s = time.perf_counter()
        iterator = _take(self._source.validate(), self._source.num_val_batches)
        with self._counts.validation():
            metrics = self._measure(self._pipeline.progress(iterator) for _ in range(self._source.num_val_batches))
        self.validated_s.append((start_s, time.perf_counter()))
        return metrics

    def _measure(self, outputs: Iterator[Any]) -> dict[str, float | None]:
        auroc = torchmetrics.AUROC(task="binary").to(self._device)
        log_loss = torchmetrics.MeanMetric().to(self._device)
        with torch.no_grad():
            for loss, logits, labels in outputs:
                auroc.update(torch.sigmoid(logits).to(self._device), labels.to(self._device))
                log_loss.update(loss.to(self._device), weight=labels.numel())
        if self._source.num_val_batches == 0:
            return {"auroc": None, "logloss": None}
        return {"auroc": float(auroc.compute()), "logloss": float(log_loss.compute())}


def _take(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    for _, batch in zip(range(count), batches, strict=False):
        yield batch


def open_monitor(
    args: argparse.Namespace, model: DistributedModelParallel, pipeline: TrainPipelineSparseDist[Batch, Any]
) -> ScratchPipeMonitor | None:
    """Live figures of rank 0, if somebody wants them."""
    if args.tensorboard_dir is None and args.json_lines is None and args.html is None:
        return None
    writer = None
    if args.tensorboard_dir is not None:
        from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

        writer = SummaryWriter(args.tensorboard_dir)
    return ScratchPipeMonitor(model, pipeline, args.stats_every, writer, args.json_lines)


def open_checkpoints(args: argparse.Namespace) -> CheckpointManager | None:
    if args.save_dir is None:
        return None
    checkpoints = CheckpointManager(args.save_dir, args.keep_last, delta_every=args.delta_every)
    if checkpoints.steps() and not args.resume:
        raise UsageError(
            f"--save_dir {args.save_dir} has checkpoints of another run; give --resume or another directory"
        )
    return checkpoints


def _about_tables(args: argparse.Namespace) -> str:
    is_in_files = args.table_dir is not None and args.embedding_cache == "scratchpipe"
    place = f"files under {args.table_dir}" if is_in_files else "RAM"
    if torch.cuda.is_available() and args.embedding_cache == "fused":
        place = "device memory"
    text = f"tables: {sum(rows_per_table(args)):,} rows x {args.embedding_dim}, {as_size(table_bytes(args))} in {place}"
    if args.verify:
        text += f", {as_size(ram_bytes(args))} of RAM with the twin's"
    return f"{text}, optimizer state included; --max_num_embeddings caps their rows"


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Train, and say what came of it; returns the exit status."""
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
        except StoppedError as stop:
            dist.destroy_process_group()
            if is_main:
                print(f"{stop}: all is saved in {args.save_dir}; go on with --resume")
            return 128 + stop.number  # as a shell has it; 0 would say that the run has finished
        spans = stage_spans(trainer.model)
        dist.destroy_process_group()
    if is_main:
        print(summary_line(figures), flush=True)
        if args.json is not None:
            with open(args.json, "w") as file:
                json.dump(figures, file, indent=2)
        if args.plot is not None:
            plot(spans, trainer.validated_s, args.plot)
    return 0


def main() -> int:
    args = parse_args(str(__doc__))
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # it tells that TorchRec uses one of its older functions
    warnings.filterwarnings("ignore", module=r"torchrec|torch\.distributed")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    try:
        return run(args, device)
    except (UsageError, CriteoFormatError, ScratchPipeError, PlannerError, OSError) as error:
        text = " ".join(str(error).split())
        for setting, flag in FLAGS.items():
            text = text.replace(setting, flag)
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was saved", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
