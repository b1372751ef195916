# SPDX-License-Identifier: BSD-3-Clause
"""Sharded models whose rows the device plans and moves itself have stock's bits."""

import sys
from typing import Any

import pytest
import torch
from device_path import KINDS, device_path
from helpers import CPU, Setting, Trainer, check_equal, drain, make_batches, max_abs_diff, with_optimizer
from torch import Tensor

from torchrec_scratchpipe.core.slot_ops import Count
from torchrec_scratchpipe.core.storage import PageLockedStorage
from torchrec_scratchpipe.core.torch_ops import TorchOps
from torchrec_scratchpipe.core.triton_ops import TritonOps
from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.sharding.options import ScratchpadOptions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overlap", [False, True], ids=["sequential", "overlapped"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_same_bits_as_stock(optimizer: type[torch.optim.Optimizer], overlap: bool, kind: str) -> None:
    num_batches = 16 if kind == "triton" else 60  # interpreted, a batch takes a sixth of a second
    features = {0: ("a", "b"), 1: ("c",), 2: ("d",)}
    setting = Setting(features_per_table=features, dims=(4, 8, 8), num_batches=num_batches)
    with device_path(kind):
        ours = check_equal(with_optimizer(setting, optimizer), overlap=overlap)
    assert ours.num_victims > num_batches
    assert all(pool.host_table.is_device_accessible for pool in ours.model.module.ebc.pools)


@pytest.mark.parametrize("left_out", [None, "state", "writeback"])
def test_control_what_is_not_moved_is_noticed(left_out: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    move = TorchOps.move

    def move_some(self: TorchOps, source: Tensor, *args: Any) -> None:
        is_state, is_writeback = len(moved) % 2 == 1, args[-1] == Count.WRITEBACKS
        moved.append(source)
        if not ((left_out == "state" and is_state) or (left_out == "writeback" and is_writeback)):
            move(self, source, *args)

    moved: list[Tensor] = []
    monkeypatch.setattr(TorchOps, "move", move_some)
    setting = Setting(num_rows=(200,), dims=(8,))
    batches = make_batches(setting)
    with device_path("torch"):
        stock, ours = Trainer(setting), Trainer.scratchpipe(setting, overlap=False)
    ours.copy_from(stock)
    stock.train_plain(batches)
    drain(ours.pipeline(), batches)
    assert (max_abs_diff(stock, ours) == 0.0) == (left_out is None)
    assert ours.num_victims > 100


@pytest.mark.host_path
def test_how_a_device_is_served(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cuda, options = torch.device("cuda"), ScratchpadOptions()
    ops = options.make_slot_ops(cuda)
    assert isinstance(ops, TritonOps)
    assert isinstance(options.make_storage(ops), PageLockedStorage)
    assert not ScratchpadOptions(host_access="staged").make_storage(ops).is_device_accessible
    assert isinstance(options.make_slot_ops(CPU), TorchOps)
    assert not options.make_storage(TorchOps()).is_device_accessible
    monkeypatch.setitem(sys.modules, "torchrec_scratchpipe.core.triton_ops", None)
    without_triton = options.make_slot_ops(cuda)
    assert isinstance(without_triton, TorchOps)
    assert not options.make_storage(without_triton).is_device_accessible
    assert "Triton cannot be imported" in caplog.text
    with pytest.raises(ConfigError, match="host_access is 'magic', it must be one of direct, staged"):
        ScratchpadOptions(host_access="magic")
