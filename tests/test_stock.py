# SPDX-License-Identifier: BSD-3-Clause
"""Out of the scratchpad into plain collections, and into tables from files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Setting, TinyModel, Trainer, assert_same_outputs, drain, make_batches, run_ranks
from safetensors.torch import save_file
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.fx import symbolic_trace
from torchrec.inference.modules import quantize_embeddings

from torchrec_scratchpipe import CheckpointManager, ConfigError, load_checkpoint, to_stock, warm_start
from torchrec_scratchpipe.sharding.table_view import shown

SETTING = Setting(num_batches=40, load_factor=0.25)


def trained(setting: Setting = SETTING, rank: int = 0) -> Trainer:
    trainer = Trainer.scratchpipe(setting)
    drain(trainer.pipeline(), make_batches(setting, rank=rank))
    return trainer


@pytest.mark.parametrize("is_pooled", [True, False])
@pytest.mark.parametrize("fused_tables", [(), ("t1",)])
def test_plain_model_gives_the_same_outputs_without_a_copy(is_pooled: bool, fused_tables: tuple[str, ...]) -> None:
    setting = replace(SETTING, is_pooled=is_pooled, fused_tables=fused_tables)
    ours = trained(setting)
    plain = to_stock(ours.model)
    assert type(plain) is TinyModel
    collection = plain.ebc if is_pooled else plain.ec
    assert type(collection) is (EmbeddingBagCollection if is_pooled else EmbeddingCollection)
    ours.model.eval()
    batches = make_batches(replace(setting, seed=3), num_batches=5)
    with torch.no_grad():
        assert_same_outputs([ours.model(batch)[1] for batch in batches], [plain(batch)[1] for batch in batches])
    host_tables = [pool.host_table for pool in sharded(ours).pools]
    for name, table in (collection.embedding_bags if is_pooled else collection.embeddings).items():
        is_shared = any(host_table.locate(shown(table.weight)) is not None for host_table in host_tables)
        assert is_shared == (name not in fused_tables), name
    assert plain.over.weight is ours.model.module.over.weight


def sharded(trainer: Trainer) -> Any:
    return trainer.model.module.ebc if trainer.setting.is_pooled else trainer.model.module.ec


def test_a_collection_in_two_places_stays_one() -> None:
    ours = trained()
    pair = torch.nn.ModuleList([ours.model.module.ebc, torch.nn.ModuleList([ours.model.module.ebc])])
    plain = to_stock(pair)
    assert plain[0] is plain[1][0]


def test_plain_model_survives_training_that_goes_on() -> None:
    ours = trained()
    plain = to_stock(ours.model)
    drain(ours.pipeline(), make_batches(SETTING))
    ours.model.state_dict()
    batch = make_batches(replace(SETTING, seed=3), num_batches=1)[0]
    ours.model.eval()
    with torch.no_grad():
        assert torch.equal(ours.model(batch)[1], plain(batch)[1])


def test_a_collection_alone_and_column_shards() -> None:
    for setting in (SETTING, replace(SETTING, sharding_type="column_wise", min_partition=4)):
        ours = trained(setting)
        plain = to_stock(sharded(ours))
        assert type(plain) is EmbeddingBagCollection
        features = make_batches(replace(setting, seed=3), num_batches=1)[0].sparse_features
        ours.model.eval()
        with torch.no_grad():
            expected, found = sharded(ours)(features), plain(features)
            for name in plain.embedding_bag_configs():
                key = name.feature_names[0]
                assert torch.equal(expected[key], found[key]), key


def _check_two_ranks(rank: int, directory: str) -> None:
    for sharding_type in ("row_wise", "table_wise"):
        setting = replace(SETTING, sharding_type=sharding_type)
        ours = trained(setting, rank)
        plain = to_stock(ours.model)
        manager = CheckpointManager(Path(directory) / sharding_type)
        manager.save(1, ours.model)
        assert (plain is None) == (rank == 1)
        loaded = to_plain(setting)
        load_checkpoint(manager.path(1), {"model": loaded.state_dict()})
        for name, value in plain.state_dict().items() if rank == 0 else ():
            assert torch.equal(value, loaded.state_dict()[name]), name


def to_plain(setting: Setting) -> TinyModel:
    model = TinyModel(setting)
    model.to_empty(device="cpu")
    return model


@pytest.mark.dist
def test_two_ranks(tmp_path: Path) -> None:
    run_ranks(2, _check_two_ranks, str(tmp_path))


def test_checkpoint_into_an_unsharded_model(tmp_path: Path) -> None:
    ours = trained()
    manager = CheckpointManager(tmp_path)
    manager.save(1, ours.model, ours.optimizer)
    plain = to_plain(SETTING)
    load_checkpoint(manager.path(1), {"model": plain.state_dict()})
    for name, value in to_stock(ours.model).state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def full_weights(setting: Setting) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        f"t{i}": torch.rand(rows, dim, generator=generator)
        for i, (rows, dim) in enumerate(zip(setting.num_rows, setting.dims, strict=True))
    }


def check_warm_start(setting: Setting, directory: Path) -> None:
    setting = replace(setting, num_batches=15)
    weights = full_weights(setting)
    np.save(directory / "t0.npy", weights["t0"].numpy())
    save_file({f"sparse.{name}.weight": value for name, value in weights.items()}, directory / "all.safetensors")
    torch.save({f"ebc.embedding_bags.{name}.weight": value for name, value in weights.items()}, directory / "all.pt")
    sources: list[tuple[Any, list[str]]] = [
        ({"t0": directory / "t0.npy", "t2": weights["t2"].numpy()}, ["t0", "t2"]),
        (directory / "all.safetensors", ["t0", "t1", "t2"]),
        (str(directory / "all.pt"), ["t0", "t1", "t2"]),
        ({f"module.ebc.embedding_bags.{name}.weight": value for name, value in weights.items()}, ["t0", "t1", "t2"]),
    ]
    for source, names in sources:
        ours = trained(setting)  # rows of all tables sit in slots
        assert ours.num_victims > 0
        before = {name: value.clone() for name, value in to_stock(sharded(ours)).state_dict().items()}
        assert warm_start(ours.model, source) == names
        after = to_stock(sharded(ours)).state_dict()
        for name, expected in weights.items():
            key = f"embedding_bags.{name}.weight"
            assert torch.equal(after[key], expected if name in names else before[key]), name
        stock = Trainer(setting)
        stock.model.load_state_dict(ours.model.state_dict())
        stock.optimizer.load_state_dict(ours.optimizer.state_dict())
        batches = make_batches(setting)
        assert_same_outputs(stock.train_plain(batches), drain(ours.pipeline(), batches))


def test_warm_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_scratchpipe.checkpoint.warm_start.COPY_BYTES", 1000)
    check_warm_start(SETTING, tmp_path)
    check_warm_start(replace(SETTING, sharding_type="column_wise", min_partition=4), tmp_path)
    check_warm_start(replace(SETTING, fused_tables=("t1",)), tmp_path)


def test_warm_start_of_other_types() -> None:
    ours = Trainer.scratchpipe(SETTING)
    half = full_weights(SETTING)["t0"].half()
    warm_start(ours.model, {"t0": half})
    assert torch.equal(to_stock(sharded(ours)).state_dict()["embedding_bags.t0.weight"], half.float())


def test_warm_start_refuses_what_does_not_fit(tmp_path: Path) -> None:
    ours, untouched = Trainer.scratchpipe(SETTING), Trainer.scratchpipe(SETTING)
    np.save(tmp_path / "code.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "damaged.safetensors").write_bytes(b"xyz")
    weights = full_weights(SETTING)
    bad: list[tuple[Any, str]] = [
        ({"t9": weights["t0"]}, r"none of t9 is a table. Name them like tables \(t0, t1, t2\)"),
        ({"t0": weights["t0"], "t1": weights["t0"]}, r"table t1 is \(150, 8\), 't1' is \(200, 8\)"),
        ({"a.t0.weight": weights["t0"], "b.t0.weight": weights["t0"]}, "a.t0.weight, b.t0.weight are all called like"),
        ({"t0": tmp_path / "code.npy"}, r"code.npy for table t0 cannot be read as .npy"),
        ({"t0": tmp_path / "missing.npy"}, r"missing.npy for table t0 cannot be read"),
        ({"t0": [[1.0]]}, "list for table t0. Give real numbers"),
        ({"t0": weights["t0"].to(torch.complex64)}, "complex64 for table t0. Give real numbers"),
        (tmp_path / "damaged.safetensors", "damaged.safetensors cannot be read"),
        (tmp_path / "missing.pt", "missing.pt cannot be read"),
        (tmp_path / "table.bin", "no .safetensors file and no .pt file"),
    ]
    for source, message in bad:
        with pytest.raises(ConfigError, match=message):
            warm_start(ours.model, source)
    for left, right in zip(ours.model.state_dict().values(), untouched.model.state_dict().values(), strict=True):
        if not isinstance(left, torch.Tensor) or type(left) is not torch.Tensor:
            left, right = left.local_shards()[0].tensor, right.local_shards()[0].tensor
        assert torch.equal(left, right)


def _check_warm_start_by_rows(rank: int, directory: str) -> None:
    setting = replace(SETTING, sharding_type="row_wise", num_rows=(200, 150, 40))
    weights = full_weights(setting)
    path = Path(directory) / "t0.npy"
    if rank == 0:
        np.save(path, weights["t0"].numpy())
    torch.distributed.barrier()
    ours = trained(setting, rank)
    warm_start(ours.model, {"t0": path, "t1": weights["t1"]})
    plain = to_stock(sharded(ours))
    if rank == 0:
        for name in ("t0", "t1"):
            assert torch.equal(plain.state_dict()[f"embedding_bags.{name}.weight"], weights[name])


@pytest.mark.dist
def test_warm_start_of_row_blocks(tmp_path: Path) -> None:
    run_ranks(2, _check_warm_start_by_rows, str(tmp_path))


def test_plain_model_is_quantized_and_scripted() -> None:
    ours = trained()
    plain = to_stock(ours.model)
    features = make_batches(replace(SETTING, seed=3), num_batches=1)[0].sparse_features
    expected = plain.ebc(features).values()
    exact = {name: table.weight.clone() for name, table in plain.ebc.embedding_bags.items()}
    quantized = quantize_embeddings(plain, torch.qint8, inplace=False)
    assert "Quant" in type(quantized.ebc).__module__ or "quant" in type(quantized.ebc).__module__
    assert torch.allclose(quantized.ebc(features).values().float(), expected, atol=0.05)
    assert all(torch.equal(table.weight, exact[name]) for name, table in plain.ebc.embedding_bags.items())
    scripted = torch.jit.script(symbolic_trace(plain.ebc, leaf_modules=[]))
    assert torch.equal(scripted(features).values(), expected)
