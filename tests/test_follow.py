# SPDX-License-Identifier: BSD-3-Clause
"""A follower shows the bits of the run at each delta, whole sets only; an exported delta has the rows that changed."""

import json
import multiprocessing
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from collisions import CollisionModel, CollisionSetting, make_collision_batches
from helpers import Setting, TinyModel, Trainer, full_state, make_batches, run_ranks, with_optimizer
from safetensors.torch import load_file
from test_checkpoint import WithExtraState
from test_delta_log import SETTING, run, trained
from torch import Tensor, nn
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_scratchpipe import (
    CheckpointManager,
    CheckpointMismatchError,
    CheckpointSaveError,
    ConfigError,
    Follower,
    follow,
    to_stock,
)
from torchrec_scratchpipe.checkpoint import delta_log
from torchrec_scratchpipe.checkpoint import follow as follow_module
from torchrec_scratchpipe.checkpoint.delta_chain import Chain, DeltaSet
from torchrec_scratchpipe.checkpoint.delta_files import Kind, SegmentReader
from torchrec_scratchpipe.checkpoint.delta_load import RowWriter
from torchrec_scratchpipe.core import changes

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that deltas of these tests are read in several pieces, and fill several files."""
    monkeypatch.setattr(changes, "ROWS_READ_TOGETHER", 16)
    monkeypatch.setattr(delta_log, "SEGMENT_BYTES", 40_000)


def server(setting: Setting = SETTING) -> TinyModel:
    """A plain model, with nothing in it that could be right by chance."""
    model = TinyModel(setting).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def copy_of(module: nn.Module) -> State:
    return {name: value.clone() for name, value in module.state_dict().items()}


def state_of(trainer: Trainer) -> State:
    return copy_of(to_stock(trainer.model))


def assert_shows(expected: State, actual: nn.Module | State, only: str = "") -> None:
    found = actual.state_dict() if isinstance(actual, nn.Module) else actual
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if only in name:
            assert torch.equal(value, found[name]), name


def is_table(name: str) -> bool:
    return "embedding" in name


def recorded(directory: Path, last: int, setting: Setting = SETTING, **kwargs: Any) -> dict[int, State]:
    """Train and log, and say what the model was after each batch."""
    states: dict[int, State] = {}
    ours = Trainer.scratchpipe(setting)
    manager = CheckpointManager(directory, **({"delta_every": 1} | kwargs))
    run(manager, ours, last, after=lambda step: states.update({step: state_of(ours)}), setting=setting)
    return states


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, RowWiseAdagrad])
def test_a_module_shows_the_bits_of_every_batch(optimizer: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    setting = with_optimizer(SETTING, optimizer)
    ours, model = Trainer.scratchpipe(setting), server(setting)
    manager = CheckpointManager(tmp_path, delta_every=1)
    followers: list[Follower] = []

    def after(step: int) -> None:
        manager.wait()
        if not followers:
            followers.append(follow(tmp_path, model))
        assert followers[0].update()[:2] == (step, 0)
        assert_shows(state_of(ours), model)
        # What was found bit by bit is what is found at once.
        assert [one.position for one in followers[0]._chain.sets] == [one.position for one in sets_of(tmp_path)]

    run(manager, ours, 40, after=after, setting=setting)
    assert followers[0].num_reloads == 0
    assert ours.num_victims > 0
    assert len(list((tmp_path / "deltas").iterdir())) > 2
    followers[0].close()
    with pytest.raises(ConfigError, match="this follower is closed"):
        followers[0].update()


def test_what_is_in_no_scratchpad_is_as_of_the_latest_set_that_has_it(tmp_path: Path) -> None:
    setting = replace(SETTING, fused_tables=("t2",))
    ours, model = Trainer.scratchpipe(setting), server(setting)
    manager = CheckpointManager(tmp_path, delta_every=1, state_every=4)
    followers: list[Follower] = []
    states: dict[int, State] = {}

    def after(step: int) -> None:
        manager.wait()
        states[step] = state_of(ours)
        if not followers:
            followers.append(follow(tmp_path, model))
        assert followers[0].update().step == step
        with_state = 1 + (step - 1) // 4 * 4
        for name, value in model.state_dict().items():
            is_logged_by_row = is_table(name) and "t2" not in name
            assert torch.equal(value, states[step if is_logged_by_row else with_state][name]), (step, name)
        changed = [name for name, value in states[step].items() if not torch.equal(value, states[with_state][name])]
        assert step == with_state or any("over" in name for name in changed)

    run(manager, ours, 14, after=after, setting=setting)


def test_what_is_no_tensor_is_followed(tmp_path: Path) -> None:
    ours, model = Trainer.scratchpipe(SETTING), server()
    ours.model.module.over, model.over = WithExtraState(27, 1), WithExtraState(27, 1)
    model.over.extra = {"step": 0}
    manager = CheckpointManager(tmp_path, delta_every=1)
    pipeline, batches = ours.pipeline(), iter(make_batches(SETTING))
    for step in range(1, 5):
        pipeline.progress(batches)
        ours.model.module.over.extra = {"step": step}
        manager.trained(step, ours.model, ours.optimizer)
        manager.wait()
        if step == 1:
            follower = follow(tmp_path, model)
            assert model.over.extra == {"step": 1}
    assert follower.update().step == 4
    assert model.over.extra == {"step": 4}


def test_tables_in_files_arrays_and_tensors(tmp_path: Path) -> None:
    states = recorded(tmp_path / "c", 20)
    array, tensor = np.full((150, 8), np.nan, np.float32), torch.full((3, 8), float("nan"))
    target = {"t0": tmp_path / "t0.npy", "a.name.of.t1.weight": array, "t2.weight": tensor}
    with follow(tmp_path / "c", target) as follower:
        assert np.array_equal(np.load(tmp_path / "t0.npy"), states[1]["ebc.embedding_bags.t0.weight"].numpy())
        assert follower.update().step == 20
    shown = {"t0": torch.from_numpy(np.load(tmp_path / "t0.npy")), "t1": torch.from_numpy(array), "t2": tensor}
    for table, value in shown.items():
        assert torch.equal(states[20][f"ebc.embedding_bags.{table}.weight"], value)
    # A file that is there is written in place, and so is seen by whoever has it mapped.
    reader = np.load(tmp_path / "t0.npy", mmap_mode="r")
    np.load(tmp_path / "t0.npy", mmap_mode="r+")[:] = np.nan
    with follow(tmp_path / "c", {"t0": tmp_path / "t0.npy"}) as follower:
        follower.update()
    assert np.array_equal(reader, states[20]["ebc.embedding_bags.t0.weight"].numpy())


def test_targets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    recorded(tmp_path / "c", 3)
    frozen = np.zeros((150, 8), np.float32)
    frozen.flags.writeable = False
    (tmp_path / "text.npy").write_text("no array")
    missing = tmp_path / "missing.npy"
    for value, reason in [
        ({"t9": missing}, r"t9 of the target is no table. Tables of the run: t0, t1, t2"),
        ({"t1": torch.zeros(150, 4)}, r"table t1 is \(150, 8\) torch.float32, the target is \(150, 4\)"),
        ({"t1": torch.zeros(150, 8).half()}, r"the target is \(150, 8\) torch.float16"),
        ({"t1": np.zeros((150, 8))}, r"the target is \(150, 8\) float64"),
        ({"t1": frozen}, r"the array for table t1 is read-only"),
        ({"t1": tmp_path / "text.npy"}, r"cannot be read as .npy"),
        ({"t1": 5}, r"int for table t1"),
        ({"t1": torch.zeros(150, 8, device="meta")}, r"on meta"),
        ({"a.t1.weight": frozen, "b.t1.weight": frozen}, r"a.t1.weight, b.t1.weight are all called like table t1"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            follow(tmp_path / "c", {"t0": missing, **value})
        assert not missing.exists()
    with pytest.raises(ConfigError, match=r"is a ShardedTensor. Give a plain module"):
        follow(tmp_path / "c", Trainer.scratchpipe(SETTING).model)
    other = server(replace(SETTING, num_rows=(200, 151, 3)))
    before = copy_of(other)
    with pytest.raises(CheckpointMismatchError, match=r"t1.weight has shape \(150, 8\) there and \(151, 8\) here"):
        follow(tmp_path / "c", other)
    assert all(value.isnan().all() for value in before.values())
    assert all(value.isnan().all() for value in other.state_dict().values())


def test_a_directory_without_a_checkpoint(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "not there"):
        with pytest.raises(CheckpointMismatchError, match=r"has no complete checkpoint. Begin to train"):
            follow(directory, server())
        with pytest.raises(CheckpointMismatchError, match=r"or wait longer for it \(wait_s\)"):
            follow(directory, server(), wait_s=0.05)


ROWS = replace(SETTING, sharding_type="row_wise", num_rows=(200, 150, 90))
COLUMNS = replace(ROWS, sharding_type="column_wise", min_partition=4)
ON_RANKS = [ROWS, COLUMNS, with_optimizer(COLUMNS, RowWiseAdagrad)]


def _train_on_rank(rank: int, directory: str, setting: Setting, last: int) -> None:
    changes.ROWS_READ_TOGETHER = 16
    ours, batches = Trainer.scratchpipe(setting), iter(make_batches(setting, rank=rank))
    manager = CheckpointManager(Path(directory) / "c", delta_every=1)
    pipeline = ours.pipeline()
    for step in range(1, last + 1):
        pipeline.progress(batches)
        manager.trained(step, ours.model, ours.optimizer)
        model = to_stock(ours.model)
        if rank == 0:
            torch.save(copy_of(model), Path(directory) / f"{step}.pt")
    manager.wait()
    (exported,) = {manager.export_delta(4, Path(directory) / "exported")}
    assert (exported / "delta.json").exists()
    torch.save(states_by_row(ours), Path(directory) / f"states_{rank}.pt")


def states_by_row(trainer: Trainer) -> dict[str, list[tuple[tuple[int, ...], Tensor]]]:
    """Shards of optimizer states, and where each begins."""
    found: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
    for states in trainer.optimizer.state_dict()["state"].values():
        for name, value in states.items():
            if hasattr(value, "local_shards"):
                for shard in value.local_shards():
                    found.setdefault(name, []).append((tuple(shard.metadata.shard_offsets), shard.tensor.clone()))
    return found


@pytest.mark.dist
@pytest.mark.parametrize("setting", ON_RANKS, ids=["rows", "columns", "columns, row-wise Adagrad"])
def test_two_ranks_and_one_follower(setting: Setting, tmp_path: Path) -> None:
    run_ranks(2, _train_on_rank, str(tmp_path), setting, 12)
    states = {step: torch.load(tmp_path / f"{step}.pt") for step in range(1, 13)}
    # 1. What one rank has not recorded is not applied of the other either.
    (path,) = (tmp_path / "c" / "deltas").glob("*_00001.log")
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    model = server(setting)
    with follow(tmp_path / "c", model) as follower:
        assert_shows(states[1], model)
        assert follower.update()[:2] == (11, 0)
        assert_shows(states[11], model)
        with path.open("ab") as file:
            file.write(whole[-8:])
        assert follower.update()[:2] == (12, 0)
        assert_shows(states[12], model)
        assert follower.num_reloads == 0
    # 2. When the other rank has not begun, there is nothing wrong.
    shutil.copytree(tmp_path / "c", tmp_path / "begun")
    (first,) = (tmp_path / "begun" / "deltas").glob("*_00000.log")
    (tmp_path / "begun" / "deltas" / path.name).unlink()
    segment = SegmentReader(first).scan()
    assert segment is not None
    first.write_bytes(first.read_bytes()[: segment.begin])
    with follow(tmp_path / "begun", model) as follower:
        assert follower.update()[:2] == (1, 0)
    # 3. An export has whole rows, whatever shards there were.
    check_export_of_ranks(tmp_path, setting, states[12])


def check_export_of_ranks(directory: Path, setting: Setting, state: State) -> None:
    by_rank = [torch.load(directory / f"states_{rank}.pt") for rank in range(2)]
    for index, table in enumerate(setting.table_names):
        tensors = load_file(directory / "exported" / f"{table}.safetensors")
        ids = {
            row
            for rank in range(2)
            for batch in make_batches(setting, rank=rank)[4:12]
            for row in batch.sparse_features[f"f{index}"].values().tolist()
        }
        assert sorted(ids) == tensors["rows"].tolist()
        assert torch.equal(state[f"ebc.embedding_bags.{table}.weight"][tensors["rows"]], tensors["weight"])
        (name,) = tensors.keys() - {"rows", "weight"}
        shards = sorted(
            (shard for states in by_rank for shard in states[f"{table}.{name}"]), key=lambda shard: shard[0]
        )
        if setting.sharding_type == "row_wise":
            expected = torch.cat([tensor for _, tensor in shards])
        elif shards[0][1].dim() == 2:
            expected = torch.cat([tensor for _, tensor in shards], dim=1)
        else:  # row-wise states of column shards lie one behind the other
            expected = torch.stack([tensor for _, tensor in shards], dim=1)
            assert not torch.equal(expected[:, 0], expected[:, 1])
        assert torch.equal(expected[tensors["rows"]], tensors[name])


def sets_of(directory: Path) -> list[DeltaSet]:
    return Chain.read(directory).sets


@pytest.mark.parametrize("kind", [Kind.ROWS, Kind.STATE])
@pytest.mark.fault("a bit-flipped file of a delta log, seen by a follower")
def test_of_a_damaged_set_nothing_is_applied(kind: int, tmp_path: Path) -> None:
    states = recorded(tmp_path, 12)
    (damaged,) = (one for one in sets_of(tmp_path) if one.step == 7)
    ((reader, record),) = damaged.records
    block = [block for block in record.blocks if block.kind == kind][-1]
    whole = reader.path.read_bytes()
    place = block.offset + block.num_bytes // 2
    reader.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    model = server()
    with follow(tmp_path, model) as follower:
        for _ in range(2):
            with pytest.raises(CheckpointMismatchError, match=rf"{reader.path.name}: is damaged between bytes"):
                follower.update()
            assert_shows(states[6], model)
        reader.path.write_bytes(whole)
        assert follower.update()[:2] == (12, 0)
        assert_shows(states[12], model)
        assert follower.num_reloads == 0


@pytest.mark.fault("a delta log whose records do not follow each other, seen by a follower")
def test_a_damaged_header_is_raised_and_what_came_before_stays(tmp_path: Path) -> None:
    states = recorded(tmp_path / "whole", 9)
    shutil.copytree(tmp_path / "whole", tmp_path / "c")
    last = sets_of(tmp_path / "whole")[-1]
    ((reader, record),) = last.records
    path = tmp_path / "c" / "deltas" / reader.path.name
    whole = path.read_bytes()
    begin = record.blocks[0].offset - 40
    path.write_bytes(whole[:begin])
    model = server()
    with follow(tmp_path / "c", model) as follower:
        assert follower.update().step == 8
        path.write_bytes(whole[:begin] + b"\1" + whole[begin + 1 :])
        with pytest.raises(CheckpointMismatchError, match="in the header of a block"):
            follower.update()
        assert_shows(states[8], model)
        path.write_bytes(whole)
        assert follower.update().step == 9
        assert_shows(states[9], model)


def test_a_follower_that_fell_behind_loads_the_newest_checkpoint(tmp_path: Path) -> None:
    ours = Trainer.scratchpipe(SETTING)
    manager = CheckpointManager(tmp_path, keep_last=1, delta_every=1)
    behind, beside = server(), server()
    followers: list[Follower] = []

    def after(step: int) -> None:
        manager.wait()
        if step == 1:
            followers.extend([follow(tmp_path, behind), follow(tmp_path, beside)])
        if step % 10 == 0:
            manager.save(step, ours.model, ours.optimizer, extra={"step": step})
        assert followers[1].update().step == step

    run(manager, ours, 43, after=after)
    assert manager.steps() == [40]
    assert sets_of(tmp_path)[0].step > 2, "no file was deleted"
    assert followers[0].update()[:2] == (43, 0)
    assert [one.num_reloads for one in followers] == [1, 0]
    assert_shows(state_of(ours), behind)
    assert_shows(state_of(ours), beside)
    assert followers[0].update().step == 43
    assert followers[0].num_reloads == 1


def test_files_of_the_applied_set_are_gone_and_the_log_leads_on(tmp_path: Path, monkeypatch: Any) -> None:
    """A follower that is up to date misses nothing when the trainer deletes what it has applied."""
    monkeypatch.setattr(delta_log, "SEGMENT_BYTES", 1)  # a file for each record
    ours, model = Trainer.scratchpipe(SETTING), server()
    manager = CheckpointManager(tmp_path, keep_last=1, delta_every=1)
    followers: list[Follower] = []

    def after(step: int) -> None:
        manager.wait()
        if step == 1:
            followers.append(follow(tmp_path, model))
        followers[0].update()
        if step == 10:
            manager.save(step, ours.model, ours.optimizer)
            assert sets_of(tmp_path) == []

    run(manager, ours, 12, after=after)
    assert followers[0].update().step == 12
    assert followers[0].num_reloads == 0
    assert_shows(state_of(ours), model)


def test_a_run_that_went_back_is_followed(tmp_path: Path) -> None:
    first = recorded(tmp_path, 10, state_every=6)
    models = [server(), server()]
    late, early = (follow(tmp_path, model) for model in models)
    assert late.update().step == 10
    early._chain.update()
    for delta_set in early._chain.sets[:6]:
        early._apply(delta_set)
    assert_shows(first[7], models[1])
    # Batches 8 to 10 cannot be resumed from, and are cut. Other ones are trained instead.
    resumed = Trainer.scratchpipe(replace(SETTING, seed=6))
    manager = CheckpointManager(tmp_path, delta_every=1, state_every=6)
    assert manager.load(resumed.model, resumed.optimizer).step == 7  # type: ignore[union-attr]
    second: dict[int, State] = {}
    run(manager, resumed, 9, 7, after=lambda step: second.update({step: state_of(resumed)}), lookahead=1)
    for follower in (late, early):
        assert follower.update()[:2] == (9, 0)
    other = Trainer.scratchpipe(replace(SETTING, seed=7))
    assert [late.num_reloads, early.num_reloads] == [1, 0]
    for model in models:
        assert_shows(second[9], model, only="embedding")
    # Again, with a file of the same name as one that was deleted.
    manager = CheckpointManager(tmp_path, delta_every=1)
    assert manager.load(other.model, other.optimizer).step == 7  # type: ignore[union-attr]
    pipeline, batches = other.pipeline(), iter(make_batches(SETTING)[30:])
    for step in range(8, 10):
        pipeline.progress(batches)
        manager.trained(step, other.model, other.optimizer)
    manager.wait()
    assert [late.update()[:2], early.update()[:2]] == [(9, 0)] * 2
    assert [late.num_reloads, early.num_reloads] == [2, 1]
    for model in models:
        assert_shows(state_of(other), model)
    with pytest.raises(AssertionError):
        assert_shows(second[9], models[0])


def test_figures_of_a_lag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Trainer.scratchpipe(SETTING)
    manager = CheckpointManager(tmp_path, delta_every=3)
    pipeline, batches = ours.pipeline(), iter(make_batches(SETTING))

    def train(first: int, last: int) -> None:
        for step in range(first, last + 1):
            pipeline.progress(batches)
            manager.trained(step, ours.model, ours.optimizer)
        manager.wait()

    train(1, 11)
    follower = follow(tmp_path, server())
    apply = Follower._apply
    coming = iter([lambda: train(12, 17)])
    monkeypatch.setattr(Follower, "_apply", lambda *args: (apply(*args), next(coming, lambda: None)()))
    before = time.time()
    lag = follower.update()
    after = time.time()
    assert lag[:2] == (10, 6)  # of batches 13 and 16, which came meanwhile
    taken = {one.step: one.time_s for one in sets_of(tmp_path)}
    assert before - taken[10] <= lag.seconds <= after - taken[10]
    assert follower.update()[:2] == (16, 0)


def test_nothing_is_read_while_no_file_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tmp_path, 5)
    follower = follow(tmp_path, server())
    assert follower.wait(60).step == 5
    calls: list[str] = []
    for kind in (SegmentReader, RowWriter, Chain):
        for name in ("scan", "rows", "check", "state", "write", "_sort", "after_set"):
            if hasattr(kind, name):
                monkeypatch.setattr(kind, name, lambda *_, name=name: calls.append(name))
    looks: list[bool] = []
    update = Chain.update
    monkeypatch.setattr(Chain, "update", lambda self: looks.append(True) or update(self))
    assert follower.wait(0.2)[:2] == (5, 0)
    assert calls == []
    assert len(looks) > 3


@pytest.mark.parametrize("is_caught_in_time", [True, False])
def test_files_that_do_not_go_together_are_looked_at_again(
    is_caught_in_time: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = recorded(tmp_path, 6)
    model = server()
    follower = follow(tmp_path, model)
    update, failures = Chain.update, iter(range(3 if is_caught_in_time else 10_000))
    monkeypatch.setattr(follow_module, "SETTLE_S", 0.3)

    def fail(self: Chain) -> bool:
        if next(failures, None) is not None:
            raise CheckpointMismatchError("rank 1's file is missing")
        return update(self)

    monkeypatch.setattr(Chain, "update", fail)
    if is_caught_in_time:
        assert follower.update().step == 6
        assert_shows(states[6], model)
    else:
        with pytest.raises(CheckpointMismatchError, match="rank 1's file is missing"):
            follower.update()
        assert_shows(states[1], model)


def checksum(weights: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(weights).tobytes())


def _serve(directory: str, last: int, shown: "multiprocessing.Queue[tuple[int, float, int]]") -> None:
    path = Path(directory) / "t0.npy"
    with follow(Path(directory) / "c", {"t0": path}, wait_s=60) as follower:
        weights = np.load(path, mmap_mode="r")
        while True:
            step = follower.wait(60).step
            now = time.time()
            shown.put((step, now, checksum(weights)))
            if step == last:
                return


def latencies(directory: Path, last: int, pause_s: float = 0.0) -> list[float]:
    """From the end of each batch until its rows can be read in another process, in seconds."""
    shown: Any = processes.SERVER.Queue()
    process = processes.start(_serve, str(directory), last, shown)
    ours = Trainer.scratchpipe(replace(SETTING, num_batches=last))
    pipeline, batches = ours.pipeline(), iter(make_batches(replace(SETTING, num_batches=last)))
    manager = CheckpointManager(directory / "c", delta_every=1)
    trained_s, checksums = {}, {}
    for step in range(1, last + 1):
        pipeline.progress(batches)
        trained_s[step] = time.time()
        manager.trained(step, ours.model, ours.optimizer)
        checksums[step] = checksum(to_stock(ours.model).state_dict()["ebc.embedding_bags.t0.weight"].numpy())
        if step == 1:
            manager.wait()
        time.sleep(pause_s)
    manager.wait()
    found = []
    while not found or found[-1][0] < last:
        found.append(shown.get(timeout=60))
    assert processes.end(process) == 0
    assert all(checksums[step] == of_rows for step, _, of_rows in found)
    return [
        next(now for step, now, _ in found if step >= of_step) - trained_s[of_step] for of_step in range(2, last + 1)
    ]


def test_a_trained_row_can_be_read_in_another_process_within_a_second(tmp_path: Path) -> None:
    times = latencies(tmp_path, 60)
    assert len(times) == 59
    assert max(times[5:]) < 1.0  # the other process may begin late


def exported(directory: Path) -> dict[str, State]:
    assert not list(directory.parent.glob(".*"))
    return {path.stem: load_file(path) for path in directory.glob("*.safetensors")}


def table_state(trainer: Trainer, table: str) -> Iterator[tuple[str, Tensor]]:
    for name, (tensor, *_) in full_state(trainer).items():
        if f".{table}.weight" in name:
            yield (name.split(f"{table}.")[-1] if "/" in name else "weight"), tensor


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad])
def test_an_exported_delta_has_the_rows_that_changed_and_their_states(
    optimizer: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    setting = with_optimizer(SETTING, optimizer)
    ours = Trainer.scratchpipe(setting)
    manager = CheckpointManager(tmp_path, delta_every=3)
    run(manager, ours, 30, setting=setting)
    twin = trained(setting, 28)
    path = manager.export_delta(19)
    assert path == tmp_path / "delta_000000000019_000000000028"
    assert manager.steps() == [1]
    tables = exported(path)
    counts = {}
    for index, table in enumerate(setting.table_names):
        ids = set()
        for batch in make_batches(setting)[19:28]:
            ids |= set(batch.sparse_features[f"f{index}"].values().tolist())
        tensors = tables[table]
        assert sorted(ids) == tensors["rows"].tolist()
        assert tensors["rows"].dtype == torch.int64
        expected = dict(table_state(twin, table))
        assert (tensors.keys() - {"rows", "weight"} != set()) == (optimizer is not torch.optim.SGD)
        assert expected.keys() == tensors.keys() - {"rows"}
        for name, tensor in expected.items():
            assert torch.equal(tensor[tensors["rows"]], tensors[name]), name
        counts[table] = {"rows": len(ids), "num_embeddings": setting.num_rows[index]}
    assert json.loads((path / "delta.json").read_text()) == {"since": 19, "step": 28, "tables": counts}
    with pytest.raises(CheckpointSaveError, match="is there already"):
        manager.export_delta(19)
    # Nothing has changed since the last; all has since the first.
    assert all(len(tensors["rows"]) == 0 for tensors in exported(manager.export_delta(28)).values())
    assert len(exported(manager.export_delta(1, tmp_path / "all"))["t0"]["rows"]) > counts["t0"]["rows"]


def test_an_exported_delta_has_rows_that_were_reset(tmp_path: Path) -> None:
    ours = Trainer.scratchpipe(SETTING)
    manager = CheckpointManager(tmp_path, delta_every=1)
    reset = [3, 190, 199]

    def after(step: int) -> None:
        if step == 9:
            weights = to_stock(ours.model).ebc.embedding_bags["t0"].weight
            with torch.no_grad():
                weights[torch.tensor(reset)] = 0

    run(manager, ours, 12, after=after)
    tensors = exported(manager.export_delta(9))["t0"]
    ids = {row for batch in make_batches(SETTING)[9:12] for row in batch.sparse_features["f0"].values().tolist()}
    assert not set(reset) <= ids
    assert sorted(ids | set(reset)) == tensors["rows"].tolist()
    weights = state_of(ours)["ebc.embedding_bags.t0.weight"]
    assert torch.equal(weights[tensors["rows"]], tensors["weight"])
    assert not weights[sorted(set(reset) - ids)].any()


def test_ids_that_take_the_rows_of_others(tmp_path: Path) -> None:
    """Managed collision resets rows while it trains; followers and exports have them."""
    setting = CollisionSetting(policy="lru")
    ours = Trainer.scratchpipe(setting, make_model=CollisionModel)
    manager = CheckpointManager(tmp_path, delta_every=1)
    pipeline, batches = ours.pipeline(), iter(make_collision_batches(setting))
    follower, at_20, weights = None, torch.empty(0), torch.zeros(64, 8)
    for step in range(1, 31):
        pipeline.progress(batches)
        manager.trained(step, ours.model, ours.optimizer)
        manager.wait()
        now = {name: value for name, value in state_of(ours).items() if name.endswith("t0.weight")}
        (of_trainer,) = now.values()
        follower = follower or follow(tmp_path, {"t0": weights})
        assert follower.update().step == step
        assert torch.equal(of_trainer, weights)
        at_20 = of_trainer if step == 20 else at_20
    tensors = exported(manager.export_delta(20))["t0"]
    changed = (of_trainer != at_20).any(1).nonzero().view(-1)
    assert set(changed.tolist()) <= set(tensors["rows"].tolist())
    assert torch.equal(of_trainer[tensors["rows"]], tensors["weight"])


def test_steps_that_the_log_does_not_cover_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Trainer.scratchpipe(SETTING)
    manager = CheckpointManager(tmp_path, delta_every=3)
    run(manager, ours, 14)
    for since in (0, 5, 14, 16):
        with pytest.raises(
            CheckpointMismatchError, match=rf"from step {since}. Steps that it leads on from: 1, 4, 7, 10, 13. Give"
        ):
            manager.export_delta(since)
    (damaged,) = (one for one in sets_of(tmp_path) if one.step == 7)
    ((reader, record),) = damaged.records
    whole = bytearray(reader.path.read_bytes())
    whole[record.row_blocks[0].offset] ^= 1
    reader.path.write_bytes(whole)
    with pytest.raises(CheckpointMismatchError, match="is damaged between bytes"):
        manager.export_delta(4)
    manager.export_delta(7)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match="needs safetensors"):
        manager.export_delta(10)
    monkeypatch.undo()
    empty = CheckpointManager(tmp_path / "empty")
    with pytest.raises(CheckpointMismatchError, match="leads on from: none"):
        empty.export_delta(0)
    assert not list(tmp_path.glob(".*"))
