# SPDX-License-Identifier: BSD-3-Clause
"""Compiles every Triton kernel for GPUs that need not be there, and says what came of it.

    python tests/compile_kernels.py                  # a JSON object: kernel, then a list with each variant's figures
    python tests/compile_kernels.py --table          # registers and spilled bytes, as Markdown

The interpreter runs kernels as Python. This finds what only the compiler refuses, and shows how wide its loads are.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CAPABILITIES = {80: "A100", 89: "RTX 4090", 90: "H100, H200"}
CPU = torch.device("cpu")


class NoDriver:
    """What the compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU

    def is_active(self) -> bool:
        return True


def figures_of(compiled: Any) -> dict[str, int]:
    """Global memory instructions of a kernel by name; registers of a thread, and the bytes that it spills."""
    found = dict(Counter(re.findall(r"(?:ld|st|atom|red)\.global[.\w]*", compiled.asm["ptx"])))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers, stack) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1]
    return {**found, "registers": int(registers), "spilled_bytes": int(stack)}


def compile_all(capability: int) -> dict[str, list[dict[str, int]]]:
    """Every operation of TritonOps, compiled and not launched."""
    figures: dict[str, list[dict[str, int]]] = {}

    def compile_instead(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            compiled = kernel.warmup(*args, grid=grid, **kwargs)
            figures.setdefault(kernel.fn.__name__, []).append(figures_of(compiled))

        return launch

    triton.runtime.driver.set_active(NoDriver(capability))
    JITFunction.__getitem__ = compile_instead

    from torchrec_scratchpipe.core.slot_map import SlotMap
    from torchrec_scratchpipe.core.slot_ops import (
        NOT_SEEN,
        Aging,
        Count,
        FeatureIds,
        FeatureRows,
        PlanRequest,
        Sighting,
    )
    from torchrec_scratchpipe.core.triton_ops import TritonOps

    slot_map = SlotMap(5000, 300, [0, 1000, 5000], TritonOps(), CPU)
    slot_map._make_room(1000)
    buffers = slot_map._take_buffers()
    ops, maps, scratch, tables = slot_map.ops, slot_map.maps, slot_map._scratch, slot_map.table_counts
    table = torch.tensor([0, 1], dtype=torch.int32)
    features = FeatureRows(torch.tensor([0, 1000]), torch.tensor([1000, 4000]), table)
    for dtype in (torch.int64, torch.int32):
        ids = FeatureIds(torch.zeros(1000, dtype=dtype), torch.zeros(3, dtype=dtype))
        ops.mark(ids, features, maps, Sighting(1, 0), 1)
        request = PlanRequest(ids, features, buffers.slots, 1, 1, 1, NOT_SEEN, Aging(1.0, 0.0))
        ops.find(request, maps, buffers, scratch)
    for skips_used_ahead in (True, False):
        ops.take(request, maps, buffers, scratch, skips_used_ahead)
    ops.scan(request, maps, buffers, 20)
    ops.commit(request, maps, buffers, scratch, tables)
    ops.translate(request, maps, buffers, tables)
    ops.report(buffers)
    for count, rows in ((Count.WRITEBACKS, buffers.victim_rows), (Count.FILLS, buffers.miss_rows)):
        ops.order(rows, buffers.miss_slots, buffers.counts, count, 5000, slot_map.order_buffers[count])
    ops.count_misses(request, maps, buffers, tables.num_misses_at_train)
    for part in (torch.zeros(64, 128), torch.zeros(64, 4), torch.zeros(64), torch.zeros(64, 8, dtype=torch.float16)):
        ops.move(part, buffers.miss_slots, part.clone(), buffers.victim_rows, buffers.counts, Count.WRITEBACKS)
        ops.move(part, buffers.miss_rows, part.clone(), buffers.miss_slots, buffers.counts, Count.FILLS)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", default="80,89,90", help="of the GPUs; by default A100, RTX 4090, H100")
    parser.add_argument("--table", action="store_true", help="print a table instead of JSON")
    args = parser.parse_args()
    figures = {number: compile_all(number) for number in map(int, args.capabilities.split(","))}
    if not args.table:
        print(json.dumps(figures))
        return
    heads = [
        f"sm_{number} ({CAPABILITIES[number]})" if number in CAPABILITIES else f"sm_{number}" for number in figures
    ]
    print("| registers, spilled bytes | " + " | ".join(heads) + " |")
    print("|---|" + "---|" * len(figures))
    for kernel in next(iter(figures.values())):
        cells = []
        for of_capability in figures.values():
            variants = of_capability[kernel]
            registers = [variant["registers"] for variant in variants]
            spilled = max(variant["spilled_bytes"] for variant in variants)
            few, many = min(registers), max(registers)
            cells.append(f"{few if few == many else f'{few} to {many}'}, {spilled}")
        print(f"| `{kernel.strip('_')}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
