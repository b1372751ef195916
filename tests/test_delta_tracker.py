# SPDX-License-Identifier: BSD-3-Clause
"""ScratchPipeDeltaTracker answers as TorchRec's tracker does of a stock model that trains the same."""

from dataclasses import replace

import pytest
import torch
from helpers import Setting, Trainer, drain, make_batches, run_ranks, with_optimizer
from torchrec.distributed.model_tracker.types import DeltaTrackerConfig, TrackingMode, UniqueRows
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_scratchpipe import CheckpointManager, ConfigError, ScratchPipeDeltaTracker
from torchrec_scratchpipe.core.changes import TrainedRows

SETTING = with_optimizer(Setting(num_batches=40, load_factor=0.3), RowWiseAdagrad)
SEQUENCES = replace(SETTING, is_pooled=False)
# Of several tables that are looked up together, TorchRec's tells of states of the first.
ONE_TABLE = replace(SETTING, num_rows=(200,), dims=(8,))
MODES = [
    (SETTING, TrackingMode.ID_ONLY),
    (ONE_TABLE, TrackingMode.ROWWISE_ADAGRAD),
    (ONE_TABLE, TrackingMode.MOMENTUM_DIFF),
    (SEQUENCES, TrackingMode.ID_ONLY),
    (SEQUENCES, TrackingMode.EMBEDDING),
    (replace(SETTING, features_per_table={1: ("f1", "g1")}), TrackingMode.ID_ONLY),
]


def check_equal(expected: dict[str, UniqueRows], actual: dict[str, UniqueRows]) -> None:
    assert sorted(name for name, rows in expected.items() if rows.ids.numel()) == sorted(actual)
    for name, rows in actual.items():
        ids, order = expected[name].ids.sort()
        assert torch.equal(ids, rows.ids), name
        states = expected[name].states
        assert (states is None) == (rows.states is None)
        if states is not None and rows.states is not None:
            assert torch.equal(states[order], rows.states), name


def compare(setting: Setting, mode: TrackingMode, rank: int = 0) -> None:
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    ours.copy_from(stock)
    config = DeltaTrackerConfig(tracking_mode=mode, consumers=["often", "seldom"])
    expected = stock.model.init_torchrec_delta_tracker(config)
    actual = ScratchPipeDeltaTracker(ours.model, ["often", "seldom"], mode)
    batches = make_batches(setting, rank=rank)
    for number, first in enumerate(range(0, len(batches), 8)):
        drain(ours.pipeline(), batches[first : first + 8])
        stock.train_plain(batches[first : first + 8])
        if mode is TrackingMode.ID_ONLY and number % 2:  # TorchRec compacts over what others have not read
            check_equal(expected.get_unique("seldom"), actual.get_unique("seldom"))
        check_equal(expected.get_unique("often"), actual.get_unique("often"))
    assert actual.get_unique("often") == {}
    assert ours.num_victims > 0


@pytest.mark.parametrize(("setting", "mode"), MODES)
def test_answers_are_those_of_torchrec(setting: Setting, mode: TrackingMode) -> None:
    compare(setting, mode)


def _compare_ranks(rank: int) -> None:
    for sharding in ("row_wise", "table_wise"):
        compare(
            replace(SETTING, num_rows=(200, 150, 40), sharding_type=sharding, num_batches=16),
            TrackingMode.ID_ONLY,
            rank,
        )


@pytest.mark.dist
def test_answers_on_two_ranks() -> None:
    run_ranks(2, _compare_ranks)


def test_momentum_last_is_of_the_last_lookup() -> None:
    """TorchRec's reads a buffer that is empty on a CPU; over our tables, it reads what that buffer means."""
    setting = with_optimizer(replace(SETTING, num_rows=(200,), dims=(8,)), torch.optim.Adagrad)
    one, other = Trainer.scratchpipe(setting), Trainer.scratchpipe(setting)
    config = DeltaTrackerConfig(tracking_mode=TrackingMode.MOMENTUM_LAST, consumers=["c"])
    expected = one.model.init_torchrec_delta_tracker(config)
    actual = ScratchPipeDeltaTracker(other.model, mode=TrackingMode.MOMENTUM_LAST)
    for first in (0, 10):
        batches = make_batches(setting)[first : first + 10]
        one.train_plain(batches)
        drain(other.pipeline(), batches)
        check_equal(expected.get_unique("c"), actual.get_unique())


def test_of_several_tables_each_row_is_told_of_its_own() -> None:
    """Weights of bags, too, which TorchRec's tracker refuses: it knows only what a lookup returns."""
    ours, before = Trainer.scratchpipe(SETTING), Trainer.scratchpipe(SETTING)
    modes = (TrackingMode.EMBEDDING, TrackingMode.MOMENTUM_DIFF)
    weights_tracker, states_tracker = (ScratchPipeDeltaTracker(ours.model, mode=mode) for mode in modes)
    batches = make_batches(SETTING)
    drain(ours.pipeline(), batches[:10])
    drain(before.pipeline(), batches[:10])
    weights_tracker.clear()
    states_tracker.clear()
    drain(ours.pipeline(), batches[10:20])
    weights, growths = weights_tracker.get_unique(), states_tracker.get_unique()
    (old_states, new_states) = (trainer.model.fused_optimizer.state_dict()["state"] for trainer in (before, ours))
    for table in SETTING.table_names:
        name = f"ebc.embedding_bags.{table}"
        ids = weights[name].ids
        old = before.model.state_dict()[f"{name}.weight"].local_shards()[0].tensor
        assert torch.equal(weights[name].states, old[ids])  # type: ignore[arg-type]
        key = f"{name}.weight"
        sums = [states[key][f"{table}.momentum1"].local_shards()[0].tensor for states in (old_states, new_states)]
        assert torch.equal(growths[name].states, sums[1][ids] - sums[0][ids])  # type: ignore[arg-type]
        assert float(growths[name].states.min()) > 0  # type: ignore[union-attr]


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ConfigError, match="no table of the model has a scratchpad"):
        ScratchPipeDeltaTracker(Trainer(SETTING).model)
    ours = Trainer.scratchpipe(with_optimizer(SETTING, torch.optim.Adagrad))
    with pytest.raises(ConfigError, match="needs an optimizer state of one number per row"):
        ScratchPipeDeltaTracker(ours.model, mode=TrackingMode.ROWWISE_ADAGRAD)
    ours = Trainer.scratchpipe(with_optimizer(SETTING, torch.optim.SGD))
    with pytest.raises(ConfigError, match="needs an optimizer state"):
        ScratchPipeDeltaTracker(ours.model, mode=TrackingMode.MOMENTUM_LAST)
    with pytest.raises(ConfigError, match="consumer 'x' is not known"):
        ScratchPipeDeltaTracker(ours.model).get_unique_ids("x")


def test_beside_a_delta_log(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Both are told of the same rows."""
    ours = Trainer.scratchpipe(SETTING)
    tracker, manager = ScratchPipeDeltaTracker(ours.model), CheckpointManager(tmp_path, delta_every=1)
    pipeline, batches = ours.pipeline(), make_batches(SETTING)
    iterator = iter(batches)
    for step in range(1, 6):
        pipeline.progress(iterator)
        manager.trained(step, ours.model, ours.optimizer)
        ids = tracker.get_unique_ids()
        for index, name in enumerate(SETTING.table_names):
            expected = batches[step - 1].sparse_features[SETTING.feature_names(index)[0]].values().unique()
            assert torch.equal(ids.get(f"ebc.embedding_bags.{name}", torch.empty(0, dtype=torch.int64)), expected)
    manager.wait()


def test_what_is_remembered_is_of_the_first_train() -> None:
    """A row that trains again is not remembered anew; one without a slot of this pool is left out."""
    part = torch.arange(6, dtype=torch.float32)[:, None]
    trained = TrainedRows(4, torch.device("cpu"), lambda parts, slots: parts[0].index_select(0, slots), is_first=True)
    for rows, slots in [([3, 1, 3, -1], [5, 2, 5, 0]), ([1, 0], [4, 1])]:
        indices = (torch.tensor(values, dtype=torch.int64) for values in (rows, slots))
        trained.will_train(*indices, [part])
    ids, values = trained.take()
    assert ids.tolist() == [0, 1, 3]
    assert values is not None
    assert values.view(-1).tolist() == [1.0, 2.0, 5.0]
    assert trained.take()[0].numel() == 0
