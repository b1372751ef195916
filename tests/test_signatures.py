# SPDX-License-Identifier: BSD-3-Clause
"""The signatures of TorchRec that this package overrides or calls from inside, as of the versions it supports.

A new TorchRec that changes one fails here, with the method's name, before it fails in training. And what a user calls
by position in TorchRec's classes can be called so in ours.
"""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_sharding import FusedKJTListSplitsAwaitable
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.mc_modules import ShardedManagedCollisionCollection
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

import torchrec_scratchpipe

ROOT = Path(__file__).parents[1]
# Parameter names in torchrec 1.8.0.
OVERRIDDEN = {
    "BaseBatchedEmbedding.forward": "self, features",
    "BaseBatchedEmbedding.named_parameters_by_table": "self",
    "BaseBatchedEmbedding.named_split_embedding_weights": "self, prefix, recurse, remove_duplicate",
    "BaseBatchedEmbedding.split_embedding_weights": "self",
    "BaseBatchedEmbeddingBag.forward": "self, features, vbe_output, vbe_output_offsets",
    "BaseBatchedEmbeddingBag.named_parameters_by_table": "self",
    "BaseBatchedEmbeddingBag.named_split_embedding_weights": "self, prefix, recurse, remove_duplicate",
    "BaseBatchedEmbeddingBag.split_embedding_weights": "self",
    "BaseEmbeddingSharder.__init__": "self, fused_params, qcomm_codecs_registry, sharded_module_order_overwrite",
    "BatchedFusedEmbedding.__init__": "self, config, pg, device",
    "BatchedFusedEmbedding.emb_module": "self",
    "BatchedFusedEmbedding.flush": "self",
    "BatchedFusedEmbedding.fused_optimizer": "self",
    "BatchedFusedEmbedding.named_buffers": "self, prefix, recurse, remove_duplicate",
    "BatchedFusedEmbedding.named_parameters": "self, prefix, recurse, remove_duplicate",
    "BatchedFusedEmbedding.purge": "self",
    "BatchedFusedEmbeddingBag.__init__": "self, config, pg, device, sharding_type, env",
    "BatchedFusedEmbeddingBag.emb_module": "self",
    "BatchedFusedEmbeddingBag.flush": "self",
    "BatchedFusedEmbeddingBag.fused_optimizer": "self",
    "BatchedFusedEmbeddingBag.named_buffers": "self, prefix, recurse, remove_duplicate",
    "BatchedFusedEmbeddingBag.named_parameters": "self, prefix, recurse, remove_duplicate",
    "BatchedFusedEmbeddingBag.purge": "self",
    "CacheStatistics.cacheability": "self",
    "CacheStatistics.expected_lookups": "self",
    "CacheStatistics.expected_miss_rate": "self, clf",
    "EmbeddingBagCollectionSharder.shard": "self, module, params, env, device, module_fqn",
    "EmbeddingBagCollectionSharder.sharded_module_type": "self",
    "EmbeddingCollectionSharder.__init__": "self, fused_params, qcomm_codecs_registry, use_index_dedup",
    "EmbeddingCollectionSharder.shard": "self, module, params, env, device, module_fqn",
    "EmbeddingCollectionSharder.sharded_module_type": "self",
    "EmbeddingShardingPlanner.__init__": "self, topology, batch_size, enumerator, storage_reservation, proposer, "
    "partitioner, performance_model, stats, constraints, debug, callbacks, timeout_seconds, plan_loader",
    "EmbeddingShardingPlanner.collective_plan": "self, module, sharders, pg",
    "EmbeddingShardingPlanner.plan": "self, module, sharders",
    "Enumerator.__init__": "self, topology, batch_size, constraints, estimator",
    "Enumerator.enumerate": "self, module, sharders",
    "Enumerator.populate_estimates": "self, sharding_options",
    "FusedOptimizerModule.fused_optimizer": "self",
    "GreedyPerfPartitioner.partition": "self, proposal, storage_constraint, hbm_per_device",
    "GroupedEmbeddingsLookup.__init__": "self, grouped_configs, pg, device, env",
    "GroupedEmbeddingsLookup._create_embedding_kernel": "self, config, pg, device, env",
    "GroupedEmbeddingsLookup.register_optim_state_tracker_fn": "self, record_fn",
    "GroupedPooledEmbeddingsLookup.__init__": "self, grouped_configs, device, pg, feature_processor, "
    "scale_weight_gradients, sharding_type, env",
    "GroupedPooledEmbeddingsLookup._create_embedding_kernel": "self, config, device, pg, sharding_type, env",
    "GroupedPooledEmbeddingsLookup._forward_with_vbe_merging": "self, features_by_group, device",
    "GroupedPooledEmbeddingsLookup.register_optim_state_tracker_fn": "self, record_fn",
    "ModelDeltaTracker.clear": "self, consumer",
    "ModelDeltaTracker.get_unique": "self, consumer, top_percentage, per_table_percentage, sorted_by_indices",
    "ModelDeltaTracker.get_unique_ids": "self, consumer",
    "ModelDeltaTracker.record_lookup": "self, kjt, states, emb_module, raw_ids",
    "PipelinedForward.__call__": "self, input, kwargs",
    "ShardedEmbeddingBagCollection.__init__": "self, module, table_name_to_parameter_sharding, env, fused_params, "
    "device, qcomm_codecs_registry, module_fqn, sharded_module_order_overwrite",
    "ShardedEmbeddingBagCollection._create_lookups": "self",
    "ShardedEmbeddingBagCollection._initialize_torch_state": "self, skip_registering",
    "ShardedEmbeddingBagCollection.compute": "self, ctx, dist_input",
    "ShardedEmbeddingBagCollection.compute_and_output_dist": "self, ctx, input",
    "ShardedEmbeddingBagCollection.create_context": "self",
    "ShardedEmbeddingBagCollection.input_dist": "self, ctx, features",
    "ShardedEmbeddingBagCollection.update_shards": "self, changed_sharding_params, env, device",
    "ShardedEmbeddingCollection.__init__": "self, module, table_name_to_parameter_sharding, env, fused_params, "
    "device, qcomm_codecs_registry, use_index_dedup, module_fqn",
    "ShardedEmbeddingCollection._create_lookups": "self",
    "ShardedEmbeddingCollection._initialize_torch_state": "self, skip_registering",
    "ShardedEmbeddingCollection.compute": "self, ctx, dist_input",
    "ShardedEmbeddingCollection.compute_and_output_dist": "self, ctx, input",
    "ShardedEmbeddingCollection.create_context": "self",
    "ShardedEmbeddingCollection.input_dist": "self, ctx, features",
    "ShardedEmbeddingModule.prefetch": "self, dist_input, forward_stream, ctx",
    "TableBatchedEmbeddingSlice.__deepcopy__": "self, memo",
    "TrainPipelineSparseDist.__init__": "self, model, optimizer, device, execute_all_batches, apply_jit, "
    "context_type, pipeline_postproc, custom_model_fwd, dmp_collection_sync_interval_batches, "
    "enqueue_batch_after_forward, enable_inplace_copy_batch, free_features_storage_early, clear_data_dist_inputs",
    "TrainPipelineSparseDist._backward": "self, losses",
    "TrainPipelineSparseDist._pipeline_model": "self, batch, context, pipelined_forward",
    "TrainPipelineSparseDist.attach": "self, model, sparse_dist",
    "TrainPipelineSparseDist.fill_pipeline": "self, dataloader_iter",
    "TrainPipelineSparseDist.progress": "self, dataloader_iter",
    "TrainPipelineSparseDist.reset": "self",
}
CALLED = {
    "BaseShardedManagedCollisionEmbeddingCollection._evict": "self, evictions_per_table",
    "BaseShardedManagedCollisionEmbeddingCollection.compute": "self, ctx, dist_input",
    "EmbeddingFusedOptimizer.__init__": "self, config, emb_module, pg, create_for_table, param_weight_for_table, "
    "embedding_weights_by_table, all_optimizer_states",
    "EmbeddingEnumerator._filter_compute_kernels": "self, name, allowed_compute_kernels, sharding_type",
    "EmbeddingEnumerator._filter_sharding_types": "self, name, allowed_sharding_types, sharder_key",
    "FusedKJTListSplitsAwaitable.__init__": "self, requests, contexts, pg",
    "GroupedPooledEmbeddingsLookup._forward": "self, features_by_group",
    "GroupedPooledEmbeddingsLookup._merge_variable_batch_embeddings": "self, embeddings, splits",
    "GroupedPooledEmbeddingsLookup._vbe_splits": "self, features_by_group",
    "ShardedManagedCollisionCollection.compute": "self, ctx, dist_input",
    "ShardedManagedCollisionCollection.evict": "self",
    "TrainPipelineSparseDist._init_pipelined_modules": "self, batch, context, pipelined_forward",
    "TrainPipelineSparseDist._set_module_context": "self, context",
    "TrainPipelineSparseDist._wait_for_batch": "self",
    "TrainPipelineSparseDist.dequeue_batch": "self",
    "TrainPipelineSparseDist.enqueue_batch": "self, dataloader_iter",
    "TrainPipelineSparseDist.sync_embeddings": "self, model, interval_batches, context",
    "TrainPipelineSparseDist.wait_sparse_data_dist": "self, context",
}
# Where an older version differs, torchrec 1.6.1.
OLDER = {
    "ShardedEmbeddingCollection._initialize_torch_state": "self",
    "TrainPipelineSparseDist.__init__": (
        "self, model, optimizer, device, execute_all_batches, apply_jit, context_type, pipeline_postproc, "
        "custom_model_fwd, dmp_collection_sync_interval_batches, enqueue_batch_after_forward, enable_inplace_copy_batch"
    ),
}
# Where a newer version differs, torchrec 1.9.2.
NEWER = {"TrainPipelineSparseDist.__init__": f"{OVERRIDDEN['TrainPipelineSparseDist.__init__']}, async_inplace_copy"}
CALLED_CLASSES = {
    kind.__name__: kind
    for kind in (
        BaseShardedManagedCollisionEmbeddingCollection,
        EmbeddingEnumerator,
        EmbeddingFusedOptimizer,
        FusedKJTListSplitsAwaitable,
        GroupedPooledEmbeddingsLookup,
        ShardedManagedCollisionCollection,
        TrainPipelineSparseDist,
    )
}


def own_classes() -> Iterator[type[Any]]:
    for info in pkgutil.walk_packages(torchrec_scratchpipe.__path__, "torchrec_scratchpipe."):
        if info.name.endswith("__main__"):  # runs when imported
            continue
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                yield value


def overridden_methods() -> dict[str, Any]:
    """What our classes, and the classes mixed into them, define and TorchRec's bases define too."""
    found = {}
    for kind in own_classes():
        for own in (base for base in kind.__mro__ if base.__module__.startswith("torchrec_scratchpipe.")):
            is_written_here = not hasattr(own, "__dataclass_fields__")
            for name, value in vars(own).items():
                if is_written_here and (inspect.isfunction(value) or isinstance(value, property)):
                    theirs = [
                        base for base in kind.__mro__ if base.__module__.startswith("torchrec.") and name in vars(base)
                    ]
                    if theirs:
                        method = vars(theirs[0])[name]
                        found[f"{theirs[0].__name__}.{name}"] = method.fget if isinstance(method, property) else method
    return found


def parameters_of(method: Any) -> str:
    return ", ".join(inspect.signature(inspect.unwrap(method)).parameters)


def test_every_method_that_is_overridden_is_pinned() -> None:
    assert sorted(overridden_methods()) == sorted(OVERRIDDEN)


@pytest.mark.parametrize("name", sorted(OVERRIDDEN))
def test_overridden_method_has_the_signature_that_is_overridden(name: str) -> None:
    actual = parameters_of(overridden_methods()[name])
    pinned = (OVERRIDDEN[name], OLDER.get(name), NEWER.get(name))
    assert actual in pinned, f"torchrec changed {name}, which we override: now ({actual})"


@pytest.mark.parametrize("name", sorted(CALLED))
def test_internal_method_has_the_signature_that_is_called(name: str) -> None:
    class_name, method_name = name.split(".")
    actual = parameters_of(getattr(CALLED_CLASSES[class_name], method_name))
    assert actual in (CALLED[name], OLDER.get(name)), f"torchrec changed {name}, which we call: now ({actual})"


def test_control_a_changed_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainPipelineSparseDist, "attach", lambda self, model, eager: None)
    with pytest.raises(
        AssertionError, match=r"torchrec changed TrainPipelineSparseDist.attach.*\(self, model, eager\)"
    ):
        test_overridden_method_has_the_signature_that_is_overridden("TrainPipelineSparseDist.attach")


# The planner is compared in test_sharding_planner.py; the enumerator wraps another, and nobody else makes one.
NOT_COMPARED = {"ScratchPipeShardingPlanner", "ScratchpadEnumerator"}
POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD


def stand_ins() -> list[tuple[type[Any], type[Any]]]:
    """Each class of ours that takes the place of one of TorchRec's, with the one whose constructor a user knows."""
    found = []
    for kind in own_classes():
        theirs = [base for base in kind.__mro__ if base.__module__.startswith("torchrec.") and "__init__" in vars(base)]
        if theirs and not kind.__name__.startswith("_") and kind.__name__ not in NOT_COMPARED:
            found.append((kind, theirs[0]))
    return found


def constructor_parameters(kind: type[Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(inspect.unwrap(kind.__init__)).parameters.values())


def test_there_are_classes_to_compare() -> None:
    names = {ours.__name__ for ours, _ in stand_ins()}
    assert names >= {
        "ScratchPipeEmbeddingBagCollectionSharder",
        "ScratchPipeEmbeddingCollectionSharder",
        "ScratchPipeTrainPipeline",
        "ScratchPipeTrainPipelineContext",
        "ShardedScratchPipeEmbeddingBagCollection",
        "ShardedScratchPipeEmbeddingCollection",
    }


@pytest.mark.parametrize(("ours", "stock"), stand_ins(), ids=lambda kind: kind.__name__)
def test_constructor_takes_stock_arguments_in_stock_order(ours: type[Any], stock: type[Any]) -> None:
    theirs, own = constructor_parameters(stock), constructor_parameters(ours)
    own_names = {parameter.name for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert not own_names & {parameter.name for parameter in theirs}, "what is stock's can be given by position"
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in own):  # hands them on as they come
        assert [str(parameter) for parameter in own if parameter.name not in own_names] == [
            "self",
            "*args: Any",
            "**kwargs: Any",
        ]
        return
    by_position = [parameter for parameter in own if parameter.kind is POSITIONAL]
    for expected, actual in zip(theirs, by_position, strict=False):
        assert expected.name == actual.name
        assert expected.default == actual.default, expected.name
    newer = NEWER.get(f"{stock.__name__}.__init__", "").split(", ")
    beyond = [parameter.name for parameter in by_position[len(theirs) :]]
    assert len(by_position) >= len(theirs)
    assert beyond == (newer[len(theirs) :] if beyond else []), "ours are by keyword only"


@pytest.mark.parametrize(("ours", "stock"), stand_ins(), ids=lambda kind: kind.__name__)
def test_constructor_hides_nothing_but_what_it_hands_on(ours: type[Any], stock: type[Any]) -> None:
    kinds = {parameter.kind for parameter in constructor_parameters(ours)}
    has_rest = inspect.Parameter.VAR_KEYWORD in kinds
    assert has_rest == (inspect.Parameter.VAR_POSITIONAL in kinds), "keywords that no signature shows"


USER = """
from collections.abc import Iterator
import torch
from torchrec_scratchpipe import ScratchPipeTrainPipeline

def forward(batch: str | None) -> tuple[torch.Tensor, float]:
    raise NotImplementedError

def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[str]) -> None:
    cpu = torch.device("cpu")
    plain = ScratchPipeTrainPipeline(model, optimizer, cpu, lookahead=3)
    plain.progress(batches)
    typed = ScratchPipeTrainPipeline[str, int](model, optimizer, cpu)
    reveal_type(typed.progress(batches))
    reveal_type(ScratchPipeTrainPipeline(model, optimizer, cpu, custom_model_fwd=forward).progress(batches))
    typed.progress(iter([3]))
"""

AS_STRICT_AS_CAN_BE = """
[[tool.mypy.overrides]]
module = "user"
disallow_subclassing_any = true
disallow_untyped_calls = true
warn_return_any = true
warn_unused_ignores = true
"""


def test_pipeline_is_typed_for_a_user_and_asks_for_no_annotation(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    # With the settings and the cache of `make check`, or to check torch would take most of the time.
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + AS_STRICT_AS_CAN_BE)
    cache = f"--cache-dir={ROOT / '.mypy_cache'}"
    command = [cache, f"--python-executable={sys.executable}", "--config-file=pyproject.toml", "user.py"]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", *command],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.stderr == ""
    assert [line.split(": ", 1)[1] for line in checked.stdout.splitlines()] == [
        'note: Revealed type is "int"',
        'note: Revealed type is "float"',
        'error: List item 0 has incompatible type "int"; expected "str"  [list-item]',
    ]
