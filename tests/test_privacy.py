# SPDX-License-Identifier: BSD-3-Clause
"""Private training: lazy noise is eager noise, whatever was evicted, planned ahead, sharded or resumed."""

from dataclasses import dataclass, replace
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
    make_bags,
    make_batches,
    make_embeddings,
)
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from torchrec_scratchpipe import LazyDP
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


def round_weights(trainer: Trainer) -> None:
    state = trainer.model.state_dict()
    for value in state.values():
        for shard in value.local_shards() if hasattr(value, "local_shards") else []:
            shard.tensor.copy_((shard.tensor * 64).round() / 64)
    trainer.model.load_state_dict(state)


def pools_of(trainer: Trainer) -> list[Any]:
    return [pool for collection in scratchpad_collections(trainer.model) for pool in collection.pools]


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
    round_weights(trainer)
    pipeline = trainer.pipeline(lookahead, privacy=privacy)
    if is_eager:
        pipeline.register_progress_hook(lambda _batch: trainer.model.state_dict() and None)
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
