# SPDX-License-Identifier: BSD-3-Clause
"""TorchRec's suite, importable, with longer tables and more batches so that scratchpads have to evict.

The suite's model, input, sharded run and comparison stay its own. What is added:

* Tables are `ROW_FACTOR` times longer. The suite's have 10 to 40 rows, which one batch touches nearly all of.
* Its single training step becomes one step per batch, for the sharded model and for the suite's unsharded one alike:
  the suite's batch, others that push its rows out, and the suite's batch again. A forward over the others comes
  before the prediction that the suite compares.
* The suite's unsharded weighted tables lose their in-backward optimizer when it casts them; they get it back.
* All table weights are compared too, which shows more than a prediction does.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.test_utils import test_model_parallel_base, test_sharding
from torchrec.distributed.test_utils.test_model_parallel import ModelParallelTestShared
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from .case import Case

__all__ = ["ROW_FACTOR", "MoreBatches", "ShardingSuite", "SparseOnlySuite", "StateDictSuite", "qcomms_config"]

ROW_FACTOR = 50
NUM_MORE_BATCHES = 2
NUM_MORE_BATCHES_VBE = 5  # they have a fifth of the ids
# Stock's own largest differences: 0 with SGD, 1.4e-6 with Adagrad, 5e-4 with FP16 tables or quantized communication.
MAX_WEIGHT_ERROR = {"fused_sgd": 1e-7, "sgd": 1e-7, "sgd_fast": 1e-5, "adagrad": 5e-6, "rowwise_adagrad": 5e-6}
MAX_WEIGHT_ERROR_LOOSE = 1e-3

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd_fast": (torch.optim.SGD, {"lr": 10.0}),  # moves weights further than FP16 rounds them
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05, "eps": 1e-8}),
    "rowwise_adagrad": (RowWiseAdagrad, {"lr": 0.05, "eps": 1e-8}),
}
DTYPES = {"int64": torch.int64, "int32": torch.int32}


def qcomms_config(case: Case) -> QCommsConfig | None:
    if case.qcomms is None:
        return None
    forward, backward = (CommType(precision) for precision in case.qcomms)
    return QCommsConfig(forward_precision=forward, backward_precision=backward)


class MoreBatches:
    """Stands in for two functions of the suite: more batches are made, and models train on all of them."""

    def __init__(self, case: Case, rank: int, make_pipeline: Any) -> None:
        self._rank = rank
        self._optimizer = OPTIMIZERS.get(case.optimizer)
        self._alter_dtype = test_sharding.alter_global_ebc_dtype
        self._num_batches = NUM_MORE_BATCHES_VBE if case.variable_batch_per_feature else NUM_MORE_BATCHES
        self._make_pipeline = make_pipeline if case.is_pipelined else None
        is_loose = case.qcomms is not None or case.data_type != "FP32"
        self._max_error = MAX_WEIGHT_ERROR_LOOSE if is_loose else MAX_WEIGHT_ERROR[case.optimizer]
        self._generate = test_sharding.gen_model_and_input
        self._step = test_sharding.gen_full_pred_after_one_step
        self._more: list[Any] = []
        self._sharded: nn.Module | None = None

    def gen_model_and_input(self, **kwargs: Any) -> Any:
        generated = self._generate(**kwargs)
        for seed in range(1, self._num_batches + 1):
            _, inputs = self._generate(**{**kwargs, "num_inputs": 1, "random_seed": seed})
            self._more.append(inputs[0])
        return generated

    def alter_global_ebc_dtype(self, model: nn.Module) -> None:
        before = dict(model.named_parameters())
        self._alter_dtype(model)
        if self._optimizer is not None:
            optimizer_type, arguments = self._optimizer
            cast = [parameter for name, parameter in model.named_parameters() if parameter is not before[name]]
            _apply_optimizer_in_backward(optimizer_type, cast, dict(arguments))

    def gen_full_pred_after_one_step(
        self, model: nn.Module, opt: torch.optim.Optimizer, input: Any, skip_inference: bool = False
    ) -> torch.Tensor:
        is_sharded = isinstance(model, DistributedModelParallel)
        more = [batch[1][self._rank] if is_sharded else batch[0] for batch in self._more]
        self._train(model, opt, [input, *more, input])
        if skip_inference:
            return torch.empty(0)
        with torch.no_grad():
            for batch in more:
                self._step(model, opt, batch, skip_training=True)
            prediction = self._step(model, opt, input, skip_training=True)
        if is_sharded:
            self._sharded = model
        elif self._sharded is not None:
            self._compare_weights(model)
        return prediction

    def _train(self, model: nn.Module, opt: torch.optim.Optimizer, batches: list[Any]) -> None:
        if self._make_pipeline is None or not isinstance(model, DistributedModelParallel):
            for batch in batches:
                self._step(model, opt, batch, skip_inference=True)
            return
        model.train()
        pipeline = self._make_pipeline(model, opt, torch.device("cpu"))
        iterator = iter(batches)
        for _ in batches:
            pipeline.progress(iterator)
        pipeline.detach()

    def _compare_weights(self, model: nn.Module) -> None:
        assert self._sharded is not None
        expected = model.state_dict()
        num_tables = 0
        for name, tensor in self._sharded.state_dict().items():
            if not isinstance(tensor, ShardedTensor):
                continue
            num_tables += 1
            for shard in tensor.local_shards():
                (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                block = expected[name][row : row + rows, column : column + columns]
                torch.testing.assert_close(
                    shard.tensor,
                    block.to(shard.tensor.dtype),
                    rtol=self._max_error,
                    atol=self._max_error,
                    msg=lambda m, n=name: f"{n}: {m}",
                )
        assert num_tables > 0, "no table was compared"


class ShardingSuite(ModelParallelTestShared):
    """The suite's sharding tests, of which this process runs its own rank."""

    def __init__(self, case: Case, rank: int, make_sharder: Any) -> None:
        super().__init__("_test_sharding")
        self._case = case
        self._rank = rank
        self._make_sharder = make_sharder

    def run_case(self) -> None:
        case = self._case
        common: dict[str, Any] = {
            "backend": "gloo",
            "world_size": case.world_size,
            "local_size": case.local_size,
            "qcomms_config": qcomms_config(case),
            "apply_optimizer_in_backward_config": self._optimizer_config(),
            "variable_batch_size": case.variable_batch_size,
            "variable_batch_per_feature": case.variable_batch_per_feature,
            "global_constant_batch": case.global_constant_batch,
            "has_weighted_tables": case.has_weighted_tables,
            "pooling": PoolingType[case.pooling],
            "data_type": DataType[case.data_type],
            "allow_zero_batch_size": case.allow_zero_batch_size,
            "use_offsets": case.use_offsets,
            "indices_dtype": DTYPES[case.index_dtype],
            "offsets_dtype": DTYPES[case.index_dtype],
            "lengths_dtype": DTYPES[case.index_dtype],
        }
        sharders = [self._make_sharder(case.sharding_type)]
        if case.test == "dynamic_sharding":
            self._test_dynamic_sharding(sharders, sharding_type=ShardingType(case.sharding_type), **common)
        else:
            self._test_sharding(sharders, constraints=self._constraints(), **common)

    def _build_tables_and_groups(self, data_type: DataType = DataType.FP32) -> None:
        super()._build_tables_and_groups(data_type)
        _lengthen(self.tables + self.mean_tables + self.weighted_tables)

    def _run_multi_process_test(self, *, callable: Any, world_size: int = 2, **kwargs: Any) -> None:
        callable(rank=self._rank, world_size=world_size, **kwargs)

    def _optimizer_config(self) -> Any:
        if self._case.optimizer == "fused_sgd":
            return None
        optimizer_type, arguments = OPTIMIZERS[self._case.optimizer]
        return {"embedding_bags": (optimizer_type, dict(arguments))}  # TorchRec renames the arguments in place

    def _constraints(self) -> dict[str, ParameterConstraints]:
        case = self._case
        names = [*self.table_names, *(f"weighted_table_{i}" for i in range(self.num_weighted_features))]
        return {
            name: ParameterConstraints(
                sharding_types=[case.sharding_type],
                min_partition=case.min_partition,
                compute_kernels=["fused"] if case.mixed_kernels and index % 2 == 0 else None,
            )
            for index, name in enumerate(names)
        }


def _lengthen(tables: list[Any]) -> None:
    for table in tables:
        table.num_embeddings *= ROW_FACTOR


class _OneRankSuite:
    """Runs one test of the suite's single-rank classes with given arguments instead of hypothesis' draws."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.test)  # type: ignore[call-arg]
        self._case = case

    def run_case(self) -> None:
        method = getattr(type(self), self._case.test)
        if not hasattr(method, "hypothesis"):
            method(self)
            return
        test = method.hypothesis.inner_test
        arguments = {
            "sharder_type": "embedding_bag_collection",
            "sharding_type": self._case.sharding_type,
            "kernel_type": kernel_of_test(self._case),
            "is_training": self._case.is_training,
            "stochastic_rounding": self._case.stochastic_rounding,
            "dtype": DataType[self._case.data_type],
        }
        wanted = test.__code__.co_varnames[1 : test.__code__.co_argcount]
        test(self, **{name: arguments[name] for name in wanted})


def kernel_of_test(case: Case) -> str:
    """What the suite calls the kernel that is swapped for the scratchpad."""
    if case.sharding_type == "data_parallel":
        return "dense"
    if case.test == "test_numerical_equivalence_between_kernel_types":
        return "fused_uvm_caching"
    return "fused"


class StateDictSuite(_OneRankSuite, test_model_parallel_base.ModelParallelStateDictBase):
    """The suite's state_dict and optimizer tests; it trains and evaluates on several batches."""

    backend = "gloo"

    def __init__(self, case: Case, make_stock_twin: Any) -> None:
        super().__init__(case)
        self._make_stock_twin = make_stock_twin

    def _generate_dmps_and_batch(self, sharders: Any = None, constraints: Any = None) -> Any:
        models, batch = super()._generate_dmps_and_batch(sharders, constraints)
        if self._case.stock_twin is not None:
            twins, batch = super()._generate_dmps_and_batch([self._make_stock_twin()], constraints)
            models[self._case.stock_twin] = twins[0]
        return models, batch

    def _create_tables(self) -> None:
        super()._create_tables()
        _lengthen(self.tables + self.weighted_tables)

    def _generate_batch(self) -> Any:
        self._more = [super(StateDictSuite, self)._generate_batch() for _ in range(NUM_MORE_BATCHES)]
        return super()._generate_batch()

    def _train_models(self, m1: nn.Module, m2: nn.Module, batch: Any) -> None:
        for each in [batch, *self._more, batch]:
            super()._train_models(m1, m2, each)

    def _eval_models(self, m1: nn.Module, m2: nn.Module, batch: Any, *args: Any, **kwargs: Any) -> None:
        for each in [*self._more, batch]:
            super()._eval_models(m1, m2, each, *args, **kwargs)


class SparseOnlySuite(_OneRankSuite, test_model_parallel_base.ModelParallelSparseOnlyBase):
    """The suite's tests of a collection without a model around it."""

    backend = "gloo"

    def __init__(self, case: Case, make_stock_twin: Any) -> None:
        super().__init__(case)
