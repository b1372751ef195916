# SPDX-License-Identifier: BSD-3-Clause
"""The cases, by name: a grid over sharding type, optimizer, pooling and ranks, then one change at a time."""

from collections.abc import Iterator
from dataclasses import replace

from .case import Case

__all__ = ["CASES", "QUICK"]

SHORT = {
    "tw": "table_wise",
    "rw": "row_wise",
    "cw": "column_wise",
    "twcw": "table_column_wise",
    "twrw": "table_row_wise",
    "grid": "grid_shard",
}
TWO_LEVEL = ("twrw", "grid")  # over hosts, then within one
OPTIMIZERS = ("fused_sgd", "sgd", "adagrad", "rowwise_adagrad")


def _base(kind: str, world_size: int = 2) -> Case:
    is_two_level = kind in TWO_LEVEL
    return Case(
        name=f"{kind}-{4 if is_two_level else world_size}ranks",
        sharding_type=SHORT[kind],
        world_size=4 if is_two_level else world_size,
        local_size=2 if is_two_level else None,
        min_partition=4 if kind in ("cw", "twcw", "grid") else None,
    )


def _comparable(case: Case) -> Case:
    """Row-wise Adagrad keeps a state per row of a column shard: only whole rows train as the unsharded model does."""
    return replace(case, min_partition=None) if case.optimizer == "rowwise_adagrad" else case


def _grid() -> Iterator[Case]:
    for kind in SHORT:
        for world_size in (4,) if kind in TWO_LEVEL else (2, 4):
            for optimizer in OPTIMIZERS:
                for pooling in ("SUM", "MEAN"):
                    base = _base(kind, world_size)
                    name = f"{base.name}-{optimizer}-{pooling.lower()}"
                    case = replace(base, name=name, optimizer=optimizer, pooling=pooling)
                    yield replace(_comparable(case), may_refuse=kind == "grid" and pooling == "MEAN")
    for kind in ("cw", "twcw"):
        base = _base(kind)
        yield replace(base, name=f"{base.name}-rowwise_adagrad-split_rows", optimizer="rowwise_adagrad")


def _input_and_communication() -> Iterator[Case]:
    for kind in SHORT:
        base = _base(kind)
        yield replace(base, name=f"{base.name}-unweighted", has_weighted_tables=False, optimizer="adagrad")
        yield replace(base, name=f"{base.name}-variable_batch_size", variable_batch_size=True)
        yield replace(base, name=f"{base.name}-zero_batch_size", allow_zero_batch_size=True, must_evict=False)
        yield replace(base, name=f"{base.name}-offsets", use_offsets=True)
        yield replace(base, name=f"{base.name}-int32", use_offsets=True, index_dtype="int32")
        fast = replace(base, optimizer="sgd_fast")
        yield replace(fast, name=f"{base.name}-qcomms_fp16_bf16", qcomms=("fp16", "bf16"))
        yield replace(fast, name=f"{base.name}-qcomms_bf16_fp16", qcomms=("bf16", "fp16"))
        yield replace(fast, name=f"{base.name}-fp16", data_type="FP16")
        yield replace(fast, name=f"{base.name}-fp16-unweighted", data_type="FP16", has_weighted_tables=False)
        yield replace(base, name=f"{base.name}-mixed_kernels", mixed_kernels=True)
        yield replace(base, name=f"{base.name}-mixed_kernels-adagrad", mixed_kernels=True, optimizer="adagrad")
    for kind in ("cw", "twcw"):
        base = replace(_base(kind, 4), min_partition=8)
        yield replace(base, name=f"{base.name}-partition8", may_refuse=True)
        yield replace(base, name=f"{base.name}-partition8-unweighted", has_weighted_tables=False)


def _variable_batch_per_feature() -> Iterator[Case]:
    for kind in ("tw", "cw", "twcw"):
        for world_size in (2, 4):
            base = replace(_base(kind, world_size), variable_batch_per_feature=True, has_weighted_tables=False)
            for is_constant in (False, True):
                for pooling in ("SUM", "MEAN"):
                    name = f"{base.name}-vbe{'-constant' if is_constant else ''}-{pooling.lower()}"
                    yield replace(base, name=name, global_constant_batch=is_constant, pooling=pooling)
            rowwise = replace(base, name=f"{base.name}-vbe-rowwise_adagrad", optimizer="rowwise_adagrad")
            yield _comparable(rowwise)
            yield replace(base, name=f"{base.name}-vbe-mixed_kernels", mixed_kernels=True)
    yield replace(base, name=f"{base.name}-vbe-adagrad", optimizer="adagrad")
    # Between ranks, stock's reductions of batches of different sizes do not work with gloo.
    for kind in ("rw", "twrw", "grid"):
        several = replace(_base(kind), variable_batch_per_feature=True, has_weighted_tables=False)
        yield replace(several, name=f"{several.name}-vbe")
        one = replace(several, world_size=1, local_size=None)
        yield replace(one, name=f"{kind}-1rank-vbe-sum")
        yield replace(one, name=f"{kind}-1rank-vbe-mean", pooling="MEAN", may_refuse=kind == "grid")
        yield _comparable(replace(one, name=f"{kind}-1rank-vbe-rowwise_adagrad", optimizer="rowwise_adagrad"))


def _pipelined() -> Iterator[Case]:
    for kind in SHORT:
        for world_size in (4,) if kind in TWO_LEVEL else (2, 4):
            for optimizer in ("fused_sgd", "adagrad", "rowwise_adagrad"):
                base = _base(kind, world_size)
                case = replace(base, name=f"{base.name}-pipeline-{optimizer}", is_pipelined=True, optimizer=optimizer)
                yield _comparable(case)


def _dynamic_sharding() -> Iterator[Case]:
    for world_size in (2, 4):
        for optimizer in ("fused_sgd", "adagrad", "rowwise_adagrad"):
            # The suite compares two scratchpads, which lose alike, after two steps.
            base = replace(_base("tw", world_size), test="dynamic_sharding", has_weighted_tables=False, can_tell=False)
            yield replace(base, name=f"{base.name}-reshard-{optimizer}", optimizer=optimizer)
    base = replace(_base("cw"), test="dynamic_sharding", has_weighted_tables=False)
    yield replace(base, name=f"{base.name}-reshard")


def _fresh_and_trained(base: Case, name: str) -> Iterator[Case]:
    """The suite compares two models alike, which lose alike; a stock model on either side can tell."""
    case = replace(base, test=f"test_{name.split('-')[-1]}", can_tell=False)
    yield replace(case, name=f"{name}-fresh", is_training=False)
    yield replace(case, name=f"{name}-trained", is_training=True)
    yield from _with_stock(replace(base, is_training=True), f"{name}-trained")


def _with_stock(base: Case, name: str) -> Iterator[Case]:
    test = f"test_{name.removesuffix('-trained').split('-')[-1]}"
    if base.is_training is None:
        yield replace(base, name=name, test=test, can_tell=False)
    yield replace(base, name=f"{name}-from_stock", test=test, stock_twin=0)
    yield replace(base, name=f"{name}-to_stock", test=test, stock_twin=1)


def _one_rank() -> Iterator[Case]:
    for kind in ("tw", "rw", "cw", "twcw", "twrw"):
        base = Case("", sharding_type=SHORT[kind], world_size=1)
        yield from _fresh_and_trained(base, f"{kind}-1rank-load_state_dict")
        yield from _fresh_and_trained(base, f"{kind}-1rank-load_state_dict_prefix")
        yield from _with_stock(replace(base, optimizer="rowwise_adagrad"), f"{kind}-1rank-optimizer_load_state_dict")
        for is_training in (False, True):
            yield replace(
                base,
                name=f"{kind}-1rank-numerical_equivalence-{'trained' if is_training else 'fresh'}",
                test="test_numerical_equivalence_between_kernel_types",
                is_training=is_training,
                stochastic_rounding=False,
                can_tell=is_training,
            )
        yield replace(base, name=f"{kind}-1rank-params_and_buffers", test="test_params_and_buffers", must_evict=False)
    base = Case("", sharding_type="column_wise", world_size=1, optimizer="rowwise_adagrad")
    yield from _fresh_and_trained(base, "cw-1rank-load_state_dict_cw_multiple_shards")
    base = Case("", sharding_type="data_parallel", world_size=1, must_evict=False)
    for is_training in (False, True):
        name = f"dp-1rank-load_state_dict_dp-{'trained' if is_training else 'fresh'}"
        yield replace(base, name=name, test="test_load_state_dict_dp", is_training=is_training)
    yield Case(
        "tw-1rank-rowwise_adagrad_numerical_equivalence",
        test="test_rowwise_adagrad_numerical_equivalence",
        world_size=1,
    )
    for test in (
        "parameter_init",
        "meta_device_dmp_state_dict",
        "sharding_ebc_as_top_level",
        "sharding_fused_ebc_as_top_level",
        "sharding_ebc_input_validation_enabled",
        "sharding_ebc_validate_input_only_once",
        "initialize_torch_state_error_includes_table_name",
    ):
        yield Case(f"tw-1rank-{test}", test=f"test_{test}", world_size=1, must_evict=False, may_refuse="meta" in test)


CASES: tuple[Case, ...] = (
    *_grid(),
    *_input_and_communication(),
    *_variable_batch_per_feature(),
    *_pipelined(),
    *_dynamic_sharding(),
    *_one_rank(),
)

QUICK = (
    "tw-2ranks-fused_sgd-sum",
    "rw-2ranks-rowwise_adagrad-mean",
    "cw-2ranks-adagrad-sum",
    "twcw-2ranks-pipeline-adagrad",
    "rw-4ranks-pipeline-rowwise_adagrad",
    "tw-2ranks-qcomms_fp16_bf16",
    "cw-2ranks-mixed_kernels",
    "tw-1rank-load_state_dict-trained-from_stock",
    "rw-1rank-optimizer_load_state_dict-to_stock",
)
