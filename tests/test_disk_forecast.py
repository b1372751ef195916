# SPDX-License-Identifier: BSD-3-Clause
"""What a plan expects of a disk comes true."""

from pathlib import Path

import pytest
import torch
from core_helpers import CPU, LAYOUT, make_pool, planned, train
from torchrec import EmbeddingBagConfig

from torchrec_scratchpipe.core.disk import MappedStorage, RamBudget
from torchrec_scratchpipe.core.row_log import Records
from torchrec_scratchpipe.core.row_tier import PLACE_BYTES
from torchrec_scratchpipe.core.runner import OverlappedStageRunner
from torchrec_scratchpipe.planning.working_set import zipf_working_sets


def test_rows_that_a_plan_expects_from_the_disk_are_those_that_come(tmp_path: Path) -> None:
    num_rows, num_ids, num_slots, num_places = 20_000, 512, 2_000, 4_000
    generator = torch.Generator().manual_seed(3)
    weights = 1 / torch.arange(1, num_rows + 1, dtype=torch.float64) ** 1.05
    batches = [torch.multinomial(weights, num_ids, replacement=True, generator=generator) for _ in range(600)]
    budget = RamBudget(num_places * (Records(LAYOUT).num_bytes + PLACE_BYTES))
    pool = make_pool(num_rows, num_slots, storage=MappedStorage(tmp_path, budget))
    before = pool.stats()
    runner = OverlappedStageRunner(CPU)
    for number, rows in enumerate(batches):
        if number == 400:
            before = pool.stats()
        batch = planned(pool, rows, runner)
        runner.submit(batch)
        train(pool.scratchpad.parts, runner.wait(batch))
        runner.release(batch, is_updated=True)
    after = pool.stats()
    counted = (after.num_disk_rows_read - before.num_disk_rows_read) / 200
    config = EmbeddingBagConfig(name="t0", num_embeddings=num_rows, embedding_dim=4, feature_names=["f0"])
    sets = zipf_working_sets([config], {"t0": num_ids}, 1.05, 2, 0, 1, num_ids)
    predicted = sets.misses(["t0"], num_slots + num_places, "lru")["t0"]
    assert counted == pytest.approx(predicted, rel=0.05)
    assert after.disk_bytes_written - before.disk_bytes_written < 200 * 1.6 * predicted * Records(LAYOUT).num_bytes
