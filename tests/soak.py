# SPDX-License-Identifier: BSD-3-Clause
"""Trains a tiny model for a very long time, beside stock TorchRec, and watches what grows.

    python tests/soak.py --batches 200000 --minutes 60 --json soak.json

Random changes of lookahead, evaluations, saves of either kind, loads, dropped batches and new iterators in mid-run.
Memory, threads and file handles are compared between the first tenth and the end; weights and optimizer states with
stock's, to the bit, at the end and ten times before. Exits with 1 if anything grew or differs.

With `--managed_collision`, raw ids that change all the time are remapped into a table of 100,000 rows, 50 new ones in
every batch. Every row is marked before it is given to another id, and no lookup may find a mark.
"""

import argparse
import gc
import json
import logging
import random
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from collisions import CollisionModel, CollisionSetting, make_collision_batches
from helpers import Setting, Trainer, assert_same_bits, make_batches
from torch import Tensor
from torchrec.datasets.utils import Batch

from torchrec_scratchpipe import CheckpointManager, scratchpad_stats

SETTING = Setting(num_batches=500, load_factor=0.25, num_rows=(200, 150, 3), batch_size=4)
NUM_CHECKS = 10
MAX_GROWTH_MB = 8.0  # between the first tenth and the end


class Soak:
    """Ours and stock, on the same batches."""

    def __init__(self, directory: Path, seed: int, is_mapped: bool) -> None:
        self._rng = random.Random(seed)
        (directory / "tables").mkdir()
        self._stock = Trainer(SETTING)
        self._ours = Trainer.scratchpipe(SETTING, table_dir=str(directory / "tables") if is_mapped else None)
        self._ours.copy_from(self._stock)
        self._batches = make_batches(SETTING)
        self._manager = CheckpointManager(directory / "checkpoints", keep_last=2)
        self.num_trained = 0
        self.events: Counter[str] = Counter()

    def train_some(self) -> None:
        """With one pipeline, up to 400 batches, and whatever else happens meanwhile."""
        lookahead, seen_ahead = self._rng.randint(1, 5), self._rng.choice([0, 0, 4, 12])
        pipeline = self._ours.pipeline(lookahead=lookahead, num_batches_seen_ahead=seen_ahead)
        self.events["new pipeline"] += 1
        for _ in range(self._rng.randint(1, 4)):
            count = self._rng.randint(1, 100)
            first = self._rng.randrange(len(self._batches) - count)
            given = self._batches[first : first + count]
            iterator = iter(given)
            num_to_train = count if self._rng.random() < 0.8 else self._rng.randint(0, count)
            for batch in given[:num_to_train]:
                pipeline.progress(iterator)
                self._stock.step(batch)
                self.num_trained += 1
                if self._rng.random() < 0.002:
                    self._save()
            if num_to_train < count:
                pipeline.reset()
                self.events["batches dropped"] += 1
            self.events["new iterator"] += 1
            if self._rng.random() < 0.2:
                self._evaluate(pipeline)
        if self._rng.random() < 0.01:
            self._load()

    def _save(self) -> None:
        if self.num_trained in self._manager.steps():
            return
        save = self._rng.choice([self._manager.save, self._manager.async_save])
        save(self.num_trained, self._ours.model, self._ours.optimizer, extra={"batches": self.num_trained})
        self.events[save.__name__] += 1

    def _load(self) -> None:
        """Save and load right away: all bits stay as they are, and every row is read anew."""
        self._manager.wait()
        self._save()
        self._manager.wait()
        found = self._manager.load(self._ours.model, self._ours.optimizer)
        assert found is not None
        assert found.step == self.num_trained
        self.events["load"] += 1

    def _evaluate(self, pipeline: Any) -> None:
        self._ours.model.eval()
        batches: Iterator[Batch] = iter(self._rng.sample(self._batches, 5))
        for _ in range(5):
            pipeline.progress(batches)
        self._ours.model.train()
        self.events["evaluation"] += 1

    def check(self) -> None:
        """Compare every bit with stock."""
        self._manager.wait()
        assert_same_bits(self._stock, self._ours)
        stats = scratchpad_stats(self._ours.model)
        assert all(pool.num_misses_at_train == 0 for pool in stats)
        self.events["comparison"] += 1
        self.events["eviction"] = sum(pool.num_victims for pool in stats)


COLLISIONS = CollisionSetting(
    num_rows=(100_000, 64, 40),
    dims=(4, 4, 4),
    load_factor=0.02,
    policy="distance",
    eviction_interval=200,
    batch_size=16,
    num_ids=300,
    num_batches=500,
)
NEW_IDS_PER_BATCH = 50
MARK = 1e6


class MarkedModel(CollisionModel):
    """Looks for marks in what it looks up."""

    def forward(self, batch: Batch) -> Any:
        loss, found = super().forward(batch)
        # Weights stay far below the mark, and a logit sums some of them.
        assert float(found[: COLLISIONS.batch_size].abs().max()) < MARK / 1e3, "the row of an id that has gone"
        return loss, found


class CollisionSoak(Soak):
    """Ours and stock, with ids that are never the same for long."""

    def __init__(self, directory: Path, seed: int, is_mapped: bool) -> None:
        self._rng = random.Random(seed)
        (directory / "tables").mkdir()
        self._stock = Trainer(COLLISIONS, make_model=MarkedModel)
        table_dir = str(directory / "tables") if is_mapped else None
        self._ours = Trainer.scratchpipe(COLLISIONS, make_model=MarkedModel, table_dir=table_dir)
        self._ours.copy_from(self._stock)
        self._manager = CheckpointManager(directory / "checkpoints", keep_last=2)
        self.num_trained = 0
        self.events: Counter[str] = Counter()
        for trainer in (self._stock, self._ours):
            remapped = trainer.model.module.remapped
            remapped._evict = partial(self._evict_marked, remapped, remapped._evict)

    def _evict_marked(self, module: Any, evict: Any, evictions: dict[str, Tensor | None]) -> None:
        with torch.no_grad():
            for table, rows in evictions.items():
                if rows is not None:
                    module._embedding_module.embedding_bags.get_parameter(f"{table}.weight")[rows] = MARK
                    self.events["rows marked"] += rows.numel()
        evict(evictions)

    def train_some(self) -> None:
        lookahead, seen_ahead = self._rng.randint(1, 5), self._rng.choice([0, 0, 4, 12])
        pipeline = self._ours.pipeline(lookahead=lookahead, num_batches_seen_ahead=seen_ahead)
        self.events["new pipeline"] += 1
        given = make_collision_batches(COLLISIONS, 0, NEW_IDS_PER_BATCH, self.num_trained)
        num_to_train = len(given) if self._rng.random() < 0.8 else self._rng.randint(1, len(given))
        iterator = iter(given)
        for batch in given[:num_to_train]:
            torch.manual_seed(self.num_trained)  # rows that change hands are drawn anew, and dropout draws
            actual = pipeline.progress(iterator)
            torch.manual_seed(self.num_trained)
            assert torch.equal(self._stock.step(batch), actual), f"batch {self.num_trained}"
            self.num_trained += 1
            if self._rng.random() < 0.0005:
                self._save()
        if num_to_train < len(given):
            pipeline.reset()
            self.events["batches dropped"] += 1


def resources() -> dict[str, float]:
    """What must not grow."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "anonymous_mb": int(status["RssAnon"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "python_threads": threading.active_count(),
        "file_handles": len(list(Path("/proc/self/fd").iterdir())),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so many at the latest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table_dir", action="store_true", help="memory-mapped tables")
    parser.add_argument("--managed_collision", action="store_true", help="raw ids, remapped while training")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        soak = (CollisionSoak if args.managed_collision else Soak)(directory, args.seed, args.table_dir)
        samples: list[dict[str, float]] = []
        while soak.num_trained < args.batches and time.monotonic() - start_s < 60 * args.minutes:
            soak.train_some()
            if soak.num_trained * NUM_CHECKS >= (len(samples) + 1) * args.batches:
                soak.check()
                samples.append({"batches": soak.num_trained, "s": time.monotonic() - start_s, **resources()})
                print({key: round(value, 1) for key, value in samples[-1].items()}, flush=True)
        soak.check()
        dist.destroy_process_group()
    first, last = samples[0], samples[-1]
    grown = [name for name in ("threads", "python_threads", "file_handles") if last[name] > first[name]]
    grown += ["anonymous_mb"] if last["anonymous_mb"] > first["anonymous_mb"] + MAX_GROWTH_MB else []
    print(f"{soak.num_trained:,} batches in {time.monotonic() - start_s:.0f} s, {dict(soak.events)}")
    print(f"the same bits as stock; grown: {', '.join(grown) or 'nothing'}")
    if args.json:
        args.json.write_text(json.dumps({"events": soak.events, "samples": samples, "grown": grown}, indent=1) + "\n")
    return int(bool(grown) or soak.num_trained < args.batches)


if __name__ == "__main__":
    sys.exit(main())
