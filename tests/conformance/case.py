# SPDX-License-Identifier: BSD-3-Clause
"""What one conformance case asks of TorchRec's suite, in plain values that travel to other processes."""

from dataclasses import dataclass
from enum import Enum

__all__ = ["Case", "Contender", "RankReport", "Result", "Verdict"]


class Contender(Enum):
    """Whose sharder and planner the suite gets."""

    SCRATCHPAD = "scratchpad"
    STOCK = "stock"
    NO_WRITEBACK = "a scratchpad that forgets its victims"
    NO_STATE = "a scratchpad that forgets optimizer states"


class Verdict(Enum):
    """What became of a case."""

    PASSED = "passed"
    REFUSED = "refused by design"
    STOCK_FAILS = "stock fails too"
    FAILED = "FAILED"


@dataclass(frozen=True)
class Case:
    """One case; the names of the fields are those of the suite where it has them.

    Args:
        name: Unique; `-k` looks for its parts.
        test: "sharding", "dynamic_sharding", or the name of a test of the suite's single-rank classes.
        sharding_type: TorchRec's value.
        world_size: Processes.
        local_size: Processes of one simulated host; None is all of them.
        optimizer: "fused_sgd" comes from fused_params, "sgd_fast" has a learning rate of 10; others but the first
            through apply_optimizer_in_backward.
        pooling: "SUM" or "MEAN".
        has_weighted_tables: Whether the model has weighted features too.
        variable_batch_per_feature: The suite's VBE input.
        global_constant_batch: As the suite's.
        variable_batch_size: Ranks bring different batch sizes.
        allow_zero_batch_size: As the suite's; it then compares nothing and only has to run.
        qcomms: Precisions of forward and backward communication.
        data_type: Of the tables.
        min_partition: Columns of a column shard.
        use_offsets: Offsets instead of lengths in the input.
        index_dtype: "int64" or "int32", of ids, lengths and offsets.
        is_pipelined: The sharded model trains through a train pipeline.
        mixed_kernels: Every second table keeps the stock kernel.
        is_training: Argument of some single-rank tests.
        stock_twin: Which of the two models of those tests is a stock one; None compares two alike.
        stochastic_rounding: Argument of one of them.
        must_evict: Passing without a single victim counts as failing.
        can_tell: The case must fail with a broken scratchpad. False where the suite compares a model with its twin,
            broken alike, or where nothing was trained that could be lost.
        may_refuse: A ConfigError of this package is an accepted answer.
    """

    name: str
    test: str = "sharding"
    sharding_type: str = "table_wise"
    world_size: int = 2
    local_size: int | None = None
    optimizer: str = "fused_sgd"
    pooling: str = "SUM"
    has_weighted_tables: bool = True
    variable_batch_per_feature: bool = False
    global_constant_batch: bool = False
    variable_batch_size: bool = False
    allow_zero_batch_size: bool = False
    qcomms: tuple[str, str] | None = None
    data_type: str = "FP32"
    min_partition: int | None = None
    use_offsets: bool = False
    index_dtype: str = "int64"
    is_pipelined: bool = False
    mixed_kernels: bool = False
    is_training: bool | None = None
    stock_twin: int | None = None
    stochastic_rounding: bool | None = None
    must_evict: bool = True
    can_tell: bool = True
    may_refuse: bool = False


@dataclass(frozen=True)
class RankReport:
    """How one process ended."""

    rank: int
    error: str | None = None
    error_type: str | None = None
    is_refusal: bool = False
    end_time_s: float = 0.0
    num_victims: int = 0
    num_misses_at_train: int = 0


@dataclass(frozen=True)
class Result:
    """One line of the table; `num_controls` counts broken scratchpads for which the case failed, as it must."""

    name: str
    verdict: Verdict
    reason: str
    num_victims: int
    seconds: float
    stock_error: str | None = None
    num_controls: int = 0
