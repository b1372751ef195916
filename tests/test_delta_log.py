# SPDX-License-Identifier: BSD-3-Clause
"""A delta log brings back the bits of the run that wrote it; what is missing, moved or damaged is named or dropped."""

import itertools
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import torch.distributed as dist
from helpers import (
    Setting,
    Trainer,
    assert_refuses_half_loaded,
    assert_same_bits,
    drain,
    full_state,
    local_tensors,
    make_batches,
    run_ranks,
    with_optimizer,
)
from test_checkpoint import local_shards, with_dtensors
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_scratchpipe import (
    CheckpointManager,
    CheckpointMismatchError,
    CheckpointSaveError,
    ConfigError,
    StageFailedError,
)
from torchrec_scratchpipe.checkpoint import delta_log, files
from torchrec_scratchpipe.checkpoint.delta_chain import Chain, DeltaSet
from torchrec_scratchpipe.checkpoint.delta_files import MAGIC, Kind, SegmentReader, SegmentWriter
from torchrec_scratchpipe.checkpoint.files import SafeReader
from torchrec_scratchpipe.core import changes
from torchrec_scratchpipe.core.host_table import HostTable
from torchrec_scratchpipe.sharding.model import scratchpad_collections

SETTING = Setting(num_batches=60, load_factor=0.25)
OPTIMIZERS = [torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that deltas of these tests are read in several pieces, and fill several files."""
    monkeypatch.setattr(changes, "ROWS_READ_TOGETHER", 16)
    monkeypatch.setattr(delta_log, "SEGMENT_BYTES", 20_000)


def run(
    manager: CheckpointManager,
    trainer: Trainer,
    last: int,
    first: int = 0,
    after: Callable[[int], object] = lambda _: None,
    lookahead: int = 2,
    setting: Setting = SETTING,
) -> None:
    """Train batches `first` to `last`, and say so."""
    pipeline, batches = trainer.pipeline(lookahead), iter(make_batches(setting)[first:])
    for step in range(first + 1, last + 1):
        pipeline.progress(batches)
        manager.trained(step, trainer.model, trainer.optimizer, extra={"step": step})
        after(step)
    manager.wait()


def loaded(directory: Path, setting: Setting = SETTING, step: int | None = None, **kwargs: Any) -> tuple[int, Trainer]:
    other = Trainer.scratchpipe(replace(setting, seed=5), **kwargs)
    found = CheckpointManager(directory).load(other.model, other.optimizer, step)
    assert found is not None
    assert found.extra == {"step": found.step}
    return found.step, other


def trained(setting: Setting, num_batches: int) -> Trainer:
    trainer = Trainer.scratchpipe(setting)
    drain(trainer.pipeline(), make_batches(setting)[:num_batches])
    assert num_batches < 20 or trainer.num_victims > 0
    return trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_job_goes_on_from_its_last_delta(
    optimizer: type[torch.optim.Optimizer], is_mapped: bool, tmp_path: Path
) -> None:
    setting = with_optimizer(SETTING, optimizer)
    kwargs = {"table_dir": str(tmp_path)} if is_mapped else {}
    part = Trainer.scratchpipe(setting, **kwargs)
    run(CheckpointManager(tmp_path / "c", delta_every=3), part, 29, setting=setting)
    # 1. The last delta is of batch 28, because the first call saved the checkpoint, after batch 1.
    step, resumed = loaded(tmp_path / "c", replace(setting, load_factor=0.6))
    assert step == 28
    assert_same_bits(trained(setting, 28), resumed)
    # 2. It goes on, and logs on.
    manager = CheckpointManager(tmp_path / "c", delta_every=3)
    resumed = Trainer.scratchpipe(replace(setting, seed=6))
    assert manager.load(resumed.model, resumed.optimizer).step == 28  # type: ignore[union-attr]
    run(manager, resumed, 60, 28, lookahead=4, setting=setting)
    step, again = loaded(tmp_path / "c", setting)
    assert step == 58
    assert_same_bits(trained(setting, 58), again)
    assert manager.steps() == [1]


BUSY = replace(SETTING, batch_size=12, load_factor=0.5)


@pytest.mark.parametrize("lookahead", [1, 4])
def test_every_delta_has_the_rows_that_were_trained_once_each_as_they_were(
    lookahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the background is slow, so that rows train again, and leave and come back, before they are read."""
    expected: dict[int, dict[str, list[torch.Tensor]]] = {}
    ours = Trainer.scratchpipe(BUSY)
    manager = CheckpointManager(tmp_path, delta_every=4)
    pipeline, batches = ours.pipeline(lookahead), make_batches(BUSY)
    iterator = iter(batches)
    num_kept = note_kept(monkeypatch)
    slow = hold_reading(monkeypatch)
    for step in range(1, 42):
        pipeline.progress(iterator)
        if step % 4 == 1 and step > 1:
            slow.let_go()  # what was taken four batches ago is read to its end only now
        manager.trained(step, ours.model, ours.optimizer, extra={"step": step})
        if step % 4 == 1 and step > 1:
            expected[step] = full_state(trained(BUSY, step))
    slow.let_go()
    manager.wait()
    assert ours.num_victims > 0
    assert sum(num_kept) > 100
    for step in range(5, 42, 4):
        _, other = loaded(tmp_path, BUSY, step)
        found = full_state(other)
        for name, tensors in expected[step].items():
            for one, two in zip(tensors, found[name], strict=True):
                assert torch.equal(one, two), (step, name)
    chain = Chain.read(tmp_path)
    assert [delta_set.step for delta_set in chain.sets] == list(range(5, 42, 4))
    for delta_set in chain.sets:
        rows = rows_of(delta_set)
        assert rows == sorted(set(rows)), "a row is logged twice"
        assert set(rows) == trained_rows(ours, batches[delta_set.since : delta_set.step])


def note_kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were kept because they were about to change."""
    kept: list[int] = []
    original = changes.Changes._keep

    def keep(self: changes.Changes, rows: torch.Tensor, values: list[torch.Tensor]) -> None:
        kept.append(rows.numel())
        original(self, rows, values)

    monkeypatch.setattr(changes.Changes, "_keep", keep)
    return kept


class Gate:
    """Holds the background back."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def let_go(self) -> None:
        self.event.set()
        self.event = threading.Event()


def hold_reading(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Of each delta, a part is read when it is taken, the rest when the gate is opened.

    `trained` does not wait for it meanwhile: more batches than one change rows that are still to be read.
    """
    gate = Gate()
    monkeypatch.setattr(delta_log.DeltaLog, "wait_until_written", lambda _: None)
    read_all, cut_off = changes.Changes.read, changes.Changes.cut
    opened: dict[changes.Changes, threading.Event] = {}

    def cut(self: changes.Changes) -> None:
        opened[self] = gate.event
        cut_off(self)

    def read(self: changes.Changes, between_batches: Any) -> Iterator[changes.ChangedRows]:
        waits_for = opened[self]
        for number, rows in enumerate(read_all(self, between_batches)):
            yield rows
            if number == 1:
                assert waits_for.wait(60)

    monkeypatch.setattr(changes.Changes, "cut", cut)
    monkeypatch.setattr(changes.Changes, "read", read)
    return gate


def rows_of(delta_set: DeltaSet) -> list[tuple[int, int]]:
    """Pool and row of each that it has, ascending."""
    rows = []
    for reader, record in delta_set.records:
        for block in record.row_blocks:
            ids = reader.rows(block).rows.tolist()
            assert ids == sorted(ids)
            rows += [(block.pool, row) for row in ids]
    return sorted(rows)


def trained_rows(trainer: Trainer, batches: Sequence[Batch]) -> set[tuple[int, int]]:
    """By the ids of the batches alone."""
    pools = [pool for collection in scratchpad_collections(trainer.model) for pool in collection.pools]
    rows = set()
    for index, pool in enumerate(pools):
        for table, first_row in zip(pool.host_table.tables, pool.host_table.row_offsets, strict=False):
            for feature in SETTING.feature_names(SETTING.table_names.index(table.name)):
                for batch in batches:
                    rows |= {(index, first_row + row) for row in batch.sparse_features[feature].values().tolist()}
    return rows


# Several ranks.

SHARDED = replace(SETTING, num_rows=(200, 150, 40), num_batches=14)
COLUMNS = replace(SHARDED, sharding_type="column_wise", min_partition=4)
ROWS = replace(SHARDED, sharding_type="row_wise")
TABLES = replace(SHARDED, sharding_type="table_wise")
GRID = replace(SHARDED, sharding_type="grid_shard", local_size=2, min_partition=4)


def _log_sharded(rank: int, directory: str, setting: Setting) -> None:
    _make_pieces_small()
    ours = Trainer.scratchpipe(setting)
    manager = CheckpointManager(Path(directory) / "c", delta_every=3)
    pipeline, batches = ours.pipeline(), iter(make_batches(setting, rank=rank))
    for step in range(1, 11):
        pipeline.progress(batches)
        manager.trained(step, ours.model, ours.optimizer, extra=rank)
    manager.wait()
    # What is saved whole, after the last delta was taken, is what deltas are compared with.
    CheckpointManager(Path(directory) / "whole").save(10, ours.model, ours.optimizer)


def _load_sharded(rank: int, directory: str, setting: Setting, num_logging: int) -> None:
    _make_pieces_small()
    ours, expected = Trainer.scratchpipe(replace(setting, seed=5)), Trainer.scratchpipe(replace(setting, seed=6))
    manager = CheckpointManager(Path(directory) / "c", delta_every=2)
    found = manager.load(ours.model, ours.optimizer, check_first=True)
    assert found is not None
    assert (found.step, found.world_size) == (10, num_logging)
    assert found.extra == (rank if num_logging == dist.get_world_size() else 0)
    CheckpointManager(Path(directory) / "whole").load(expected.model, expected.optimizer)
    assert_same_bits(expected, ours)
    in_one_pass = Trainer.scratchpipe(replace(setting, seed=8))
    CheckpointManager(Path(directory) / "c").load(in_one_pass.model, in_one_pass.optimizer)
    assert_same_bits(expected, in_one_pass)
    # It goes on, on other ranks, and so does its log.
    batches = make_batches(setting, rank=rank)[10:]
    pipeline, iterator = ours.pipeline(), iter(batches)
    for step in range(11, 15):
        pipeline.progress(iterator)
        manager.trained(step, ours.model, ours.optimizer, extra=rank)
    manager.wait()
    drain(expected.pipeline(), batches)
    assert_same_bits(expected, ours)
    back = Trainer.scratchpipe(replace(setting, seed=7))
    found = CheckpointManager(Path(directory) / "c").load(back.model, back.optimizer)
    assert found is not None
    assert (found.step, found.world_size) == (14, dist.get_world_size())
    assert_same_bits(expected, back)


def _make_pieces_small() -> None:
    changes.ROWS_READ_TOGETHER = 16
    delta_log.SEGMENT_BYTES = 20_000


@pytest.mark.dist
@pytest.mark.parametrize(
    ("logging", "num_logging", "loading", "num_loading"),
    [
        (TABLES, 2, ROWS, 4),
        (ROWS, 2, ROWS, 2),
        (COLUMNS, 2, replace(TABLES, load_factor=0.6), 1),
        (TABLES, 1, with_optimizer(COLUMNS, torch.optim.Adagrad), 2),
        (GRID, 4, TABLES, 2),
        (with_optimizer(ROWS, RowWiseAdagrad), 4, with_optimizer(TABLES, RowWiseAdagrad), 2),
        (with_optimizer(TABLES, torch.optim.SGD), 2, with_optimizer(ROWS, torch.optim.SGD), 2),
    ],
    ids=[
        "tables 2 to rows 4",
        "rows 2 to rows 2",
        "columns 2 to tables 1",
        "tables 1 to columns 2",
        "grid 4 to tables 2",
        "rows 4 to tables 2, row-wise Adagrad",
        "tables 2 to rows 2, SGD",
    ],
)
def test_resharding(logging: Setting, num_logging: int, loading: Setting, num_loading: int, tmp_path: Path) -> None:
    run_ranks(num_logging, _log_sharded, str(tmp_path), logging, local_size=logging.local_size)
    run_ranks(num_loading, _load_sharded, str(tmp_path), loading, num_logging, local_size=loading.local_size)


@pytest.mark.parametrize(
    "changes_of_setting",
    [
        {"dims": (8, 4, 16), "num_rows": (200, 150, 60)},
        {"data_type": DataType.FP16, "dims": (8, 4, 4)},
        {"is_pooled": False, "index_dtype": torch.int32},
        {"features_per_table": {1: ("f1", "g1")}, "is_weighted": True},
        {"fused_tables": ("t0",), "dims": (8, 8, 16)},
    ],
    ids=["three pools", "halves", "sequences", "two features", "beside a table that is kept whole"],
)
def test_every_kind_of_table_is_logged(changes_of_setting: dict[str, Any], tmp_path: Path) -> None:
    setting = replace(SETTING, **changes_of_setting)
    ours = Trainer.scratchpipe(setting)
    manager = CheckpointManager(tmp_path, delta_every=4)
    run(manager, ours, 30, setting=setting)
    assert ours.num_victims > 0
    step, other = loaded(tmp_path, setting)
    assert step == 29
    twin = Trainer.scratchpipe(setting)
    drain(twin.pipeline(), make_batches(setting)[:29])
    assert_same_bits(twin, other)
    manager.compact().result()
    assert manager.steps() == [1, 29]
    _, folded = loaded(tmp_path, setting, step=29)
    assert_same_bits(twin, folded)


def _log_dtensors(rank: int, directory: str) -> None:
    _make_pieces_small()
    for setting in (TABLES, ROWS, COLUMNS):
        path = Path(directory) / setting.sharding_type
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(helpers, "DistributedModelParallel", with_dtensors)
            ours, other = Trainer.scratchpipe(setting), Trainer.scratchpipe(replace(setting, seed=5))
        manager = CheckpointManager(path, delta_every=3)
        pipeline, batches = ours.pipeline(), iter(make_batches(setting, rank=rank))
        for step in range(1, 11):
            pipeline.progress(batches)
            manager.trained(step, ours.model, ours.optimizer)
        manager.wait()
        sharded = Trainer.scratchpipe(replace(setting, seed=6))
        expected = ours.model.state_dict()
        for found in (other, sharded):
            assert CheckpointManager(path).load(found.model, found.optimizer).step == 10  # type: ignore[union-attr]
            state = found.model.state_dict()
            for name, value in expected.items():
                left, right = local_shards(value), local_shards(state[name])
                assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True)), name


@pytest.mark.dist
def test_state_as_dtensors(tmp_path: Path) -> None:
    run_ranks(2, _log_dtensors, str(tmp_path))


# What changes rows beside Train, and what is no row.


def test_rows_that_are_reset_are_logged(tmp_path: Path) -> None:
    """Without being trained, in a slot or not, by TorchRec's way for dynamic ids, while the delta before is read."""
    setting = with_optimizer(SETTING, RowWiseAdagrad)
    ours = Trainer.scratchpipe(setting)
    manager = CheckpointManager(tmp_path, delta_every=2)
    rows = torch.arange(0, 150, 3)

    def reset(step: int) -> None:
        if step == 9:
            reset_rows(ours, rows)

    run(manager, ours, 11, after=reset, setting=setting)
    twin = Trainer.scratchpipe(setting)
    drain(twin.pipeline(), make_batches(setting)[:9])
    reset_rows(twin, rows)
    drain(twin.pipeline(), make_batches(setting)[9:11])
    step, other = loaded(tmp_path, setting)
    assert step == 11
    assert_same_bits(twin, other)
    _, before = loaded(tmp_path, setting, step=9)
    assert_same_bits(trained(setting, 9), before)


def reset_rows(trainer: Trainer, rows: torch.Tensor) -> None:
    (collection,) = scratchpad_collections(trainer.model)
    (kernel,) = (kernel for served in collection._served for kernel in served.kernels.values())
    bounds = torch.tensor([0, rows.numel()], dtype=torch.int64)
    kernel.emb_module.reset_embedding_weight_momentum(
        rows, bounds, torch.tensor([1], dtype=torch.int64), torch.tensor([0], dtype=torch.int64)
    )


def overwrite(trainer: Trainer) -> None:
    for name, value in trainer.model.state_dict().items():
        if "embedding_bags" in name:
            for tensor in local_tensors(value):
                tensor.mul_(0.5)


def write_in_numpy(trainer: Trainer) -> None:
    value = trainer.model.state_dict()["ebc.embedding_bags.t1.weight"]
    array = local_tensors(value)[0].numpy()
    array *= 0.5


def load_other(trainer: Trainer) -> None:
    trainer.model.load_state_dict(Trainer.scratchpipe(replace(SETTING, seed=9)).model.state_dict())


@pytest.mark.parametrize("write", [overwrite, write_in_numpy, load_other])
def test_tables_that_are_overwritten_are_logged_whole(write: Callable[[Trainer], None], tmp_path: Path) -> None:
    ours, twin = Trainer.scratchpipe(SETTING), Trainer.scratchpipe(SETTING)
    run(
        CheckpointManager(tmp_path, delta_every=2),
        ours,
        14,
        after=lambda step: write(ours) if step == 10 else None,
    )
    drain(twin.pipeline(), make_batches(SETTING)[:10])
    write(twin)
    drain(twin.pipeline(), make_batches(SETTING)[10:13])
    step, other = loaded(tmp_path)
    assert step == 13
    assert_same_bits(twin, other)
    chain = Chain.read(tmp_path)
    sizes = [len(rows_of(one)) for one in chain.sets]
    assert sizes[4] == sum(SETTING.num_rows)
    assert max(sizes[:4] + sizes[5:]) < sum(SETTING.num_rows) / 2


def test_a_state_dict_that_is_only_read_logs_nothing_more(tmp_path: Path) -> None:
    ours = Trainer.scratchpipe(SETTING)
    run(CheckpointManager(tmp_path, delta_every=2), ours, 13, after=lambda _: full_state(ours))
    assert max(len(rows_of(one)) for one in Chain.read(tmp_path).sets) < sum(SETTING.num_rows) / 2
    assert_same_bits(trained(SETTING, 13), loaded(tmp_path)[1])


def test_states_of_dense_optimizers_and_kept_whole_tables_are_logged(tmp_path: Path) -> None:
    setting = replace(SETTING, fused_tables=("t1",))

    def make(seed: int = 0) -> Trainer:
        trainer = Trainer.scratchpipe(replace(setting, seed=seed))
        parameters = {name: p for name, p in trainer.model.named_parameters() if "over" in name}
        dense = KeyedOptimizerWrapper(parameters, lambda p: torch.optim.Adam(p, lr=0.05))
        trainer.optimizer = CombinedOptimizer([trainer.model.fused_optimizer, dense])
        return trainer

    ours, twin, other = make(), make(), make(seed=5)
    manager = CheckpointManager(tmp_path, delta_every=2, state_every=6)
    manager.save(0, ours.model, ours.optimizer, extra={"step": 0})  # before Adam has any state
    manager.load(ours.model, ours.optimizer)
    run(manager, ours, 17, setting=setting)
    assert manager.steps() == [0]
    assert [one.step for one in Chain.read(tmp_path).sets if one.has_state] == [6, 12]
    found = CheckpointManager(tmp_path).load(other.model, other.optimizer)
    assert found is not None
    assert found.step == 12
    drain(twin.pipeline(), make_batches(setting)[:12])
    assert_same_bits(twin, other)
    for trainer in (twin, other):
        drain(trainer.pipeline(), make_batches(setting)[12:20])
    assert_same_bits(twin, other)


# Damage.


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A directory with a checkpoint of batch 1 and deltas up to batch 31, in several files."""
    run(CheckpointManager(tmp_path / "c", delta_every=3), Trainer.scratchpipe(SETTING), 32)
    for empty in set(segments(tmp_path / "c")) - set(full_segments(tmp_path / "c")):
        empty.unlink()
    assert len(segments(tmp_path / "c")) > 3
    return tmp_path / "c"


def segments(directory: Path) -> list[Path]:
    return sorted((directory / "deltas").iterdir())


def full_segments(directory: Path) -> list[Path]:
    """Those that have a record."""
    return [path for path in segments(directory) if record_bounds(path)]


def check_refused(directory: Path, message: str, *, is_unread: bool = False) -> None:
    """Loading raises, and changes no bit, or leaves a model that refuses to be used.

    What need not be read may be damaged, if it is not checked first.
    """
    untouched, ours = Trainer.scratchpipe(SETTING), Trainer.scratchpipe(SETTING)
    with pytest.raises(CheckpointMismatchError, match=message):
        CheckpointManager(directory).load(ours.model, ours.optimizer, check_first=True)
    assert_same_bits(untouched, ours)
    if is_unread:  # dense states of all deltas but the last
        found = CheckpointManager(directory).load(ours.model, ours.optimizer)
        assert found is not None
        assert_same_bits(trained(SETTING, found.step), ours)
        return
    with pytest.raises(CheckpointMismatchError, match=message):
        CheckpointManager(directory).load(ours.model, ours.optimizer)
    if is_half_loaded(ours):
        assert_refuses_half_loaded(ours, make_batches(SETTING)[:4])
    else:
        assert_same_bits(untouched, ours)


def is_half_loaded(trainer: Trainer) -> bool:
    pools = [pool for collection in scratchpad_collections(trainer.model) for pool in collection.pools]
    return any(pool.load_failure is not None for pool in pools)


def places(path: Path) -> dict[str, list[int]]:
    """Where in a segment, by class of bytes, something lies."""
    reader = SegmentReader(path)
    segment = reader.scan()
    assert segment is not None
    found: dict[str, list[int]] = {"schema header": list(range(40)), "schema": list(range(40, segment.begin))}
    names = {Kind.ROWS: "rows", Kind.STATE: "state"}
    for record in segment.records:
        for block in record.blocks:
            first, last = block.offset, block.offset + block.num_bytes
            found.setdefault(f"{names[block.kind]} header", []).extend(range(first - 40, first))
            middle = first + 4 * block.num_rows if block.kind == Kind.ROWS else first
            found.setdefault("ids", []).extend(range(first, middle))
            found.setdefault("values" if block.kind == Kind.ROWS else "state", []).extend(range(middle, last))
        end_block = max(block.offset + block.num_bytes for block in record.blocks)
        found.setdefault("end header", []).extend(range(end_block, end_block + 40))
        found.setdefault("end", []).extend(range(end_block + 40, record.end_offset))
    reader.close()
    return found


def last_state(content: bytes) -> int:
    return content.rindex(MAGIC + bytes([Kind.STATE]))


def last_end(content: bytes) -> int:
    return content.rindex(MAGIC)


CLASSES = ["schema header", "schema", "rows header", "ids", "values", "state header", "state", "end header", "end"]


@pytest.mark.fault("a bit-flipped delta log, in every class of bytes, in any record")
@pytest.mark.parametrize("kind", CLASSES)
def test_a_flipped_bit_is_named(kind: str, log: Path, record_property: Callable[[str, object], None]) -> None:
    rng = random.Random(kind)
    record_property("tries", 6)
    paths = full_segments(log)
    for number in range(6):
        path = paths[[0, 1, -1][number % 3]]
        content = path.read_bytes()
        damaged = bytearray(content)
        at = rng.choice(places(path)[kind])
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        is_last = path == paths[-1] and at >= last_end(content)
        if kind.startswith("end") and is_last:  # a record without an end was never whole
            assert loaded(log)[0] == 28
        else:
            is_unread = kind == "state" and (path != paths[-1] or at < last_state(content))
            check_refused(log, path.name, is_unread=is_unread)
        path.write_bytes(content)
    assert loaded(log)[0] == 31


@pytest.mark.fault("a delta log that is cut anywhere")
def test_a_cut_tail_is_dropped_and_what_is_before_it_counts(log: Path, record_property: Callable[..., None]) -> None:
    path = full_segments(log)[-1]
    content = path.read_bytes()
    reader = SegmentReader(path)
    segment = reader.scan()
    assert segment is not None
    ends = {segment.schema.since: segment.begin} | {record.step: record.end_offset for record in segment.records}
    rng = random.Random(3)
    cuts = [rng.randrange(segment.begin, len(content)) for _ in range(6)]
    first_end = segment.records[0].end_offset
    cuts += [segment.begin, len(content[:first_end].rstrip(b"\0")) - 12, first_end - 12, first_end]
    record_property("tries", 2 * len(cuts))
    for cut in cuts:
        # Cut short; and as long as before, but never written, as a system leaves it that went down.
        for tail in (b"", bytes(len(content) - cut)):
            path.write_bytes(content[:cut] + tail)
            expected = max(step for step, end in ends.items() if path.read_bytes()[:end] == content[:end])
            step, other = loaded(log)
            assert step == expected
            assert_same_bits(trained(SETTING, expected), other)
            # The job that goes on from there leaves the tail out for good.
            again = replace(SETTING, seed=5)
            ours, manager = Trainer.scratchpipe(again), CheckpointManager(log, delta_every=3)
            manager.load(ours.model, ours.optimizer)
            if tail and cut == cuts[0]:
                run(manager, ours, expected + 4, expected)
                assert loaded(log)[0] == expected + 3
                segments(log)[-1].unlink()
    path.write_bytes(content)


def drop(directory: Path, position: int) -> None:
    segments(directory)[position].unlink()


def swap(directory: Path) -> None:
    first, second = segments(directory)[1:3]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def repeat_a_record(directory: Path) -> None:
    path = segments(directory)[0]
    (first, *_) = record_bounds(path)
    content = path.read_bytes()
    path.write_bytes(content[: first[1]] + content[first[0] : first[1]] + content[first[1] :])


def leave_a_record_out(directory: Path) -> None:
    path = segments(directory)[0]
    (first, *_) = record_bounds(path)
    content = path.read_bytes()
    path.write_bytes(content[: first[0]] + content[first[1] :])


def turn_two_records_round(directory: Path) -> None:
    path = segments(directory)[0]
    (first, second, *_) = record_bounds(path)
    content = path.read_bytes()
    path.write_bytes(
        content[: first[0]] + content[second[0] : second[1]] + content[first[0] : first[1]] + content[second[1] :]
    )


def record_bounds(path: Path) -> list[tuple[int, int]]:
    segment = SegmentReader(path).scan()
    assert segment is not None
    ends = [segment.begin, *(record.end_offset for record in segment.records)]
    return list(itertools.pairwise(ends))


def cut_a_file_in_the_middle(directory: Path) -> None:
    path = segments(directory)[1]
    path.write_bytes(path.read_bytes()[:-10])


def take_a_file_of_another_run(directory: Path) -> None:
    other = directory.parent / "other"
    run(CheckpointManager(other, delta_every=3), Trainer.scratchpipe(replace(SETTING, seed=3)), 32)
    names = {path.name for path in segments(other)} & {path.name for path in segments(directory)}
    name = sorted(names)[-1]
    shutil.copy(other / "deltas" / name, directory / "deltas" / name)


def take_all_files_of_another_run(directory: Path) -> None:
    other = directory.parent / "other"
    run(CheckpointManager(other, delta_every=3), Trainer.scratchpipe(replace(SETTING, seed=3)), 32)
    shutil.rmtree(directory / "deltas")
    shutil.copytree(other / "deltas", directory / "deltas")


def rename(directory: Path) -> None:
    path = segments(directory)[-1]
    path.rename(path.with_name("000000000099_00000.log"))


@pytest.mark.fault("delta logs with records missing, twice, in another order, or of another run")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: drop(directory, 0), "the deltas of batches 1 to [0-9]+ are missing"),
        (lambda directory: drop(directory, 1), "does not go on from .* Records are missing, or of another run"),
        (swap, "was 0.*log when it was written"),
        (repeat_a_record, "records are missing, or not in their order"),
        (leave_a_record_out, "records are missing, or not in their order"),
        (turn_two_records_round, "records are missing, or not in their order"),
        (cut_a_file_in_the_middle, "does not go on from"),
        (take_a_file_of_another_run, "deltas"),
        (take_all_files_of_another_run, "has deltas of another run"),
        (rename, "was 0.*log when it was written"),
    ],
)
def test_what_does_not_belong_together_is_refused(damage: Callable[[Path], None], message: str, log: Path) -> None:
    damage(log)
    check_refused(log, message)


# Settings.


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for kwargs, message in [
        ({"delta_every": 0}, "delta_every is 0, it must be at least 1 batch"),
        ({"state_every": 4}, "state_every is 4, delta_every is None: it must be a multiple"),
        ({"delta_every": 3, "state_every": 4}, "state_every is 4, delta_every is 3"),
    ]:
        with pytest.raises(ConfigError, match=message):
            CheckpointManager(tmp_path, **kwargs)  # type: ignore[arg-type]
    ours = Trainer.scratchpipe(SETTING)
    with pytest.raises(ConfigError, match="has no delta_every"):
        CheckpointManager(tmp_path).trained(1, ours.model)
    manager = CheckpointManager(tmp_path, delta_every=1)
    manager.trained(1, ours.model, ours.optimizer)
    with pytest.raises(ConfigError, match="extra: cannot be saved as plain data"):
        manager.trained(2, ours.model, ours.optimizer, extra=lambda: None)


def test_deltas_of_a_run_that_went_further_are_not_lost(tmp_path: Path) -> None:
    """A job that goes on from an older step, or begins anew, in a directory that has more."""
    run(CheckpointManager(tmp_path, delta_every=3), Trainer.scratchpipe(SETTING), 20)
    for step in (None, 1, 10):
        ours, manager = Trainer.scratchpipe(SETTING), CheckpointManager(tmp_path, delta_every=3)
        if step is not None:
            assert manager.load(ours.model, ours.optimizer, step).step == step  # type: ignore[union-attr]
        with pytest.raises(CheckpointSaveError, match="there is step 19 already, of a run that went as far or further"):
            manager.trained((step or 0) + 1, ours.model, ours.optimizer)
    assert loaded(tmp_path)[0] == 19


@pytest.mark.parametrize("first_of_next", [1, 7])
def test_a_job_that_ended_before_its_first_checkpoint_does_not_stand_in_the_way(
    first_of_next: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its deltas lead on from nothing that is there."""
    ours, manager = Trainer.scratchpipe(SETTING), CheckpointManager(tmp_path, delta_every=3)
    run(manager, ours, 13)
    manager.path(1).rename(tmp_path / ".step_000000000001.unfinished")
    again, manager = Trainer.scratchpipe(SETTING), CheckpointManager(tmp_path, delta_every=3)
    assert manager.load(again.model, again.optimizer) is None
    drain(again.pipeline(), make_batches(SETTING)[: first_of_next - 1])
    run(manager, again, 20, first_of_next - 1)
    assert "deltas up to batch 13 go on from a checkpoint that is not there" in caplog.text
    (aside,) = tmp_path.glob("deltas_without_checkpoint_*")
    assert len(list(aside.iterdir())) > 0
    assert manager.steps() == [first_of_next]
    step, other = loaded(tmp_path)
    assert step == 19
    assert_same_bits(trained(SETTING, 19), other)


def test_what_older_checkpoints_need_is_kept_and_no_more(tmp_path: Path) -> None:
    ours, manager = Trainer.scratchpipe(SETTING), CheckpointManager(tmp_path, keep_last=2, delta_every=3)

    def save(step: int) -> None:
        if step % 10 == 0:
            manager.async_save(step, ours.model, ours.optimizer, extra={"step": step}).result()

    run(manager, ours, 44, after=save)
    assert manager.steps() == [30, 40]
    first = min(SegmentReader(path).scan().schema.since for path in segments(tmp_path))  # type: ignore[union-attr]
    assert 20 < first <= 30
    for step in (30, 33, 43):  # of the checkpoint, beside it, and the last
        assert loaded(tmp_path, step=step)[0] == step
        assert_same_bits(trained(SETTING, step), loaded(tmp_path, step=step)[1])
    # A checkpoint that is damaged or gone leaves the one before it, whose deltas lead as far.
    shutil.rmtree(manager.path(40))
    step, other = loaded(tmp_path)
    assert step == 43
    assert_same_bits(trained(SETTING, 43), other)


def test_loading_in_one_pass_names_damage_too(log: Path) -> None:
    other = Trainer.scratchpipe(replace(SETTING, seed=5))
    assert CheckpointManager(log).load(other.model, other.optimizer).step == 31  # type: ignore[union-attr]
    assert_same_bits(trained(SETTING, 31), other)
    record = places(full_segments(log)[0])
    metadata = SafeReader(log / "step_000000000001").read_metadata()
    (first, *_) = (place for index, place in metadata.storage_data.items() if index.fqn.endswith("t0.weight"))
    file = log / "step_000000000001" / first.relative_path
    for path, at in [
        (full_segments(log)[0], record["values"][50]),
        (full_segments(log)[0], record["ids"][3]),
        (file, first.offset + first.length // 2),
    ]:
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CheckpointMismatchError, match=path.name):
            CheckpointManager(log).load(other.model, other.optimizer)
        path.write_bytes(content)
        assert_refuses_half_loaded(other, make_batches(SETTING)[:4])
        # What is refused for another reason leaves it as it is; what is whole makes it usable again.
        with pytest.raises(CheckpointMismatchError, match="does not exist"):
            CheckpointManager(log).load(other.model, other.optimizer, step=2)
        assert_refuses_half_loaded(other, make_batches(SETTING)[:4])
        CheckpointManager(log).load(other.model, other.optimizer, step=1)
        assert_same_bits(trained(SETTING, 1), other)
    CheckpointManager(log).load(other.model, other.optimizer)
    assert_same_bits(trained(SETTING, 31), other)


def test_batches_in_flight_do_not_train_on_tables_that_were_loaded_in_part(log: Path) -> None:
    """Their rows were fetched before; and later loads let them train."""
    path = full_segments(log)[-1]
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[places(path)["values"][50]] ^= 4
    ours, twin = trained(SETTING, 5), trained(SETTING, 5)
    batches = make_batches(SETTING)
    pipeline, iterator = ours.pipeline(lookahead=3), iter(batches)
    pipeline.progress(iterator)
    weight = local_tensors(ours.model.state_dict()["ebc.embedding_bags.t0.weight"])[0]
    path.write_bytes(damaged)
    with pytest.raises(CheckpointMismatchError, match=path.name):
        CheckpointManager(log).load(ours.model, ours.optimizer)
    with pytest.raises(StageFailedError, match="a load failed half-way"):
        weight.sum()
    with pytest.raises(StageFailedError, match="a load failed half-way"):
        pipeline.progress(iterator)
    pipeline.reset()
    path.write_bytes(content)
    for trainer in (ours, twin):
        CheckpointManager(log).load(trainer.model, trainer.optimizer)
        drain(trainer.pipeline(), batches[31:40])
    assert_same_bits(twin, ours)


def test_a_model_without_tables_on_a_rank_or_without_scratchpads_is_loaded(log: Path) -> None:
    """Stock's kernels take the same deltas."""
    stock = Trainer(replace(SETTING, seed=5))
    assert CheckpointManager(log).load(stock.model, stock.optimizer).step == 31  # type: ignore[union-attr]
    assert_same_bits(trained(SETTING, 31), stock)


def test_tables_can_be_loaded_while_a_checkpoint_waits_for_a_delta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who loads has to wait for the checkpoint's rows, and keeps deltas from being read meanwhile."""
    ours, other = Trainer.scratchpipe(BUSY), Trainer.scratchpipe(replace(BUSY, seed=9))
    state = other.model.state_dict()
    manager = CheckpointManager(tmp_path, delta_every=1)
    is_loading, may_end, may_read = threading.Event(), threading.Event(), threading.Event()
    wait, write, read = HostTable.wait_for_snapshots, files.ChecksummedWriter.write_data, changes.Changes.read

    def wait_for_snapshots(self: HostTable) -> None:
        is_loading.set()
        wait(self)

    def write_data(self: Any, *args: Any) -> Any:
        assert may_end.wait(60)
        return write(self, *args)

    def read_later(self: changes.Changes, between_batches: Any) -> Iterator[changes.ChangedRows]:
        assert may_read.wait(60)
        return read(self, between_batches)

    monkeypatch.setattr(HostTable, "wait_for_snapshots", wait_for_snapshots)
    monkeypatch.setattr(files.ChecksummedWriter, "write_data", write_data)
    monkeypatch.setattr(changes.Changes, "read", read_later)
    pipeline, batches = ours.pipeline(), iter(make_batches(BUSY))
    for step in (1, 2):
        pipeline.progress(batches)
        manager.trained(step, ours.model, ours.optimizer, extra={"step": step})
    loading = threading.Thread(target=ours.model.load_state_dict, args=(state,), daemon=True)
    loading.start()
    assert is_loading.wait(60)
    may_end.set()
    may_read.set()
    loading.join(30)
    assert not loading.is_alive(), "they wait for each other"
    manager.wait()
    assert manager.steps() == [1]
    assert loaded(tmp_path, BUSY)[0] == 2


@pytest.mark.parametrize("write", [overwrite, write_in_numpy, load_other])
def test_tables_that_are_overwritten_right_before_a_delta_are_in_it(
    write: Callable[[Trainer], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the delta before, which is still being read, has them as they were."""
    ours, twin = Trainer.scratchpipe(BUSY), Trainer.scratchpipe(BUSY)
    manager = CheckpointManager(tmp_path, delta_every=2)
    gate = hold_reading(monkeypatch)
    pipeline, batches = ours.pipeline(), iter(make_batches(BUSY))
    for step in range(1, 12):
        pipeline.progress(batches)
        if step == 11:
            write(ours)
        if step % 2 and step > 1:
            gate.let_go()
        manager.trained(step, ours.model, ours.optimizer, extra={"step": step})
    gate.let_go()
    manager.wait()
    assert_same_bits(trained(BUSY, 9), loaded(tmp_path, BUSY, 9)[1])
    drain(twin.pipeline(), make_batches(BUSY)[:11])
    write(twin)
    step, other = loaded(tmp_path, BUSY)
    assert step == 11
    assert_same_bits(twin, other)


@pytest.mark.parametrize("write", [overwrite, load_other])
@pytest.mark.parametrize("num_read", [0, 2])
def test_tables_that_are_overwritten_while_a_delta_is_read_are_kept_first(
    num_read: int, write: Callable[[Trainer], None]
) -> None:
    """All rows of the delta that nobody has read, and that no batch is about to train."""
    ours = Trainer.scratchpipe(SETTING)
    (collection,) = scratchpad_collections(ours.model)
    collection.watch_changes()
    drain(ours.pipeline(), make_batches(SETTING)[:20])
    (pool,) = collection.pools
    assert pool.changes is not None
    collection.cut_changes()
    all_rows = torch.arange(pool.host_table.num_rows)
    before = pool.read_some(all_rows)
    reading = pool.changes.read(collection.between_batches)
    own = (changes.ChangedRows(some.rows, [value.clone() for value in some.values]) for some in reading)
    found = list(itertools.islice(own, num_read))
    write(ours)
    found += own
    rows = torch.cat([some.rows for some in found])
    assert rows.numel() > 100
    assert rows.unique().numel() == rows.numel()
    for part, expected in enumerate(before):
        assert torch.equal(expected[rows], torch.cat([some.values[part] for some in found]))
    assert not torch.equal(before[0][rows], pool.read_some(all_rows)[0][rows])


@pytest.mark.parametrize("delta_every", [1, 3])
def test_of_batches_that_trained_returned_for_no_more_are_lost_than_one_interval(
    delta_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what a process that is killed leaves, when no delta is complete before somebody waits for it."""
    append_rows, take, wait = (
        getattr(delta_log.DeltaLog, name) for name in ("_append_rows", "take", "wait_until_written")
    )
    is_awaited = threading.Event()

    def take_anew(*args: Any) -> Any:
        is_awaited.clear()
        return take(*args)

    def wait_aloud(log: delta_log.DeltaLog) -> None:
        is_awaited.set()
        wait(log)

    def append_late(log: delta_log.DeltaLog) -> None:
        append_rows(log)
        is_awaited.wait(1)

    monkeypatch.setattr(delta_log.DeltaLog, "take", take_anew)
    monkeypatch.setattr(delta_log.DeltaLog, "wait_until_written", wait_aloud)
    monkeypatch.setattr(delta_log.DeltaLog, "_append_rows", append_late)
    ours, manager = Trainer.scratchpipe(SETTING), CheckpointManager(tmp_path, delta_every=delta_every)
    pipeline, batches = ours.pipeline(), iter(make_batches(SETTING))
    lost = []
    for step in range(1, 24):
        pipeline.progress(batches)
        manager.trained(step, ours.model, ours.optimizer)
        chain = Chain.read(tmp_path)
        lost.append(step - max((one.step for one in chain.sets), default=1))
        chain.close()
    is_awaited.set()
    manager.wait()
    assert max(lost) == delta_every


def full_disk(self: Any, data: bytes) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("num_before", [0, 2])
def test_a_first_checkpoint_that_fails_is_saved_by_a_later_batch(
    num_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a directory that is empty, or has an older checkpoint."""
    ours, manager = Trainer.scratchpipe(SETTING), CheckpointManager(tmp_path, delta_every=3)
    pipeline, batches = ours.pipeline(), iter(make_batches(SETTING))
    for _ in range(num_before):
        pipeline.progress(batches)
    if num_before:
        manager.save(num_before, ours.model, ours.optimizer, extra={"step": num_before})
    with monkeypatch.context() as patch:
        patch.setattr(files._ChecksummedFile, "write", full_disk)
        for step in range(num_before + 1, 10):
            pipeline.progress(batches)
            manager.trained(step, ours.model, ours.optimizer, extra={"step": step})
            manager.wait()
            if step == 8:
                patch.setattr(SegmentWriter, "__init__", lambda *_: full_disk(None, b""))
    assert caplog.text.count("checkpoint of step") == 8 - num_before
    assert "a delta log cannot begin in" in caplog.text
    assert "The next batch is tried" in caplog.text
    assert manager.steps() == ([num_before] if num_before else [])
    for step in range(10, 24):
        pipeline.progress(batches)
        manager.trained(step, ours.model, ours.optimizer, extra={"step": step})
    manager.wait()
    assert manager.steps() == [*([num_before] if num_before else []), 10]
    step, other = loaded(tmp_path)
    assert step == 22
    assert_same_bits(trained(SETTING, 22), other)


def _begin_anew(rank: int, directory: str) -> None:
    _make_pieces_small()
    ours = Trainer.scratchpipe(ROWS)
    manager = CheckpointManager(directory, delta_every=3)
    pipeline, batches = ours.pipeline(), iter(make_batches(ROWS, rank=rank))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(files._ChecksummedFile, "write", full_disk)
        for step in range(1, 5):
            pipeline.progress(batches)
            manager.trained(step, ours.model, ours.optimizer)
        manager.wait()
    for step in range(5, 15):
        pipeline.progress(batches)
        manager.trained(step, ours.model, ours.optimizer)
    manager.wait()
    assert manager.steps() == [5]
    other, twin = Trainer.scratchpipe(replace(ROWS, seed=5)), Trainer.scratchpipe(ROWS)
    found = CheckpointManager(directory).load(other.model, other.optimizer)
    assert found is not None
    assert found.step == 14
    drain(twin.pipeline(), make_batches(ROWS, rank=rank)[:14])
    assert_same_bits(twin, other)


@pytest.mark.dist
def test_a_first_checkpoint_that_fails_on_one_rank_is_saved_by_a_later_batch(tmp_path: Path) -> None:
    run_ranks(2, _begin_anew, str(tmp_path))


@pytest.mark.parametrize("name", ["add_rows", "add_state", "end"])
def test_what_a_failed_delta_was_to_have_is_in_the_next(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, num_calls = getattr(SegmentWriter, name), itertools.count()
    fails_at = {"add_rows": 7, "add_state": 3, "end": 3}[name]

    def fail_once(self: SegmentWriter, *args: Any, **kwargs: Any) -> None:
        if name != "end":
            original(self, *args)
        if next(num_calls) == fails_at:
            raise OSError(28, "No space left on device")
        if name == "end":
            original(self, *args, **kwargs)

    monkeypatch.setattr(SegmentWriter, name, fail_once)
    ours, manager = Trainer.scratchpipe(SETTING), CheckpointManager(tmp_path, delta_every=3)
    futures = []
    pipeline, batches = ours.pipeline(), iter(make_batches(SETTING))
    for step in range(1, 26):
        pipeline.progress(batches)
        futures.append(manager.trained(step, ours.model, ours.optimizer, extra={"step": step}))
    manager.wait()
    failed = [str(future.exception()) for future in futures if future is not None and future.exception() is not None]
    assert len(failed) == 1
    assert "No space left on device. Free space. What it was to save goes into the next one" in failed[0]
    assert len(Chain.read(tmp_path).sets) == 7
    step, other = loaded(tmp_path)
    assert step == 25
    assert_same_bits(trained(SETTING, 25), other)
