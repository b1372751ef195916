# SPDX-License-Identifier: BSD-3-Clause
"""A user's own enumerator does the work, and the plans are those of the planner without it."""

from typing import Any

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embedding_types import ShardingType
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import CacheParams, ShardingPlan

from torchrec_scratchpipe import (
    MeasurementError,
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeShardingPlanner,
    zipf_working_sets,
)

SHARDERS: list[Any] = [ScratchPipeEmbeddingBagCollectionSharder()]
SIZES = (40_000, 10_000, 500, 3)
IN_SLOTS = ["fused_uvm_caching"]
BATCH_SIZE = 1024
CONSTRAINTS: dict[str, dict[str, ParameterConstraints] | None] = {
    "none": None,
    "load_factor": {
        "t0": ParameterConstraints(compute_kernels=IN_SLOTS, cache_params=CacheParams(load_factor=0.2)),
        "t1": ParameterConstraints(compute_kernels=["fused"], sharding_types=["column_wise"]),
    },
    "row_wise": {
        "t0": ParameterConstraints(compute_kernels=IN_SLOTS, sharding_types=["row_wise"]),
        "t1": ParameterConstraints(compute_kernels=[*IN_SLOTS, "fused"], sharding_types=["table_wise"]),
        "t2": ParameterConstraints(sharding_types=["data_parallel"]),
    },
}


def bags() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=f"t{i}", num_embeddings=size, embedding_dim=16, feature_names=[f"f{i}"])
            for i, size in enumerate(SIZES)
        ],
        device=torch.device("meta"),
    )


def topology(device: str, world_size: int = 2) -> Topology:
    return Topology(world_size=world_size, compute_device=device, hbm_cap=2_700_000, ddr_cap=10**10)


def planner(device: str, *, has_sets: bool, world_size: int = 2, **kwargs: Any) -> ScratchPipeShardingPlanner:
    if has_sets:
        tables = bags().embedding_bag_configs()
        ids = {table.name: BATCH_SIZE for table in tables}
        kwargs["working_sets"] = zipf_working_sets(tables, ids, 1.05, world_size=world_size, batch_size=BATCH_SIZE)
        kwargs["scratchpad_bytes"] = 2_700_000
    return ScratchPipeShardingPlanner(
        topology=topology(device, world_size),
        batch_size=BATCH_SIZE,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        debug=False,
        **kwargs,
    )


def tables_of(plan: ShardingPlan) -> dict[str, tuple[Any, ...]]:
    return {
        name: (
            table.sharding_type,
            table.compute_kernel,
            table.ranks,
            table.cache_params and table.cache_params.load_factor,
            repr(table.sharding_spec),
        )
        for name, table in plan.plan[""].items()
    }


class Counting(EmbeddingEnumerator):
    """Stock's, which knows how often it was used."""

    num_enumerated = 0
    num_estimated = 0

    def enumerate(self, module: Any, sharders: Any) -> list[ShardingOption]:
        self.num_enumerated += 1
        return list(super().enumerate(module, sharders))

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        self.num_estimated += 1
        super().populate_estimates(sharding_options)


class WithConstraintsOfItsOwn(EmbeddingEnumerator):
    """As TorchEasyRec's: the planner knows no constraints, and filters take other arguments than stock's."""

    def __init__(self, own: dict[str, ParameterConstraints], **kwargs: Any) -> None:
        self.own = own
        super().__init__(**kwargs)

    def enumerate(self, module: Any, sharders: Any) -> list[ShardingOption]:
        self._last_stored_module = None
        self._constraints = self.own
        try:
            return list(super().enumerate(module, sharders))
        finally:
            self._constraints = None

    def _filter_sharding_types(self, name: str, allowed: list[str], child_path: str = "", **kwargs: Any) -> list[str]:
        return list(super()._filter_sharding_types(name, allowed, **kwargs))

    def _filter_compute_kernels(
        self, name: str, allowed: list[str], sharding_type: str, child_path: str = "the bags"
    ) -> list[str]:
        assert child_path == "the bags"
        return list(super()._filter_compute_kernels(name, allowed, sharding_type))


class InterfaceAlone:
    """What TorchRec's planner calls and nothing else; no attribute can be set on it."""

    __slots__ = ("_inner",)

    def __init__(self, **kwargs: Any) -> None:
        self._inner = EmbeddingEnumerator(**kwargs)

    def enumerate(self, module: Any, sharders: Any) -> list[ShardingOption]:
        return list(self._inner.enumerate(module, sharders))

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        self._inner.populate_estimates(sharding_options)

    @property
    def last_stored_search_space(self) -> Any:
        return self._inner.last_stored_search_space


@pytest.mark.parametrize("constraints", CONSTRAINTS.values(), ids=CONSTRAINTS)
@pytest.mark.parametrize("has_sets", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plans_are_those_without_an_enumerator(device: str, has_sets: bool, constraints: Any) -> None:
    own = Counting(topology(device), BATCH_SIZE, constraints=constraints)
    without = planner(device, has_sets=has_sets, constraints=constraints)
    expected = tables_of(without.plan(bags(), SHARDERS))
    given = planner(device, has_sets=has_sets, constraints=constraints, enumerator=own)
    assert tables_of(given.plan(bags(), SHARDERS)) == expected
    assert str(given.report) == str(without.report)
    assert own.num_enumerated == 1
    assert own.num_estimated >= 1


@pytest.mark.parametrize("has_sets", [False, True])
def test_the_enumerator_is_left_as_it_was(has_sets: bool) -> None:
    own, model = EmbeddingEnumerator(topology("cpu"), BATCH_SIZE), bags()
    before = set(vars(own))
    ours = planner("cpu", has_sets=has_sets, enumerator=own)
    ours.plan(model, SHARDERS)
    assert set(vars(own)) == before
    assert own.last_stored_search_space
    assert ours.hash_planner_context_inputs_str()

    def stock(**kwargs: Any) -> EmbeddingShardingPlanner:
        return EmbeddingShardingPlanner(topology=topology("cpu"), batch_size=BATCH_SIZE, debug=False, **kwargs)

    expected = tables_of(stock().plan(model, SHARDERS))
    assert tables_of(stock(enumerator=own).plan(model, SHARDERS)) == expected


def test_an_enumerator_that_fails_gets_its_methods_back() -> None:
    class Failing(EmbeddingEnumerator):
        def enumerate(self, module: Any, sharders: Any) -> list[ShardingOption]:
            raise RuntimeError("no idea")

    own = Failing(topology("cpu"), BATCH_SIZE)
    before = set(vars(own))
    with pytest.raises(RuntimeError, match="no idea"):
        planner("cpu", has_sets=True, enumerator=own).plan(bags(), SHARDERS)
    assert set(vars(own)) == before


@pytest.mark.parametrize("has_sets", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_constraints_that_only_the_enumerator_knows_are_honoured(device: str, has_sets: bool) -> None:
    own = WithConstraintsOfItsOwn(
        {
            "t0": ParameterConstraints(compute_kernels=IN_SLOTS, sharding_types=["row_wise"]),
            "t1": ParameterConstraints(compute_kernels=["fused"]),
        },
        topology=topology(device),
        batch_size=BATCH_SIZE,
    )
    ours = planner(device, has_sets=has_sets, enumerator=own)
    tables = tables_of(ours.plan(bags(), SHARDERS))
    assert tables["t0"][:2] == (ShardingType.ROW_WISE.value, "fused_uvm_caching")
    assert tables["t1"][1] == "fused"
    if has_sets:
        assert ours.report is not None
        assert [table.name for table in ours.report.tables] == ["t0", "t2", "t3"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_enumerator_with_nothing_but_the_interface_is_taken(device: str) -> None:
    own: Any = InterfaceAlone(topology=topology(device), batch_size=BATCH_SIZE)
    without, given = (planner(device, has_sets=True, **kwargs) for kwargs in ({}, {"enumerator": own}))
    assert tables_of(given.plan(bags(), SHARDERS)) == tables_of(without.plan(bags(), SHARDERS))
    assert str(given.report) == str(without.report)
    assert given.hash_planner_context_inputs_str()


def test_an_enumerator_that_names_scratchpads_itself_is_taken_on_a_cpu() -> None:
    class Naming(InterfaceAlone):
        __slots__ = ()

        def enumerate(self, module: Any, sharders: Any) -> list[ShardingOption]:
            options = super().enumerate(module, sharders)
            for option in options:
                if option.name == "t0" and option.compute_kernel == "fused":
                    option.compute_kernel = "fused_uvm_caching"
            return options

    own: Any = Naming(topology=topology("cpu"), batch_size=BATCH_SIZE)
    tables = tables_of(planner("cpu", has_sets=False, enumerator=own).plan(bags(), SHARDERS))
    assert {name: table[1] for name, table in tables.items() if name != "t3"} == {
        "t0": "fused_uvm_caching",
        "t1": "fused",
        "t2": "fused",
    }


def test_a_table_that_only_the_enumerator_keeps_whole_needs_no_measurement() -> None:
    own_constraints = {"t3": ParameterConstraints(compute_kernels=["fused"])}
    measured = bags().embedding_bag_configs()[:3]
    sets = zipf_working_sets(measured, dict.fromkeys(("t0", "t1", "t2"), BATCH_SIZE), 1.05, batch_size=BATCH_SIZE)

    def plan(**kwargs: Any) -> ShardingPlan:
        return ScratchPipeShardingPlanner(
            topology=topology("cpu", 1), working_sets=sets, scratchpad_bytes=4_000_000, debug=False, **kwargs
        ).plan(bags(), SHARDERS)

    with pytest.raises(MeasurementError, match="table t3: working_sets say nothing of it"):
        plan()
    own = EmbeddingEnumerator(topology("cpu", 1), BATCH_SIZE, constraints=own_constraints)
    assert tables_of(plan(enumerator=own))["t3"][1] == "fused"
