# SPDX-License-Identifier: BSD-3-Clause
"""Private training: lazy noise is eager noise, whatever was evicted, planned ahead, sharded or resumed."""

import itertools
import os
import shutil
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import (
    NUM_DENSE,
    Setting,
    TinyModel,
    Trainer,
    assert_same_bits,
    drain,
    full_state,
    make_bags,
    make_batches,
    make_embeddings,
    run_ranks,
)
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.multiprocessing.spawn import ProcessExitedException
from torchrec import PoolingType
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_scratchpipe import (
    CheckpointManager,
    CheckpointMismatchError,
    ConfigError,
    LazyDP,
    PrivacyError,
    load_checkpoint,
    to_stock,
)
from torchrec_scratchpipe.privacy.accounting import epsilon
from torchrec_scratchpipe.privacy.delayed_noise import Places
from torchrec_scratchpipe.privacy.random_numbers import philox
from torchrec_scratchpipe.sharding.model import scratchpad_collections

SGD = Setting(
    optimizer=torch.optim.SGD, optimizer_kwargs=(("lr", 0.25),), batch_size=8, num_batches=40, load_factor=0.3
)
PRIVACY = LazyDP(clip=0.5, noise_multiplier=0.5, sample_rate=0.01, seed=7, expected_batch_size=8)


def integer_noise(places: Places, since: Tensor, until: int, dim: int, squared_rates: Tensor) -> Tensor:
    """Whole numbers of 1/64, one a step, so that sums are exact in any order."""
    noise = torch.zeros(places.rows.numel(), dim, dtype=torch.float32)
    for step in range(int(since.min()) + 1 if since.numel() else 0, until + 1):
        columns = places.first_columns[:, None] + torch.arange(dim, dtype=torch.int64)
        counters = [x.expand(columns.shape) for x in (places.rows[:, None], places.tables[:, None])]
        word = philox([*counters, torch.full_like(columns, step), columns], 3)[0]
        noise += ((word % 7 - 3).float() / 64) * (since < step)[:, None]
    return noise


@dataclass(frozen=True)
class IntegerDP(LazyDP):
    """Noise of whole numbers."""

    def noise(self, batch_size: float) -> Any:
        return integer_noise


CLIP = 0.8  # some examples are clipped, some are not
INTEGERS = IntegerDP(clip=1e6, noise_multiplier=1.0, sample_rate=0.01, seed=7, loss_reduction="sum")


class LinearModel(nn.Module):
    """The gradient of every row is a whole number, so that all sums are exact."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.is_pooled = setting.is_pooled
        if setting.is_pooled:
            self.ebc = make_bags(setting)
        else:
            self.ec = make_embeddings(setting)
        self.over = nn.Linear(NUM_DENSE, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        sign = 2 * batch.labels - 1
        if self.is_pooled:
            pooled = self.ebc(batch.sparse_features).values()
            loss = (pooled.sum(dim=1) * sign).sum()
        else:
            sequences = self.ec(batch.sparse_features)
            loss = sum(
                (value.values().sum(dim=1) * sign.repeat_interleave(value.lengths())).sum()
                for value in sequences.values()
            )
        return loss + self.over(batch.dense_features).sum(), loss.detach()


def set_weights(trainer: Trainer) -> None:
    """Whole numbers of 1/64, the same for every sharding."""
    state = trainer.model.state_dict()
    for name, value in state.items():
        if not hasattr(value, "local_shards"):
            with torch.no_grad():
                value.copy_(torch.arange(value.numel(), dtype=torch.float32).view(value.shape) % 5 / 8 - 0.25)
            continue
        for shard in value.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            numbers = torch.arange(row, row + rows, dtype=torch.int64)[:, None] * 31 + len(name)
            numbers = numbers + torch.arange(column, column + columns, dtype=torch.int64) * 7
            shard.tensor.copy_((numbers % 41 - 20).float() / 64)
    trainer.model.load_state_dict(state)


def pools_of(trainer: Trainer) -> list[Any]:
    return [pool for collection in scratchpad_collections(trainer.model) for pool in collection.pools]


def catch_up(trainer: Trainer) -> None:
    """Every row gets its noise."""
    for collection in scratchpad_collections(trainer.model):
        collection.catch_up()


def train(
    setting: Setting,
    privacy: LazyDP,
    lookahead: int = 2,
    *,
    is_eager: bool = False,
    make_model: Any = TinyModel,
    batches: list[Batch] | None = None,
    **kwargs: Any,
) -> Trainer:
    """Train in private; eager: after each step, every row gets its noise."""
    trainer = Trainer.scratchpipe(setting, make_model=make_model, **kwargs)
    set_weights(trainer)
    pipeline = trainer.pipeline(lookahead, privacy=privacy)
    if is_eager:
        pipeline.register_progress_hook(lambda _batch: catch_up(trainer))
    drain(pipeline, batches if batches is not None else make_batches(setting, rank=dist.get_rank()))
    return trainer


@pytest.mark.parametrize("is_pooled", [True, False])
@pytest.mark.parametrize("lookahead", [1, 2, 5, 8])
def test_lazy_noise_is_eager_noise(process_group: None, lookahead: int, is_pooled: bool) -> None:
    setting = replace(SGD, is_pooled=is_pooled)
    eager = train(setting, INTEGERS, is_eager=True, make_model=LinearModel)
    lazy = train(setting, INTEGERS, lookahead, make_model=LinearModel)
    assert lazy.num_victims > 0
    assert all(pool.late.is_any_due for pool in pools_of(lazy))
    assert_same_bits(eager, lazy)
    assert not any(pool.late.is_any_due for pool in pools_of(lazy))


def test_every_row_gets_the_noise_of_every_step(process_group: None) -> None:
    """A row that nobody looked up has the sum of all steps' noise, and no other change."""
    setting = replace(SGD, num_rows=(2000, 150, 3))
    before = full_state(train(setting, INTEGERS, make_model=LinearModel, batches=[]))
    trainer = train(setting, INTEGERS, make_model=LinearModel)
    used = {int(row) for batch in make_batches(setting) for row in batch.sparse_features["f0"].values()}
    unused = [row for row in range(2000) if row not in used]
    assert len(unused) > 500
    rows = torch.tensor(unused, dtype=torch.int64)
    zeros = torch.zeros_like(rows)
    expected = integer_noise(Places(zeros, rows, zeros), zeros, 40, 8, torch.zeros(41, dtype=torch.float64))
    (name,) = [name for name in before if "t0.weight" in name]
    assert torch.equal(full_state(trainer)[name][0][rows] - before[name][0][rows], expected)
    assert expected.abs().min(dim=1).values.max() > 0


@pytest.mark.parametrize("overlap", [True, False])
def test_normal_noise_has_the_same_bits_whatever_is_planned_ahead(process_group: None, overlap: bool) -> None:
    first = train(SGD, PRIVACY, 1)
    other = train(replace(SGD, load_factor=0.5), PRIVACY, 6, overlap=overlap)
    assert first.num_victims > 0
    assert first.num_victims != other.num_victims
    assert_same_bits(first, other)


def test_seeds_differ(process_group: None) -> None:
    with pytest.raises(AssertionError, match="max diff"):
        assert_same_bits(train(SGD, PRIVACY), train(SGD, replace(PRIVACY, seed=8)))


class PlainModel(nn.Module):
    """A copy of a trained model's whole tables and dense layer, for gradients of one example at a time."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        state = full_state(trainer)
        self.tables = nn.ParameterList(
            [nn.Parameter(next(v[0] for n, v in state.items() if f".t{i}.weight" in n)) for i in range(3)]
        )
        (weight,), (bias,) = (
            [tensor for name, (tensor, *_) in state.items() if name.endswith(f"over.{kind}") and "/" not in name]
            for kind in ("weight", "bias")
        )
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def loss(self, batch: Batch, example: int, *, is_mean: bool) -> Tensor:
        columns = []
        for i, table in enumerate(self.tables):
            ids = batch.sparse_features[f"f{i}"].to_dense()[example].long()
            rows = table[ids]
            columns.append(rows.sum(dim=0) / (max(1, ids.numel()) if is_mean else 1))
        inputs = torch.cat([*columns, batch.dense_features[example]])
        logit = self.weight[0] @ inputs + self.bias[0]
        return nn.functional.binary_cross_entropy_with_logits(logit, batch.labels[example])


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
@pytest.mark.parametrize("is_pooled", [True, False])
def test_steps_are_those_of_dp_sgd(process_group: None, is_pooled: bool, pooling: PoolingType) -> None:
    """Against gradients of one example at a time, clipped and added up; noise of whole numbers is taken away again."""
    if not is_pooled and pooling is PoolingType.MEAN:
        pytest.skip("sequences are not pooled by TorchRec")
    setting = replace(SGD, num_batches=6, is_pooled=is_pooled, pooling=pooling)
    privacy = IntegerDP(clip=CLIP, noise_multiplier=0.0, sample_rate=0.01, seed=7, expected_batch_size=8)
    plain = PlainModel(train(setting, privacy, batches=[]))
    batches = make_batches(setting)
    num_clipped = 0
    for step, batch in enumerate(batches, start=1):
        sums = [torch.zeros_like(p) for p in plain.parameters()]
        for example in range(8):
            plain.zero_grad()
            plain.loss(batch, example, is_mean=pooling is PoolingType.MEAN).backward()
            norm = torch.cat([p.grad.view(-1) for p in plain.parameters()]).norm()
            num_clipped += bool(norm > CLIP)
            for total, parameter in zip(sums, plain.parameters(), strict=True):
                total += parameter.grad * min(1.0, CLIP / float(norm))
        with torch.no_grad():
            for parameter, total in zip(plain.parameters(), sums, strict=True):
                parameter -= (0.25 if parameter.shape[0] > 1 and parameter.dim() == 2 else 0.05) * total / 8
            for i, table in enumerate(plain.tables):
                rows = torch.arange(table.shape[0], dtype=torch.int64)
                places = Places(torch.full_like(rows, i), rows, torch.zeros_like(rows))
                table += integer_noise(places, torch.full_like(rows, step - 1), step, 8, torch.zeros(0))
    assert 5 < num_clipped < 48
    ours = PlainModel(train(setting, privacy))
    for expected, actual in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def private_rank(rank: int, setting: Setting, path: str) -> None:
    world_size = dist.get_world_size()
    privacy = replace(PRIVACY, expected_batch_size=16)
    trainer = Trainer.scratchpipe(setting)
    set_weights(trainer)
    pipeline = trainer.pipeline(3, privacy=privacy)
    wide = make_batches(replace(setting, batch_size=16, num_batches=20))
    drain(pipeline, [part(batch, rank, world_size) for batch in wide])
    assert all(pool.late.is_any_due for pool in pools_of(trainer))
    manager = CheckpointManager(path)
    manager.save(20, trainer.model, trainer.optimizer, for_release=True)


def part(batch: Batch, rank: int, world_size: int) -> Batch:
    """A rank's share of the examples."""
    size = batch.labels.numel() // world_size
    mine = slice(rank * size, (rank + 1) * size)
    lists = {key: batch.sparse_features[key].to_dense()[mine] for key in batch.sparse_features.keys()}  # noqa: SIM118
    return Batch(
        batch.dense_features[mine],
        KeyedJaggedTensor.from_jt_dict(
            {
                key: JaggedTensor.from_dense([torch.as_tensor(one) for one in some])
                if any(one.numel() for one in some)
                else JaggedTensor(torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(len(some), dtype=torch.int64))
                for key, some in lists.items()
            }
        ),
        batch.labels[mine],
    )


def saved_state(path: str) -> dict[str, Tensor]:
    metadata = FileSystemReader(f"{path}/step_000000000020").read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(tuple(info.size), dtype=info.properties.dtype)
        for name, info in metadata.items()
        if isinstance(info, TensorStorageMetadata)
    }
    load_checkpoint(f"{path}/step_000000000020", state)
    return state


@pytest.fixture(scope="module")
def states_of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[PoolingType, dict[str, Tensor]]:
    states = {}
    for pooling in (PoolingType.SUM, PoolingType.MEAN):
        path = str(tmp_path_factory.mktemp("one"))
        run_ranks(1, private_rank, replace(SGD, pooling=pooling), path)
        states[pooling] = saved_state(path)
    return states


@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise", "column_wise", "table_row_wise"])
def test_ranks_and_sharding_change_no_noise(
    tmp_path: Path, states_of_one_rank: dict[PoolingType, dict[str, Tensor]], sharding_type: str
) -> None:
    """The same examples on one rank and on two: sums are added in another order, and noise is the same."""
    pooling = PoolingType.MEAN if sharding_type == "row_wise" else PoolingType.SUM
    local_size = 2 if sharding_type == "table_row_wise" else None
    setting = replace(SGD, sharding_type=sharding_type, pooling=pooling, local_size=local_size)
    run_ranks(2, private_rank, setting, str(tmp_path))
    expected, actual = states_of_one_rank[pooling], saved_state(str(tmp_path))
    assert expected.keys() == actual.keys()
    assert sum("weight" in name for name in expected) >= 4
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=2e-6)


def resumable(rank: int, setting: Setting, path: str, until: int, *, is_killed: bool, is_async: bool = True) -> None:
    """Train up to a batch, from the latest checkpoint if there is one; save every 5, and at the end for release."""
    trainer = Trainer.scratchpipe(setting)
    set_weights(trainer)
    pipeline = trainer.pipeline(3, privacy=replace(PRIVACY, expected_batch_size=16))
    manager = CheckpointManager(path)
    found = manager.load(trainer.model, trainer.optimizer)
    first = 0 if found is None else found.step
    if first:
        assert any(pool.late.is_any_due for pool in pools_of(trainer))
    batches = make_batches(replace(setting, batch_size=16, num_batches=20))
    source = iter([part(batch, rank, dist.get_world_size()) for batch in batches[first:until]])
    for step in range(first + 1, until + 1):
        pipeline.progress(source)
        if step % 5 == 0 and step < until:
            save = manager.async_save if is_async else manager.save
            save(step, trainer.model, trainer.optimizer)
        if is_killed and step == until - 1:
            manager.wait()
            os.kill(os.getpid(), signal.SIGKILL)
    manager.wait()
    assert any(pool.late.is_any_due for pool in pools_of(trainer))
    manager.save(until, trainer.model, trainer.optimizer, for_release=True)
    assert not any(pool.late.is_any_due for pool in pools_of(trainer))
    assert pipeline.epsilon(1e-5) == epsilon(noise_multiplier=0.5, sample_rate=0.01, num_steps=until, delta=1e-5)


@pytest.mark.parametrize(
    ("num_ranks", "sharding_type"), [(1, "table_wise"), (2, "table_wise"), (2, "row_wise"), (2, "column_wise")]
)
def test_a_killed_job_goes_on_with_the_same_bits(tmp_path: Path, num_ranks: int, sharding_type: str) -> None:
    setting = replace(SGD, sharding_type=sharding_type)
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    run_ranks(num_ranks, partial(resumable, is_killed=False), setting, whole, 20)
    with pytest.raises(ProcessExitedException):
        run_ranks(num_ranks, partial(resumable, is_killed=True, is_async=num_ranks == 1), setting, killed, 14)
    assert CheckpointManager(killed).steps() == [5, 10]
    run_ranks(num_ranks, partial(resumable, is_killed=False), setting, killed, 20)
    expected, actual = saved_state(whole), saved_state(killed)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


def test_another_sharding_goes_on_with_the_same_noise(tmp_path: Path) -> None:
    """One rank, then two with columns, then two with rows: which noise a row has got goes with it."""
    whole, moved = str(tmp_path / "whole"), str(tmp_path / "moved")
    run_ranks(1, partial(resumable, is_killed=False), SGD, whole, 20)
    for num_ranks, sharding_type, until in ((1, "table_wise", 7), (2, "column_wise", 12), (2, "row_wise", 20)):
        run_ranks(
            num_ranks, partial(resumable, is_killed=False), replace(SGD, sharding_type=sharding_type), moved, until
        )
        if until < 20:
            shutil.rmtree(f"{moved}/step_{until:012d}")  # for release; what is resumed from has noise to come
    expected, actual = saved_state(whole), saved_state(moved)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=2e-6)


def test_a_checkpoint_with_noise_to_come_is_for_a_private_model_alone(process_group: None, tmp_path: Path) -> None:
    trainer = train(SGD, PRIVACY)
    manager = CheckpointManager(tmp_path)
    path = manager.save(40, trainer.model, trainer.optimizer)
    assert any(pool.late.is_any_due for pool in pools_of(trainer))
    target = {"model": Trainer.scratchpipe(SGD).model.state_dict()}
    with pytest.raises(PrivacyError, match="have not got all noise"):
        load_checkpoint(path, target)
    other = Trainer.scratchpipe(SGD)
    with pytest.raises(PrivacyError, match="have not got all noise"):
        manager.load(other.model, other.optimizer)
    for name, value in (
        ("seed", 8),
        ("noise_multiplier", 0.25),
        ("clip", 0.25),
        ("sample_rate", 0.02),
        ("expected_batch_size", 9),
    ):
        other = Trainer.scratchpipe(SGD)
        other.pipeline(privacy=replace(PRIVACY, **{name: value}))
        with pytest.raises(
            CheckpointMismatchError, match="another seed" if name == "seed" else name.removeprefix("expected_")
        ):
            manager.load(other.model, other.optimizer)
    private = Trainer.scratchpipe(SGD)
    private.pipeline(privacy=PRIVACY)
    manager.load(private.model, private.optimizer)
    assert_same_bits(trainer, private)
    released = manager.save(41, trainer.model, trainer.optimizer, for_release=True)
    plain = Trainer.scratchpipe(SGD)
    state = plain.model.state_dict()
    load_checkpoint(released, {"model": state})
    plain.model.load_state_dict(state)
    assert_same_bits(trainer, plain)


def test_whoever_reads_a_table_sees_all_noise(process_group: None) -> None:
    """state_dict, a view, to_stock, NumPy: each against a twin that was asked by state_dict."""
    expected = full_state(train(SGD, PRIVACY))
    (name,) = [name for name in expected if name.endswith("t0.weight")]

    def by_view(trainer: Trainer) -> Tensor:
        return next(v for n, v in trainer.model.named_parameters() if n.endswith("t0.weight")).detach().clone()

    def by_rows(trainer: Trainer) -> Tensor:
        value = trainer.model.state_dict()[name].local_shards()[0].tensor
        return value[torch.arange(200, dtype=torch.int64)]

    def by_stock(trainer: Trainer) -> Tensor:
        return to_stock(trainer.model).ebc.embedding_bags["t0"].weight.detach().clone()

    def by_tbe(trainer: Trainer) -> Tensor:
        (collection,) = scratchpad_collections(trainer.model)
        tables = [w for kernel in collection.kernels for w in kernel.emb_module.split_embedding_weights()]
        return next(w for w in tables if w.shape[0] == 200).clone()

    for read in (by_view, by_rows, by_stock, by_tbe):
        trainer = train(SGD, PRIVACY)
        assert any(pool.late.is_any_due for pool in pools_of(trainer))
        assert torch.equal(read(trainer), expected[name][0]), read.__name__


def test_a_loaded_table_gets_the_noise_of_later_steps_alone(process_group: None) -> None:
    """What was written over had the noise until then; INTEGERS make sums exact."""
    trainer = train(SGD, INTEGERS, make_model=LinearModel)
    state = trainer.model.state_dict()
    weight = next(value for name, value in state.items() if name.endswith("t0.weight")).local_shards()[0].tensor
    weight.fill_(1.0)
    twin = train(SGD, INTEGERS, make_model=LinearModel)
    twin.model.load_state_dict(trainer.model.state_dict())
    batches = make_batches(replace(SGD, seed=3, num_batches=10))
    drain(trainer.pipeline(privacy=INTEGERS), batches)
    eager = twin.pipeline(privacy=INTEGERS)
    eager.register_progress_hook(lambda _batch: catch_up(twin))
    drain(eager, batches)
    assert_same_bits(trainer, twin)


def test_evaluation_sees_the_noise_of_all_steps(process_group: None) -> None:
    batches = make_batches(SGD)
    outputs = []
    for is_eager in (True, False):
        trainer = train(SGD, INTEGERS, is_eager=is_eager, make_model=LinearModel)
        if is_eager:
            catch_up(trainer)
        trainer.model.eval()
        with torch.no_grad():
            outputs.append([trainer.model(batch)[1] for batch in batches[:5]])
        assert is_eager or any(pool.late.is_any_due for pool in pools_of(trainer))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_step_by_hand_is_refused(process_group: None) -> None:
    trainer = train(SGD, PRIVACY)
    before = full_state(trainer)
    with pytest.raises(PrivacyError, match="neither clipped nor counted"):
        trainer.step(make_batches(SGD)[0])
    after = full_state(trainer)
    assert all(
        torch.equal(a, b) for name in before if "t" in name for a, b in zip(before[name], after[name], strict=True)
    )
    with pytest.raises(ConfigError, match="was given no privacy"):
        trainer.pipeline()
    with pytest.raises(ConfigError, match="no epsilon would be known of"):
        trainer.pipeline(privacy=replace(PRIVACY, noise_multiplier=0.1))
    with pytest.raises(ConfigError, match="delta log"):
        CheckpointManager("/tmp", delta_every=1).trained(1, trainer.model)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optimizer": torch.optim.Adagrad, "optimizer_kwargs": (("lr", 0.1), ("eps", 1e-8))}, "Use SGD"),
        ({"optimizer_kwargs": (("lr", 0.1), ("weight_decay", 0.1))}, "weight_decay"),
        ({"fused_tables": ("t2",)}, "table t2 is planned as .*fused"),
        ({"data_type": DataType.FP16}, "float16"),
        ({"is_weighted": True, "pooling": PoolingType.MEAN}, "pool by the mean, and ids have weights"),
    ],
)
def test_what_cannot_be_private_is_refused_by_name(process_group: None, changes: dict[str, Any], match: str) -> None:
    trainer = Trainer.scratchpipe(replace(SGD, **changes))
    with pytest.raises(ConfigError, match=match):
        trainer.pipeline(privacy=PRIVACY)
    assert all(pool.late is None for pool in pools_of(trainer))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip", 0.0), ("clip", float("inf")), ("noise_multiplier", -1.0), ("sample_rate", 0.0), ("sample_rate", 1.5),
        ("seed", -1), ("seed", 2**64), ("expected_batch_size", 0), ("loss_reduction", "none"), ("accountant", "gdp"),
    ],
)  # fmt: skip
def test_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"LazyDP: {name} is"):
        replace(PRIVACY, **{name: value})


def test_an_empty_batch_is_a_step(process_group: None) -> None:
    batches = make_batches(SGD)
    empty = part(batches[0], 0, 100)
    assert empty.labels.numel() == 0
    trainer = train(SGD, INTEGERS, make_model=LinearModel, batches=[*batches[:3], empty, empty, *batches[3:6]])
    eager = train(
        SGD, INTEGERS, is_eager=True, make_model=LinearModel, batches=[*batches[:3], empty, empty, *batches[3:6]]
    )
    assert_same_bits(eager, trainer)
    mean = train(SGD, PRIVACY, batches=[*batches[:3], empty, *batches[3:6]])
    assert all(torch.isfinite(tensor).all() for tensors in full_state(mean).values() for tensor in tensors)


def test_the_seed_is_told_to_nobody(process_group: None, tmp_path: Path) -> None:
    seed = 0x1234_5678_9ABC_DEF1
    privacy = replace(PRIVACY, seed=seed)
    assert str(seed) not in repr(privacy)
    trainer = train(SGD, privacy, batches=make_batches(SGD)[:3])
    manager = CheckpointManager(tmp_path)
    manager.save(3, trainer.model, trainer.optimizer)
    manager.save(4, trainer.model, trainer.optimizer, for_release=True)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert seed.to_bytes(8, "little") not in content
            assert str(seed).encode() not in content
            is_release = "step_000000000004" in str(path)
            assert not (is_release and privacy.seed_check.encode() in content)


def integers_rank(rank: int, setting: Setting, lookahead: int) -> None:
    eager = train(setting, INTEGERS, is_eager=True, make_model=LinearModel)
    lazy = train(setting, INTEGERS, lookahead, make_model=LinearModel)
    assert all(pool.late.is_any_due for pool in pools_of(lazy))
    assert_same_bits(eager, lazy)
    counts = torch.tensor([lazy.num_victims], dtype=torch.int64)
    dist.all_reduce(counts)
    assert int(counts) > 0


@pytest.mark.parametrize(
    ("sharding_type", "lookahead", "pooling"),
    [
        ("table_wise", 1, PoolingType.SUM),
        ("row_wise", 8, PoolingType.SUM),
        ("column_wise", 3, PoolingType.SUM),
        ("row_wise", 2, None),
    ],
)
def test_lazy_noise_is_eager_noise_on_two_ranks(
    sharding_type: str, lookahead: int, pooling: PoolingType | None
) -> None:
    setting = replace(SGD, sharding_type=sharding_type, is_pooled=pooling is not None, num_batches=25)
    run_ranks(2, integers_rank, setting, lookahead)


def test_lazy_noise_is_eager_noise_in_files(process_group: None, tmp_path: Path) -> None:
    setting = replace(SGD, num_batches=25)
    eager = train(setting, INTEGERS, is_eager=True, make_model=LinearModel)
    lazy = train(setting, INTEGERS, make_model=LinearModel, table_dir=str(tmp_path))
    assert lazy.num_victims > 0
    assert_same_bits(eager, lazy)


class WideModel(TinyModel):
    """With a layer that has no gradient, so that its weights change by noise alone."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.wide = nn.Linear(NUM_DENSE, 2000)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, logits = super().forward(batch)
        return loss + 0.0 * self.wide(batch.dense_features).sum(), logits


def test_dense_layers_get_noise_in_each_step(process_group: None) -> None:
    before, after = (
        full_state(train(SGD, PRIVACY, make_model=WideModel, batches=make_batches(SGD)[:num_steps]))
        for num_steps in (0, 16)
    )
    for kind in ("weight", "bias"):
        (name,) = [name for name in before if name.endswith(f"wide.{kind}") and "/" not in name]
        change = after[name][0] - before[name][0]
        # rate * noise_multiplier * clip / batch size, of 16 steps
        expected = 0.05 * 0.5 * 0.5 / 8 * 4
        assert float(change.std()) == pytest.approx(expected, rel=0.06)
        assert abs(float(change.mean())) < 4 * expected / change.numel() ** 0.5


def test_an_example_without_a_finite_gradient_counts_as_none(process_group: None) -> None:
    batches = make_batches(SGD)[:5]
    bad = [replace_dense(batch, float("inf") if index == 2 else None) for index, batch in enumerate(batches)]
    state = full_state(train(SGD, PRIVACY, batches=bad))
    assert all(torch.isfinite(tensor).all() for tensors in state.values() for tensor in tensors)


def replace_dense(batch: Batch, value: float | None) -> Batch:
    dense = batch.dense_features.clone()
    if value is not None:
        dense[0] = value
    return Batch(dense, batch.sparse_features, batch.labels)


def test_another_model_of_a_pipeline_is_private_too(process_group: None) -> None:
    first, second = train(SGD, PRIVACY), Trainer.scratchpipe(SGD)
    set_weights(second)
    pipeline = first.pipeline(privacy=PRIVACY)
    pipeline.attach(second.model)
    pipeline._optimizer = second.optimizer
    drain(pipeline, make_batches(SGD))
    assert_same_bits(first, second)
    with pytest.raises(ConfigError, match="was given no privacy"):
        Trainer.scratchpipe(SGD).pipeline().attach(first.model)


def test_noise_has_the_rates_of_its_steps(process_group: None) -> None:
    trainer = Trainer.scratchpipe(SGD)
    pipeline = trainer.pipeline(privacy=PRIVACY)
    batches = iter(make_batches(SGD))
    rates = [0.25, 0.5, 0.125, 1.0]
    for rate in rates:
        for group in trainer.model.fused_optimizer.param_groups:
            group["lr"] = rate
        trainer.model.fused_optimizer.step()  # FBGEMM takes its rate from here
        pipeline.progress(batches)
    expected = [0.0, *itertools.accumulate(rate * rate for rate in rates)]
    steps = [kernel.steps.squared_rates.tolist() for kernel in pipeline._private_steps._kernels]
    assert steps
    assert all(some == expected for some in steps)


def test_noise_that_an_evaluation_has_brought_is_in_the_table(process_group: None, tmp_path: Path) -> None:
    """Between a checkpoint, which flushes, and the next read of the table, nobody trains."""
    setting = replace(SGD, num_rows=(40, 30, 4), num_batches=10)
    trainer = train(setting, INTEGERS, make_model=LinearModel)
    CheckpointManager(tmp_path).save(10, trainer.model, trainer.optimizer)
    every_row = Batch(
        torch.zeros(2, NUM_DENSE),
        KeyedJaggedTensor.from_lengths_sync(
            ["f0", "f1", "f2"],
            torch.cat([torch.arange(size, dtype=torch.int64) for size in setting.num_rows]),
            lengths=torch.tensor([20, 20, 15, 15, 2, 2], dtype=torch.int64),
        ),
        torch.zeros(2),
    )
    trainer.model.eval()
    with torch.no_grad():
        trainer.model(every_row)
    assert_same_bits(train(setting, INTEGERS, is_eager=True, make_model=LinearModel), trainer)
