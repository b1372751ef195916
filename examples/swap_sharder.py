# SPDX-License-Identifier: BSD-3-Clause
"""A TorchRec job, swapped to the scratchpad in four lines; run it with `python examples/swap_sharder.py`."""

import tempfile

import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.datasets.random import RandomRecDataset
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.types import CacheParams
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_scratchpipe import (
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeShardingPlanner,
    ScratchPipeTrainPipeline,
    scratchpad_stats,
)

FEATURES = ["user", "item", "shop"]
NUM_EMBEDDINGS = 20_000
BATCH_SIZE = 256


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=32, num_embeddings=NUM_EMBEDDINGS, feature_names=[name])
        for name in FEATURES
    ]
    model = DLRMTrain(
        DLRM(
            embedding_bag_collection=EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
            dense_in_features=13,
            dense_arch_layer_sizes=[64, 32],
            over_arch_layer_sizes=[64, 1],
        )
    )
    apply_optimizer_in_backward(torch.optim.Adagrad, model.model.sparse_arch.parameters(), {"lr": 0.05})

    # TorchRec's own words for "table in host memory, cache on the device".
    constraints = {
        table.name: ParameterConstraints(
            compute_kernels=["fused_uvm_caching"], cache_params=CacheParams(load_factor=0.2)
        )
        for table in tables
    }
    planner = ScratchPipeShardingPlanner(  # 1: was EmbeddingShardingPlanner
        topology=Topology(world_size=dist.get_world_size(), compute_device=device.type),
        batch_size=BATCH_SIZE,
        constraints=constraints,
    )
    sharders = [ScratchPipeEmbeddingBagCollectionSharder()]  # 2: was EmbeddingBagCollectionSharder
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    model = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)  # 3: sharders=sharders
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())), lambda params: torch.optim.Adagrad(params, 0.05)
    )
    optimizer = CombinedOptimizer([model.fused_optimizer, dense])
    pipeline = ScratchPipeTrainPipeline(model, optimizer, device, lookahead=2)  # 4: was TrainPipelineSparseDist

    batches = iter(
        RandomRecDataset(
            keys=FEATURES, batch_size=BATCH_SIZE, hash_size=NUM_EMBEDDINGS, ids_per_feature=4, num_dense=13,
            num_batches=50, manual_seed=0,
        )
    )  # fmt: skip
    for step in range(50):
        loss, _, _ = pipeline.progress(batches)
        if step % 10 == 9:
            print(f"step {step + 1}: loss {float(loss):.4f}")
    for stats in scratchpad_stats(model):
        print(
            f"{stats.num_slots:,} slots for {stats.num_rows:,} rows: {stats.num_unique_misses:,} rows fetched, "
            f"{stats.num_victims:,} evicted, {stats.num_misses_at_train} missing at Train"
        )


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", init_method=f"file://{store.name}", rank=0, world_size=1
        )
        main()
        dist.destroy_process_group()
