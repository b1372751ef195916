# SPDX-License-Identifier: BSD-3-Clause
"""Bit equality with stock TorchRec: the oracle of everything else."""

import pytest
from helpers import Setting, Trainer, assert_same_bits, assert_same_outputs, drain, make_batches


@pytest.mark.parametrize("overlap", [False, True], ids=["sequential", "overlapped"])
@pytest.mark.parametrize("lookahead", [1, 2, 4])
def test_pipeline_equals_stock(lookahead: int, overlap: bool) -> None:
    setting = Setting()
    batches = make_batches(setting)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting, overlap=overlap)
    expected = stock.train_plain(batches)
    assert_same_outputs(expected, drain(ours.pipeline(lookahead), batches))
    assert_same_bits(stock, ours)
    assert ours.num_victims > 100
