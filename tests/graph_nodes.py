# SPDX-License-Identifier: BSD-3-Clause
"""Builds the CUDA graphs of a plan and of its moves with a driver that is not there, the library that is given.

Kernels are compiled for a GPU of compute capability 9.0. Prints what was asked for, a line of JSON for each launch; the
library prints what has reached the driver.
"""

import ctypes
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmark"))

from host_cost import NoDriver, make_batch, make_pool

from torchrec_scratchpipe.core import triton_ops
from torchrec_scratchpipe.core.cuda_graph import CudaGraph
from torchrec_scratchpipe.core.runner import StageRunner
from torchrec_scratchpipe.core.stages import fill, write_back

BYTES = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "u8": 1, "b8": 1}
REACHED_AT = 1 << 60  # as cuda_stub.c has it
sizes_of_functions = []  # their addresses are the functions' handles


class StubbedGraph(CudaGraph):
    """Tells the library what parameters a kernel has, as its PTX does, and what is asked for."""

    driver: Any

    def __init__(self) -> None:
        super().__init__(self.driver)

    def add(self, kernel: Any, num_programs: int, args: Sequence[Tensor | int], options: Mapping[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=(num_programs,), **options)
        assert compiled.run is not None
        head = compiled.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
        sizes = [BYTES[name] for name in re.findall(r"\.param \.(\w+)", head)]
        sizes_of_functions.append((ctypes.c_size_t * (len(sizes) + 1))(*sizes, 0))
        compiled.function = ctypes.addressof(sizes_of_functions[-1])
        # A tensor without elements has no address, and its kernels touch nothing.
        pointers = [arg.data_ptr() if isinstance(arg, Tensor) else None for arg in args]
        params = [
            arg if pointer is None else pointer and pointer + REACHED_AT
            for arg, pointer in zip(args, pointers, strict=True)
        ]
        params += [0] * (len(sizes) - len(params))
        block = 32 * options.get("num_warps", 4)
        asked = {"grid": [num_programs, 1, 1], "block": [block, 1, 1], "shared": compiled.metadata.shared}
        sys.stdout.write(json.dumps({"kernel": kernel.fn.__name__, **asked, "params": params}) + "\n")
        sys.stdout.flush()
        super().add(kernel, num_programs, args, options)
        self.driver.fflush(None)


def main(library: str) -> None:
    NoDriver.get_current_stream = staticmethod(lambda device: 1234)  # type: ignore[method-assign]
    triton.runtime.driver.set_active(NoDriver())
    StubbedGraph.driver = ctypes.PyDLL(library)
    pool = make_pool(triton_ops.TritonOps(StubbedGraph))
    batch = make_batch(pool, StageRunner(torch.device("cpu")))()  # type: ignore[arg-type]
    for _ in range(3):  # recorded the second time, replayed the third
        plan = pool.slot_map.plan(batch.pool_ids[0])
        write_back(pool, plan)
        fill(pool, plan)
        pool.slot_map.confirm(plan)
        pool.slot_map.count_misses(plan)
        pool.slot_map.release(plan.batch_index)
        pool.slot_map.take_in_releases()


if __name__ == "__main__":
    main(sys.argv[1])
