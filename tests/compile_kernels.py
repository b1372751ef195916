# SPDX-License-Identifier: BSD-3-Clause
"""Compiles every Triton kernel for a GPU that need not be there; prints a JSON object: kernel, memory instructions.

The interpreter runs kernels as Python; this finds what only the compiler refuses, and shows how wide its loads are.
"""

import json
import re
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
CPU = torch.device("cpu")


class NoDriver:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU

    def is_active(self) -> bool:
        return True


def compile_all() -> dict[str, list[dict[str, int]]]:
    """Every operation of TritonOps, compiled and not launched."""
    instructions: dict[str, list[dict[str, int]]] = {}

    def compile_instead(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            ptx = kernel.warmup(*args, grid=grid, **kwargs).asm["ptx"]
            found = re.findall(r"(?:ld|st|atom|red)\.global[.\w]*", ptx)
            instructions.setdefault(kernel.fn.__name__, []).append(dict(Counter(found)))

        return launch

    triton.runtime.driver.set_active(NoDriver())
    JITFunction.__getitem__ = compile_instead

    from torchrec_scratchpipe.core.slot_map import SlotMap
    from torchrec_scratchpipe.core.slot_ops import Aging, Count, FeatureIds, FeatureRows, PlanRequest
    from torchrec_scratchpipe.core.triton_ops import TritonOps

    slot_map = SlotMap(5000, 300, [0, 1000, 5000], TritonOps(), CPU)
    slot_map._make_room(1000)
    buffers = slot_map._take_buffers()
    ops, maps, scratch, tables = slot_map.ops, slot_map.maps, slot_map._scratch, slot_map.table_counts
    table = torch.tensor([0, 1], dtype=torch.int32)
    features = FeatureRows(torch.tensor([0, 1000]), torch.tensor([1000, 4000]), table)
    for dtype in (torch.int64, torch.int32):
        ids = FeatureIds(torch.zeros(1000, dtype=dtype), torch.zeros(3, dtype=dtype))
        ops.mark(ids, features, maps, 1, True)
        ops.mark(ids, features, maps, 1, False)
        request = PlanRequest(ids, features, buffers.slots, 1, 1, 0, -1, Aging(1.0, 0.0))
        ops.find(request, maps, buffers, scratch)
    for skips_used_ahead in (True, False):
        ops.take(request, maps, buffers, scratch, skips_used_ahead)
    ops.scan(request, maps, buffers, 20)
    ops.commit(request, maps, buffers, scratch, tables)
    ops.translate(request, maps, buffers, tables)
    for count, rows in ((Count.WRITEBACKS, buffers.victim_rows), (Count.FILLS, buffers.miss_rows)):
        ops.order(rows, buffers.miss_slots, buffers.counts, count, 5000, slot_map.order_buffers[count])
    ops.count_misses(request, maps, buffers, tables.num_misses_at_train)
    for part in (torch.zeros(64, 128), torch.zeros(64, 4), torch.zeros(64), torch.zeros(64, 8, dtype=torch.float16)):
        ops.move(part, buffers.miss_slots, part.clone(), buffers.victim_rows, buffers.counts, Count.WRITEBACKS)
        ops.move(part, buffers.miss_rows, part.clone(), buffers.miss_slots, buffers.counts, Count.FILLS)
    return instructions


if __name__ == "__main__":
    print(json.dumps(compile_all()))
