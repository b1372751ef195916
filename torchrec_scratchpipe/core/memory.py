# SPDX-License-Identifier: BSD-3-Clause
"""What a pool's scratchpad takes of the device's memory, and of the host's, before anything is allocated.

Shapes: ``R`` rows, ``S`` slots, ``I`` ids, ``U`` unique rows of a batch.

Every term names the tensor that it stands for; a test allocates and compares.
"""

from dataclasses import dataclass

from torchrec_scratchpipe.core.pool import STAGING_HEADROOM
from torchrec_scratchpipe.core.slot_map import BUFFER_HEADROOM, SIGHTINGS_AT_A_TIME

__all__ = ["PoolDemand"]

ROW_BYTES_OF_MAPS = 4  # row_to_slot
SLOT_BYTES_OF_MAPS = (
    8  # slot_to_row
    + 4  # last_use
    + 2  # next_use
    + 4  # newest_sighting
    + 4  # free_slots
    + 4  # frequency
    + 8 / 16  # the list of coming victims
)
# Sizes stay on the device, so that every buffer has room for all ids of a batch.
ID_BYTES_OF_PLAN = 8 + 8 + 8 + 4 + 8  # rows, slots, miss_rows, miss_slots, victim_rows; per batch planned
ID_BYTES_OF_SCRATCH = 4 * 4 + 8  # hits and misses as they were, victims as they were; listed victims; per pool
# Rows and slots that move, in either direction; per pool, on a device that reaches the tables itself.
ID_BYTES_OF_ORDER = 2 * (8 + 4)
ID_BYTES_OF_SIGHTING = 2  # from when a batch is seen until it has trained
ID_BYTES_OF_INPUT = 8  # a KeyedJaggedTensor's values
BAG_BYTES_OF_INPUT = 4 + 8  # its lengths and offsets
# That TorchRec's input distribution is at work on, beyond those that are planned: splits, tensors.
NUM_BATCHES_IN_DIST = 2


@dataclass(frozen=True)
class PoolDemand:
    """What one table's shard brings to its pool; all terms add up over the shards of a rank."""

    num_rows: int  # R of the shard
    row_bytes: int  # with its optimizer state
    num_ids: float  # I per batch on this rank
    num_unique: float  # U per batch on this rank
    lookahead: int
    num_batches_seen_ahead: int
    is_cpu: bool  # whether device and host are the same memory
    output_bytes: float = 0.0  # of the lookup, and its gradient; 0 on a CPU, whose budget is for scratchpads alone
    num_bags: float = 0.0  # per batch on this rank; 0 on a CPU, which keeps no offsets of batches in flight
    num_pools: int = 1  # row widths of the kernel group, at most; each has a plan of its own

    @property
    def slot_bytes(self) -> float:
        """Device memory per slot."""
        return self.row_bytes + SLOT_BYTES_OF_MAPS

    @property
    def fixed_bytes(self) -> float:
        """Device memory whatever the number of slots: the map of all rows, staging, input in flight, output."""
        return self.map_bytes + self.staging_bytes + self.input_bytes + self.output_bytes

    @property
    def whole_bytes(self) -> float:
        """Device memory of the whole table, without a scratchpad; beside scratchpads, `plan_bytes` more."""
        return self.table_bytes + self._bytes_of_inputs + self.output_bytes

    @property
    def map_bytes(self) -> float:
        """From rows to slots."""
        return ROW_BYTES_OF_MAPS * self.num_rows

    @property
    def staging_bytes(self) -> float:
        """Rows on their way, in both directions; none where kernels reach the tables, as they do on CUDA."""
        return 2 * STAGING_HEADROOM * self.num_unique * self.row_bytes if self.is_cpu else 0.0

    @property
    def input_bytes(self) -> float:
        """Ids of all batches in flight, and what was planned for them."""
        return self.plan_bytes + self._bytes_of_inputs

    @property
    def plan_bytes(self) -> float:
        """Room for all ids of the kernel group, for each of its pools."""
        per_id = (self.lookahead + 1) * ID_BYTES_OF_PLAN + ID_BYTES_OF_SCRATCH
        per_id += 0 if self.is_cpu else ID_BYTES_OF_ORDER
        if self.num_batches_seen_ahead:
            num_batches = self.num_batches_seen_ahead + self.lookahead + 1
            per_id += ID_BYTES_OF_SIGHTING * SIGHTINGS_AT_A_TIME * -(-num_batches // SIGHTINGS_AT_A_TIME)
        return self.num_ids * BUFFER_HEADROOM * per_id * self.num_pools

    @property
    def _bytes_of_inputs(self) -> float:
        num_batches = self.lookahead + 1 + self.num_batches_seen_ahead + NUM_BATCHES_IN_DIST
        return num_batches * (self.num_ids * ID_BYTES_OF_INPUT + self.num_bags * BAG_BYTES_OF_INPUT)

    @property
    def table_bytes(self) -> int:
        """Every row, with its optimizer state."""
        return self.num_rows * self.row_bytes

    @property
    def host_bytes(self) -> float:
        """Host memory: the table."""
        return self.table_bytes

    def device_bytes(self, num_slots: float) -> float:
        """Device memory in all."""
        return self.fixed_bytes + num_slots * self.slot_bytes
