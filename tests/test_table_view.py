# SPDX-License-Identifier: BSD-3-Clause
"""Whoever reads or writes a table from outside gets stock's answer, whenever, and by whatever road it was obtained."""

import copy
import io
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from device_path import LOCKED, device_path
from helpers import (
    Setting,
    Trainer,
    assert_same_bits,
    assert_same_outputs,
    drain,
    is_embedding,
    local_tensors,
    make_batches,
    run_ranks,
    with_optimizer,
)
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_tracker.types import DeltaTrackerConfig, TrackingMode
from torchrec.optim import RowWiseAdagrad

from torchrec_scratchpipe import CheckpointManager, ConfigError, TableOverwrittenError, to_stock
from torchrec_scratchpipe.sharding import table_view
from torchrec_scratchpipe.sharding.table_view import TableView, shown

SETTING = Setting(num_rows=(200, 150, 90), dims=(8, 16, 8), num_batches=20)


def collection(trainer: Trainer) -> Any:
    return trainer.model.module.ebc


def kernels(trainer: Trainer) -> list[Any]:
    return [kernel for lookup in collection(trainer)._lookups for kernel in lookup._emb_modules]


def lookups(trainer: Trainer) -> list[Any]:
    return list(collection(trainer)._lookups)


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [tensor for value in values for tensor in local_tensors(value)]


def tables_of(named: Any) -> list[torch.Tensor]:
    return tensors_of(value for name, value in named if is_embedding(name))


def states_of(by_parameter: Any) -> list[torch.Tensor]:
    return tensors_of(value for states in by_parameter.values() for value in states.values())


# Every road by which TorchRec, FBGEMM or torch hand out a table's weights or its optimizer states.
ROADS: dict[str, Callable[[Trainer], list[torch.Tensor]]] = {
    "model.state_dict": lambda t: tables_of(t.model.state_dict().items()),
    "collection.state_dict": lambda t: tensors_of(collection(t).state_dict().values()),
    "embedding_bags.state_dict": lambda t: tensors_of(collection(t).embedding_bags.state_dict().values()),
    "one table's state_dict": lambda t: tensors_of(collection(t).embedding_bags["t1"].state_dict().values()),
    "one table's weight": lambda t: [collection(t).embedding_bags["t1"].weight],
    "model.named_parameters": lambda t: tables_of(t.model.named_parameters()),
    "module.named_parameters": lambda t: tables_of(t.model.module.named_parameters()),
    "parameters": lambda t: list(collection(t).parameters()),
    "embedding_bags.parameters": lambda t: list(collection(t).embedding_bags.parameters()),
    "lookup.state_dict": lambda t: tensors_of(value for lookup in lookups(t) for value in lookup.state_dict().values()),
    "lookup.named_parameters": lambda t: [value for lookup in lookups(t) for _, value in lookup.named_parameters()],
    "lookup.by_table": lambda t: [value for lookup in lookups(t) for _, value in lookup.named_parameters_by_table()],
    "kernel.split_embedding_weights": lambda t: [w for kernel in kernels(t) for w in kernel.split_embedding_weights()],
    "kernel.named_split": lambda t: [w for kernel in kernels(t) for _, w in kernel.named_split_embedding_weights()],
    "tbe.split_embedding_weights": lambda t: [
        weights
        for module in t.model.modules()
        if hasattr(module, "split_embedding_weights")
        for weights in module.split_embedding_weights()
    ],
    "emb_module.split_embedding_weights": lambda t: [
        weights for kernel in kernels(t) for weights in kernel.emb_module.split_embedding_weights()
    ],
    "fused_optimizer.params": lambda t: tensors_of(t.model.fused_optimizer.params.values()),
    "fused_optimizer.param_groups": lambda t: tensors_of(
        value for group in t.model.fused_optimizer.param_groups for value in group["params"]
    ),
    "fused_optimizer.state": lambda t: states_of(t.model.fused_optimizer.state),
    "fused_optimizer.state_dict": lambda t: states_of(t.model.fused_optimizer.state_dict()["state"]),
    "optimizer.state": lambda t: states_of(t.optimizer.state),
    "optimizer.state_dict": lambda t: states_of(t.optimizer.state_dict()["state"]),
    "parameter's own optimizer": lambda t: [
        tensor
        for name, parameter in t.model.named_parameters()
        if is_embedding(name)
        for optimizer in parameter._in_backward_optimizers
        for tensor in states_of(optimizer.state)
    ],
    "emb_module.split_optimizer_states": lambda t: [
        state for kernel in kernels(t) for states in kernel.emb_module.split_optimizer_states() for state in states
    ],
    "emb_module.get_optimizer_state": lambda t: [
        state
        for kernel in kernels(t)
        for states in kernel.emb_module.get_optimizer_state()
        for state in states.values()
        if state.numel() > 1  # not the iteration counter
    ],
}


def from_dlpack(tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_dlpack(tensor.detach())


def by_storage(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.detach().untyped_storage()
    return torch.tensor([], dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def reduced(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor.data.mul_(0.5))


# Ways to write 0.25 everywhere, or to change every value otherwise.
WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "fill_": lambda t: t.fill_(0.25),
    "data.copy_": lambda t: t.data.copy_(torch.full_like(t, 0.25)),
    "data.clamp_": lambda t: t.data.clamp_(-0.01, 0.01),
    "data of a part": lambda t: t.data[1:].mul_(0.5),
    "[...] =": lambda t: t.__setitem__(slice(2, 30), 0.25),
    "lerp_": lambda t: t.lerp_(torch.zeros_like(t), 0.5),
    "out=": lambda t: torch.mul(t.detach(), 0.5, out=t.detach()),
    "foreach": lambda t: torch._foreach_mul_([t], 0.5),
    "init": lambda t: torch.nn.init.constant_(t, 0.25),
    "vector_to_parameters": lambda t: torch.nn.utils.vector_to_parameters(torch.full((t.numel(),), 0.25), [t]),
    "numpy": lambda t: t.detach().numpy().__imul__(0.5),
    "np.asarray": lambda t: np.asarray(t.detach()).__imul__(0.5),
    "np.from_dlpack": lambda t: from_dlpack(t).numpy().__imul__(0.5),
    "torch.from_dlpack": lambda t: from_dlpack(t).mul_(0.5),
    "storage": lambda t: by_storage(t).mul_(0.5),
    "data_ptr": lambda t: torch.frombuffer(_at(t), dtype=t.dtype).mul_(0.5),
    "dist.broadcast": lambda t: dist.broadcast(t.data.mul_(0.5), 0),
    "dist.all_reduce": reduced,
    "dist.scatter": lambda t: dist.scatter(
        t.detach(), [torch.full_like(t, 0.25)] * dist.get_world_size() if dist.get_rank() == 0 else None, 0
    ),
    "dist.all_gather": lambda t: dist.all_gather(
        [t.detach(), *(torch.empty_like(t) for _ in range(dist.get_world_size() - 1))], torch.full_like(t, 0.25)
    ),
}


def _at(tensor: torch.Tensor) -> Any:
    import ctypes

    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def train_and_write(
    trainer: Trainer,
    road: Callable[[Trainer], list[torch.Tensor]],
    write: Callable[[torch.Tensor], Any],
    is_kept: bool,
    pipeline: Any = None,
    rank: int = 0,
) -> list[torch.Tensor]:
    """Train, write every tensor of a road, obtained before training or right now, and train on."""
    batches = iter(make_batches(trainer.setting, rank))

    def step() -> torch.Tensor:
        return trainer.step(next(batches)) if pipeline is None else pipeline.progress(batches)

    kept = road(trainer)
    outputs = [step() for _ in range(trainer.setting.num_batches // 2)]
    tensors = kept if is_kept else road(trainer)
    with torch.no_grad():
        for tensor in tensors:
            write(tensor)
    return outputs + [step() for _ in range(trainer.setting.num_batches // 2)]


def check_write(road: str, write: str, is_kept: bool, setting: Setting = SETTING, rank: int = 0, **kwargs: Any) -> None:
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting, **kwargs)
    ours.copy_from(stock)
    torch.manual_seed(1)
    expected = train_and_write(stock, ROADS[road], WRITES[write], is_kept, rank=rank)
    torch.manual_seed(1)
    actual = train_and_write(ours, ROADS[road], WRITES[write], is_kept, ours.pipeline(lookahead=4), rank)
    assert_same_outputs(expected, actual)
    assert_same_bits(stock, ours)
    assert ours.num_victims > 0


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("road", ROADS)
def test_written_by_every_road(road: str, is_kept: bool) -> None:
    check_write(road, "data.clamp_" if "weight" not in road else "numpy", is_kept)


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("road", ["model.state_dict", "model.named_parameters", "optimizer.state_dict"])
@pytest.mark.parametrize("write", WRITES)
def test_written_in_every_way(road: str, write: str, is_kept: bool) -> None:
    if write == "vector_to_parameters" and road != "model.named_parameters":
        pytest.skip("it sets .data, which makes another tensor of stock's states and leaves the table as it was")
    check_write(road, write, is_kept)


@pytest.mark.parametrize("kwargs", [{"overlap": False}, {"table_dir": "tmp_path"}], ids=["sequential", "mapped"])
@pytest.mark.parametrize("write", ["data.copy_", "numpy", "dist.broadcast"])
def test_written_where_rows_move_otherwise(write: str, kwargs: dict[str, Any], tmp_path: Any) -> None:
    if "table_dir" in kwargs:
        kwargs = {"table_dir": str(tmp_path)}
    for road in ("model.state_dict", "optimizer.state"):
        for is_kept in (False, True):
            check_write(road, write, is_kept, **kwargs)


@pytest.mark.parametrize(
    "setting",
    [
        with_optimizer(SETTING, RowWiseAdagrad),
        replace(SETTING, fused_tables=("t1",)),
        replace(SETTING, sharding_type="column_wise", min_partition=4),
        replace(SETTING, sharding_type="row_wise"),
    ],
    ids=["row-wise Adagrad", "one whole table", "column-wise", "row-wise"],
)
@pytest.mark.parametrize("write", ["data.copy_", "numpy"])
def test_written_in_other_settings(setting: Setting, write: str) -> None:
    for road in ("model.state_dict", "optimizer.state_dict", "parameters"):
        check_write(road, write, True, setting)


def _check_on_two_ranks(rank: int) -> None:
    for sharding_type in ("row_wise", "table_wise"):
        setting = replace(
            SETTING, sharding_type=sharding_type, num_rows=(200, 200, 200), dims=(8, 8, 8), num_batches=16
        )
        for write in ("dist.broadcast", "dist.all_reduce", "dist.scatter", "data.copy_", "numpy"):
            # The last: broadcast needs the same number of tensors on both ranks.
            for road in ("model.state_dict", "optimizer.state_dict") if sharding_type == "row_wise" else ():
                check_write(road, write, True, setting, rank)
                check_write(road, write, False, setting, rank)
        check_write("model.named_parameters", "data.clamp_", True, setting, rank)


@pytest.mark.dist
def test_written_on_two_ranks() -> None:
    run_ranks(2, _check_on_two_ranks)


@pytest.mark.parametrize("road", ROADS)
def test_read_by_every_road_after_every_batch(road: str) -> None:
    """A tensor that was obtained before training shows what stock's shows, after each batch, with batches in flight."""
    stock, ours = Trainer(SETTING), Trainer.scratchpipe(SETTING)
    ours.copy_from(stock)
    kept = ROADS[road](stock), ROADS[road](ours)
    assert [tensor.shape for tensor in kept[0]] == [tensor.shape for tensor in kept[1]]
    assert len(kept[0]) >= 1 or road == "tbe.split_embedding_weights"
    batches = make_batches(SETTING)
    pipeline, iterator = ours.pipeline(lookahead=3), iter(batches)
    for batch in batches[:12]:
        stock.step(batch)
        pipeline.progress(iterator)
        for tensors in (kept, (ROADS[road](stock), ROADS[road](ours))):
            for expected, actual in zip(*tensors, strict=True):
                assert torch.equal(expected, actual)
                assert float(expected.norm()) == float(actual.norm())


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "clone": lambda t: t.clone(),
    "numpy": lambda t: torch.from_numpy(t.detach().numpy().copy()),
    "dlpack": lambda t: from_dlpack(t).clone(),
    "tolist": lambda t: torch.tensor(t.tolist(), dtype=t.dtype),
    "deepcopy": copy.deepcopy,
    "save": lambda t: _saved(t),
    "cat": lambda t: torch.cat([t, t]),
    "index": lambda t: t[torch.arange(t.shape[0] - 1, -1, -1)],
    "to": lambda t: t.to(torch.float64),
    "storage": lambda t: by_storage(t).clone(),
    "all_gather": lambda t: _gathered(t),
    "iteration": lambda t: torch.stack(list(t)),
}


def _saved(tensor: torch.Tensor) -> torch.Tensor:
    stream = io.BytesIO()
    torch.save(tensor.detach(), stream)  # a parameter's own optimizer cannot be pickled, stock's neither
    stream.seek(0)
    loaded: torch.Tensor = torch.load(stream, weights_only=True)
    return loaded


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    gathered = [torch.empty_like(tensor)]
    dist.all_gather(gathered, tensor.detach())
    return gathered[0]


@pytest.mark.parametrize("read", READS)
def test_read_in_every_way(read: str) -> None:
    stock, ours = Trainer(SETTING), Trainer.scratchpipe(SETTING)
    ours.copy_from(stock)
    for road in ("model.state_dict", "optimizer.state_dict", "model.named_parameters"):
        kept = ROADS[road](stock), ROADS[road](ours)
        for trainer in (stock, ours):
            trainer.train_plain(make_batches(SETTING)[:8])
        for expected, actual in zip(*kept, strict=True):
            assert torch.equal(READS[read](expected).detach(), READS[read](actual).detach())
            assert not isinstance(READS[read](actual), TableView)


def test_what_leaves_pytorch_shows_every_batch_as_long_as_it_is_kept() -> None:
    """NumPy arrays and the like: nobody asks before they are read or written."""
    stock, ours = Trainer(SETTING), Trainer.scratchpipe(SETTING)
    ours.copy_from(stock)
    arrays = [[w.detach().numpy() for w in ROADS["model.named_parameters"](t)] for t in (stock, ours)]
    pools = collection(ours).pools
    assert all(pool.host_table.lent.is_any_lent for pool in pools)
    batches = make_batches(SETTING, num_batches=30)
    pipeline, iterator = ours.pipeline(lookahead=3), iter(batches)
    for index, batch in enumerate(batches):
        assert torch.equal(stock.step(batch), pipeline.progress(iterator))
        for expected, actual in zip(*arrays, strict=True):
            assert np.array_equal(expected, actual)
        if index % 5 == 4:
            for array in arrays[0] + arrays[1]:
                array[::2] *= 0.5
        if index == 20:
            expected = actual = array = None  # the loop's own
            arrays = [[], []]
            assert not any(pool.host_table.lent.is_any_lent for pool in pools)
    assert_same_bits(stock, ours)
    assert ours.num_victims > 0


def test_control_lent_memory_that_is_not_watched_loses_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TableView, "_lend", lambda self: shown(self))
    with pytest.raises(AssertionError):
        check_write("kernel.split_embedding_weights", "numpy", True)


def test_control_a_view_that_asks_nobody_loses_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_scratchpipe.sharding.kernel._PoolOwner.prepare_write", lambda self, shown: None)
    with pytest.raises((AssertionError, TableOverwrittenError)):
        check_write("model.named_parameters", "data.clamp_", True)


def test_no_plain_tensor_of_a_host_table_can_be_reached() -> None:
    """Walks everything that TorchRec and torch hold; what this package holds for itself is not walked."""
    ours = Trainer.scratchpipe(SETTING)
    ours.train_plain(make_batches(SETTING)[:2])
    host = {part.untyped_storage().data_ptr() for pool in collection(ours).pools for part in pool.host_table.parts}
    found: list[str] = []
    num_views = 0

    def walk(value: Any, path: str, seen: dict[int, Any], depth: int) -> None:
        nonlocal num_views
        if id(value) in seen or depth > 50:
            return
        seen[id(value)] = value  # kept, so that no other gets its id
        if isinstance(value, torch.Tensor) and not isinstance(value, ShardedTensor):
            if shown(value).untyped_storage().data_ptr() in host:
                num_views += 1
                if shown(value) is value:
                    found.append(path)
            return
        if isinstance(value, ShardedTensor):
            walk(local_tensors(value), f"{path}.local_shards", seen, depth + 1)
        elif isinstance(value, dict):
            for key, item in list(value.items()):
                walk(key, f"{path} key", seen, depth + 1)
                walk(item, f"{path}[{key!r}]", seen, depth + 1)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(item, f"{path}[{index}]", seen, depth + 1)
        elif isinstance(value, torch.nn.Module | torch.optim.Optimizer) or type(value).__module__.startswith("torch"):
            names = (
                {name for name in vars(value) if name not in OWN_ATTRIBUTES} if hasattr(value, "__dict__") else set()
            )
            for name in names:
                walk(vars(value)[name], f"{path}.{name}", seen, depth + 1)

    walk([ours.model, ours.optimizer, ours.model.state_dict(), ours.optimizer.state_dict()], "", {}, 0)
    assert num_views > 10
    assert found == []


OWN_ATTRIBUTES = {
    "pools",
    "_flat_weights",
    "_runner",
    "_owners",
    "_memory",
}  # of this package's kernels and collections


def test_tbe_found_in_the_model_shows_tables() -> None:
    stock, ours = Trainer(SETTING), Trainer.scratchpipe(SETTING)
    ours.copy_from(stock)
    batches = make_batches(SETTING)
    for trainer in (stock, ours):
        trainer.train_plain(batches[:10])
        torch.manual_seed(5)
        for kernel in kernels(trainer):
            kernel.emb_module.init_embedding_weights_uniform(-0.5, 0.5)
        trainer.train_plain(batches[10:])
    assert_same_bits(stock, ours)
    (tbe,) = {kernel.emb_module for kernel in kernels(ours)}
    for refused in (
        tbe.state_dict,
        lambda: tbe.load_state_dict({}),
        lambda: tbe.get_optimizer_buffer("momentum1_host"),
    ):
        with pytest.raises(ConfigError, match=r"state_dict\(\)|split_optimizer_states\(\)"):
            refused()
    with pytest.raises(ConfigError, match="shared memory"):
        next(collection(ours).parameters()).share_memory_()


@pytest.mark.parametrize("mode", [TrackingMode.ID_ONLY, TrackingMode.ROWWISE_ADAGRAD, TrackingMode.MOMENTUM_DIFF])
def test_delta_tracker(mode: TrackingMode) -> None:
    setting = with_optimizer(SETTING, RowWiseAdagrad)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    ours.copy_from(stock)
    found = []
    for trainer in (stock, ours):
        tracker = trainer.model.init_torchrec_delta_tracker(DeltaTrackerConfig(tracking_mode=mode, consumers=["c"]))
        rows = []
        for some in (make_batches(setting)[:10], make_batches(setting)[10:]):
            if trainer is ours:
                drain(trainer.pipeline(), some)
            else:
                trainer.train_plain(some)
            rows.append(tracker.get_unique("c"))
        found.append(rows)
    for expected, actual in zip(*found, strict=True):
        assert expected.keys() == actual.keys()
        for name, unique in expected.items():
            assert torch.equal(unique.ids, actual[name].ids)
            if mode is not TrackingMode.ID_ONLY:
                assert torch.equal(unique.states, actual[name].states)
    assert ours.num_victims > 0


def test_delta_tracker_momentum_last_is_of_rows_not_of_slots() -> None:
    """Stock's reads a buffer that is empty on a CPU, and of the first table alone; ours has what that buffer means."""
    setting = with_optimizer(replace(SETTING, num_rows=(200,), dims=(8,), load_factor=0.4), torch.optim.Adagrad)
    ours = Trainer.scratchpipe(setting)
    config = DeltaTrackerConfig(tracking_mode=TrackingMode.MOMENTUM_LAST, consumers=["c"])
    tracker = ours.model.init_torchrec_delta_tracker(config)
    ours.train_plain(make_batches(setting)[:10])
    (rows,) = tracker.get_unique("c").values()
    (momentum,) = ROADS["optimizer.state_dict"](ours)
    # Of the moment of a row's last lookup, which is before its last update.
    norms = momentum[rows.ids].norm(dim=1)
    assert bool((rows.states <= norms).all())
    assert bool((rows.states > 0).any())


def test_a_save_is_of_what_was_written(tmp_path: Any) -> None:
    """A flush must not put the scratchpad's rows over what somebody has written."""
    for step, save in enumerate(
        (
            lambda t, d: CheckpointManager(d).save(1, t.model, t.optimizer),
            lambda t, d: CheckpointManager(d).async_save(1, t.model, t.optimizer).result(),
            lambda t, d: to_stock(t.model),
            lambda t, d: t.optimizer.state_dict(),
        )
    ):
        ours = Trainer.scratchpipe(SETTING)
        kept = ROADS["model.named_parameters"](ours)
        ours.train_plain(make_batches(SETTING)[:10])
        with torch.no_grad():
            for tensor in kept:
                tensor.fill_(0.25)
        save(ours, str(tmp_path / str(step)))
        for tensor in ROADS["model.state_dict"](ours):
            assert bool((tensor == 0.25).all())


@pytest.mark.parametrize("is_pooled", [True, False])
@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise", "column_wise"])
def test_page_locked_tables_are_sharded_saved_and_trained(sharding_type: str, is_pooled: bool, tmp_path: Any) -> None:
    """ShardedTensor refuses a shard that says it is page-locked; on a CUDA device, a registered table does."""
    with device_path(LOCKED):
        setting = Setting(sharding_type=sharding_type, is_pooled=is_pooled, min_partition=4, num_batches=10)
        stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
        ours.copy_from(stock)
        drain(ours.pipeline(), make_batches(setting))
        stock.train_plain(make_batches(setting))
        CheckpointManager(tmp_path).save(1, ours.model, ours.optimizer)
        assert_same_bits(stock, ours)
        pools = (ours.model.module.ebc if is_pooled else ours.model.module.ec).pools
        assert all(part.is_pinned() for pool in pools for part in pool.host_table.parts)


@pytest.mark.parametrize("read", ["state_dict", "numpy", "kept"])
@pytest.mark.parametrize("is_pipelined", [False, True])
def test_another_thread_that_reads_disturbs_nothing(read: str, is_pipelined: bool) -> None:
    """Also in the middle of a step, between the forward and the update of a batch."""
    setting = replace(SETTING, batch_size=64, num_batches=60)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    ours.copy_from(stock)
    kept = ROADS["model.named_parameters"](ours)
    errors: list[BaseException] = []
    is_done = threading.Event()

    def read_on() -> None:
        try:
            while not is_done.is_set():
                if read == "state_dict":
                    ours.model.state_dict()
                elif read == "numpy":
                    assert all(np.isfinite(tensor.detach().numpy().sum()) for tensor in kept)
                else:
                    assert all(bool(tensor.isfinite().all()) for tensor in kept)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=read_on)
    thread.start()
    try:
        batches = make_batches(setting)
        actual = drain(ours.pipeline(), batches) if is_pipelined else ours.train_plain(batches)
    finally:
        is_done.set()
        thread.join()
    assert errors == []
    assert_same_outputs(stock.train_plain(make_batches(setting)), actual)
    assert_same_bits(stock, ours)


def test_copies_are_what_stock_copies_are() -> None:
    stock, ours = Trainer(SETTING), Trainer.scratchpipe(SETTING)
    for make in (
        lambda t: copy.deepcopy(ROADS["model.named_parameters"](t)[0]),
        lambda t: copy.copy(ROADS["model.named_parameters"](t)[0].detach()),
        lambda t: copy.deepcopy(ROADS["model.state_dict"](t)[0]),
        lambda t: copy.deepcopy(to_stock(t.model)).ebc.embedding_bags["t1"].weight,
        lambda t: copy.copy(ROADS["lookup.named_parameters"](t)[0]),
    ):
        expected, actual = make(stock), make(ours)
        assert isinstance(actual, torch.nn.Parameter) == isinstance(expected, torch.nn.Parameter)
        assert actual.requires_grad == expected.requires_grad
    weight = ROADS["model.named_parameters"](ours)[0]
    assert f"{weight[0, 0]:.3f}" == f"{float(weight[0, 0]):.3f}"


def test_initial_weights_are_drawn_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Trainer.scratchpipe(SETTING)
    name, parameter = next((n, p) for n, p in ours.model.named_parameters() if isinstance(p, table_view.TableParameter))
    drawn: list[torch.device] = []
    draw = table_view._draw

    def noting(*args: Any, device: torch.device, **kwargs: Any) -> torch.Tensor:
        drawn.append(device)
        return draw(*args, device=device, **kwargs)

    monkeypatch.setattr(table_view, "_draw", noting)
    monkeypatch.setattr(table_view, "NUM_DRAWN_TOGETHER", 64)  # a CPU draws one after another: in pieces, the same bits
    torch.manual_seed(3)
    torch.nn.init.uniform_(parameter, -0.5, 0.25)
    assert not drawn  # a CPU
    expected = parameter.detach().clone()
    monkeypatch.setattr(parameter._owner, "drawing_device", torch.device("cpu"))
    drain(ours.pipeline(), make_batches(SETTING)[:4])
    torch.manual_seed(3)
    torch.nn.init.uniform_(parameter, -0.5, 0.25)
    assert drawn == [torch.device("cpu")]
    assert torch.equal(parameter, expected), name
    torch.nn.init.uniform_(parameter, generator=torch.Generator())  # the host's generator
    assert drawn == [torch.device("cpu")]
    assert parameter._owner._pool.host_table.is_overwritten
