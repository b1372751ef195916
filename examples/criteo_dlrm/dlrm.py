# SPDX-License-Identifier: BSD-3-Clause
"""The example's model and its optimizers."""

import argparse
from typing import Any

import torch
from arguments import numbers_of, rows_per_table
from data import FEATURE_NAMES, NUM_DENSE
from remapping import RemappedBags
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage


def make_dlrm(args: argparse.Namespace) -> DLRMTrain:
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"t_{feature}", embedding_dim=args.embedding_dim, num_embeddings=rows, feature_names=[feature]
            )
            for feature, rows in zip(FEATURE_NAMES, rows_per_table(args), strict=True)
        ],
        device=torch.device("meta"),
    )
    common: dict[str, Any] = {
        "embedding_bag_collection": collection if args.zch_size is None else RemappedBags(collection, args),
        "dense_in_features": NUM_DENSE,
        "dense_arch_layer_sizes": [*numbers_of(args.dense_arch_layer_sizes)[:-1], args.embedding_dim],
        "over_arch_layer_sizes": numbers_of(args.over_arch_layer_sizes),
    }
    if args.interaction_type == "dcn":
        return DLRMTrain(DLRM_DCN(**common, dcn_num_layers=args.dcn_num_layers, dcn_low_rank_dim=args.dcn_low_rank_dim))
    if args.interaction_type == "projection":
        branches = (args.interaction_branch1_layer_sizes, args.interaction_branch2_layer_sizes)
        # The projection multiplies both branches as matrices of embedding_dim columns.
        first, second = ([*numbers_of(branch)[:-1], 8 * args.embedding_dim] for branch in branches)
        return DLRMTrain(
            DLRM_Projection(**common, interaction_branch1_layer_sizes=first, interaction_branch2_layer_sizes=second)
        )
    return DLRMTrain(DLRM(**common))


def make_model(args: argparse.Namespace) -> DLRMTrain:
    """The unsharded model; its embedding tables know the optimizer that updates them in backward."""
    model = make_dlrm(args)
    optimizer_class = torch.optim.Adagrad if args.adagrad else torch.optim.SGD
    optimizer_kwargs = {"lr": args.learning_rate} | ({"eps": args.eps} if args.adagrad else {})
    apply_optimizer_in_backward(optimizer_class, model.model.sparse_arch.parameters(), optimizer_kwargs)
    return model


def make_optimizer(args: argparse.Namespace, model: DistributedModelParallel) -> KeyedOptimizer:
    dense_parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    dense = KeyedOptimizerWrapper(
        dense_parameters,
        lambda params: (
            torch.optim.Adagrad(params, lr=args.learning_rate, eps=args.eps)
            if args.adagrad
            else torch.optim.SGD(params, lr=args.learning_rate)
        ),
    )
    combined = CombinedOptimizer([model.fused_optimizer, dense])
    stages = []
    if args.lr_warmup_steps:
        stages.append(WarmupStage(policy=WarmupPolicy.LINEAR, max_iters=args.lr_warmup_steps, value=0.1))
    if args.lr_decay_steps:
        flat_steps = max(0, args.lr_decay_start - args.lr_warmup_steps)
        stages.append(WarmupStage(policy=WarmupPolicy.CONSTANT, max_iters=flat_steps, value=1.0))
        stages.append(WarmupStage(policy=WarmupPolicy.POLY, max_iters=args.lr_decay_steps, value=2.0))
    return WarmupOptimizer(combined, stages, lr=args.learning_rate) if stages else combined
