# SPDX-License-Identifier: BSD-3-Clause
"""Eviction orders: which of the slots that nobody holds go first. They decide traffic, never correctness.

Shapes: ``S`` slots, ``U`` unique rows, ``N`` any number.
"""

import math
from collections import deque
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["WINDOW_BITS", "EvictionOrder", "LeastFrequentlyUsed", "LeastRecentlyUsed", "SlotUses"]

HALF_LIFE = 256.0  # batches after which a use counts half
# What a row keeps while it has no slot, in row_to_slot, below 0; 31 bits in all.
WINDOW_BITS = 20  # batches that can be seen ahead of Plan, one bit each
NOTE_BITS = 11  # what the eviction order remembers of it

# One less than there could be: with all 31 bits set, a row would say the smallest int32, which marks one that is being placed.
NUM_NOTES = (1 << NOTE_BITS) - 2
NOTES_PER_OCTAVE = 16
MAX_HALF_LIVES = 32  # since the origin of frequencies, which float32 would end at 127
MAX_OCTAVES = 48  # of a frequency, since the origin: a note that says more is long past
SAMPLE_SIZE = 8192  # exact order up to twice this many slots; beyond, a threshold from a sample: 10 times faster


class SlotUses(NamedTuple):
    """What is known about the uses of each slot's row.

    A batch that was seen and is not yet planned has one bit; `next_bit` is the bit of the one that comes first.
    """

    last_use: Tensor  # [S] int32, newest planned batch, -1 for a free slot
    uses_ahead: Tensor  # [S] int32, one bit per batch seen ahead that will use the row
    next_bit: int
    are_seen: bool  # whether any batch is

    def is_used_ahead(self, slots: Tensor) -> Tensor:
        """[N] bool: whether a batch that was seen will use the row in each of these slots."""
        return self.uses_ahead.index_select(0, slots) != 0

    def next_use(self) -> Tensor:
        """[S] int32: 1 for a row that the first batch seen ahead will use, 2, 4, ... for later ones, 0 if none will."""
        rest = self.uses_ahead.bitwise_right_shift(self.next_bit)
        first = self.uses_ahead.bitwise_and((1 << self.next_bit) - 1)
        in_order = rest.bitwise_or_(first.bitwise_left_shift_(WINDOW_BITS - self.next_bit))
        return in_order.bitwise_and(-in_order)


class EvictionOrder(Protocol):
    """In which order slots that are not held become victims."""

    def used(self, slots: Tensor, notes_of_new: Tensor, batch_index: int, last_use: Tensor) -> None:
        """Note that a batch uses these slots.

        Args:
            slots: [U] int64, unique; the last M of them have just received their row.
            notes_of_new: [M] int32, what :meth:`note` gave when these rows last left; 0 for the others.
            batch_index: The batch that `last_use` now shows for them.
            last_use: [S] int32, as in :class:`SlotUses`.
        """

    def choose(self, num_victims: int, uses: SlotUses, first_held: int) -> Tensor:
        """Choose victims; the maps do not change, records of uses that no longer count may go.

        Args:
            num_victims: How many are wanted.
            uses: What is known about each slot.
            first_held: Slots with `last_use >= first_held` must not be chosen.

        Returns:
            [<= num_victims] int64, unique occupied slots that are not held; fewer if there are no more.
        """

    def note(self, slots: Tensor) -> Tensor | None:
        """What to remember of rows that leave.

        Args:
            slots: [V] int64, where they are.

        Returns:
            [V] int32 in ``[0, 2 ** NOTE_BITS)``; None for nothing.
        """

    def rebuild(self, last_use: Tensor, next_batch: int) -> None:
        """Take `last_use` as it is: it has been changed for reasons other than a use.

        Args:
            last_use: [S] int32, as in :class:`SlotUses`.
            next_batch: Slots that show this batch are being planned, and will be noted by :meth:`used`.
        """

    def purge(self) -> None:
        """Forget every use: all slots are empty."""

    def grow(self, num_slots: int) -> None:
        """Take note of new slots, which are empty.

        Args:
            num_slots: S from now on, more than before.
        """


class LeastFrequentlyUsed:
    """Rows that no batch seen ahead will use, the least often used first; then those whose next use is farthest.

    A use counts half as much after `half_life` batches, so that yesterday's favourites leave. Rows that leave are
    remembered, each in its entry of `row_to_slot`: to forget them would cost 5 % more misses.

    Slots are not scanned for each batch: one scan lists a sixteenth of them, or as many as are wanted, in order, and
    the list serves until it is spent. A slot that has been used since, or that a batch seen since will use, is passed over.

    Args:
        num_slots: S.
        half_life: In batches.

    Source:
        LRFU (Lee et al., IEEE Transactions on Computers 2001) for the count, ScratchPipe (ISCA 2022) for the known future.
    """

    def __init__(self, num_slots: int, half_life: float = HALF_LIFE) -> None:
        self._num_slots = num_slots
        self._half_life = half_life
        self._frequency: Tensor | None = None  # [S] float32; a use in batch t counts 2 ** ((t - _origin) / half_life)
        self._origin = 0
        self._frequencies: Tensor | None = None  # of each note, in units of the origin
        self._listed = torch.empty(0, dtype=torch.int64)
        self._last_use_of_listed = torch.empty(0, dtype=torch.int32)

    def used(self, slots: Tensor, notes_of_new: Tensor, batch_index: int, last_use: Tensor) -> None:
        """See :class:`EvictionOrder`."""
        if self._frequency is None:
            self._frequency = torch.zeros(self._num_slots, dtype=torch.float32, device=last_use.device)
            self._listed = self._listed.to(last_use.device)
            self._last_use_of_listed = self._last_use_of_listed.to(last_use.device)
        half_lives = (batch_index - self._origin) / self._half_life
        if half_lives > MAX_HALF_LIVES:
            self._frequency *= 2.0**-half_lives
            self._origin, half_lives = batch_index, 0.0
            self._frequencies = None
        weight = 2.0**half_lives
        num_hits = slots.numel() - notes_of_new.numel()
        hits = slots[:num_hits]
        self._frequency.index_copy_(0, hits, self._frequency.index_select(0, hits).add_(weight))
        self._frequency.index_copy_(0, slots[num_hits:], self._frequency_of(notes_of_new).add_(weight))

    def note(self, slots: Tensor) -> Tensor | None:
        """See :class:`EvictionOrder`: its frequency on a scale of logarithms, which wraps around; 0 is for rows never used."""
        if self._frequency is None:
            return None
        log2 = self._frequency.index_select(0, slots).log2_().add_(self._origin / self._half_life)
        return log2.mul_(NOTES_PER_OCTAVE).int().remainder_(NUM_NOTES).add_(1)

    def _frequency_of(self, notes: Tensor) -> Tensor:
        if self._frequencies is None:
            origin = int(self._origin / self._half_life * NOTES_PER_OCTAVE)
            since_origin = (
                torch.arange(NUM_NOTES, dtype=torch.int64, device=notes.device).sub_(origin).remainder_(NUM_NOTES)
            )
            is_recent = since_origin < MAX_OCTAVES * NOTES_PER_OCTAVE
            since_origin = torch.where(is_recent, since_origin, since_origin - NUM_NOTES)
            of_note = torch.exp2(since_origin.float() / NOTES_PER_OCTAVE)
            self._frequencies = torch.cat([of_note.new_zeros(1), of_note])
        return self._frequencies.index_select(0, notes)

    def choose(self, num_victims: int, uses: SlotUses, first_held: int) -> Tensor:
        """See :class:`EvictionOrder`."""
        if num_victims == 0 or self._frequency is None:
            return torch.empty(0, dtype=torch.int64, device=uses.last_use.device)
        chosen = self._listed[:0]
        if self._listed.numel() > 0:
            is_usable = uses.last_use.index_select(0, self._listed) == self._last_use_of_listed
            if uses.are_seen:
                is_usable &= ~uses.is_used_ahead(self._listed)
            usable = is_usable.nonzero().view(-1)[:num_victims]
            chosen = self._listed.index_select(0, usable)
        num_missing = num_victims - chosen.numel()
        if num_missing == 0:
            num_spent = int(usable[-1]) + 1
            self._listed = self._listed[num_spent:]
            self._last_use_of_listed = self._last_use_of_listed[num_spent:]
            return chosen
        self._scan(chosen, num_missing, uses, first_held)
        chosen = torch.cat([chosen, self._listed[:num_missing]])
        self._listed = self._listed[num_missing:].clone()  # a view would keep the whole list
        self._last_use_of_listed = self._last_use_of_listed[num_missing:].clone()
        return chosen

    def rebuild(self, last_use: Tensor, next_batch: int) -> None:
        """See :class:`EvictionOrder`."""
        self._listed = self._listed[:0]
        self._last_use_of_listed = self._last_use_of_listed[:0]

    def purge(self) -> None:
        """See :class:`EvictionOrder`."""
        self._frequency = None
        self._listed = self._listed[:0]
        self._last_use_of_listed = self._last_use_of_listed[:0]

    def grow(self, num_slots: int) -> None:
        """See :class:`EvictionOrder`."""
        if self._frequency is not None:
            self._frequency = torch.cat([self._frequency, self._frequency.new_zeros(num_slots - self._num_slots)])
        self._num_slots = num_slots

    def _scan(self, chosen: Tensor, num_missing: int, uses: SlotUses, first_held: int) -> None:
        """List the slots that may go, apart from those chosen already."""
        assert self._frequency is not None
        order = self._frequency
        if uses.are_seen:
            next_use = uses.next_use()
            # Any known use ranks above any frequency, and the nearest (a next_use of 1) above all.
            order = torch.where(next_use > 0, 1e30 / next_use.float(), order)
        else:
            order = order.clone()
        order.masked_fill_((uses.last_use < 0) | (uses.last_use >= first_held), torch.inf)
        order.index_fill_(0, chosen, torch.inf)
        self._listed = _lowest(order, num_missing, max(num_missing, self._num_slots // 16))
        self._last_use_of_listed = uses.last_use.index_select(0, self._listed)


def _lowest(values: Tensor, num_needed: int, num_wanted: int) -> Tensor:
    """[N] int64: where the lowest finite values are, about `num_wanted` of them and at least `num_needed`, if there are."""
    stride = values.numel() // SAMPLE_SIZE
    if stride > 1:
        sample = values[::stride]
        rank = min(sample.numel(), math.ceil(1.15 * num_wanted / stride))
        threshold = sample.kthvalue(rank).values.clamp(max=torch.finfo(values.dtype).max)
        lowest = (values <= threshold).nonzero().view(-1)
        if lowest.numel() >= num_needed:
            return lowest
    lowest_values, lowest = values.topk(min(values.numel(), num_wanted), largest=False, sorted=True)
    return lowest[: int((lowest_values != torch.inf).sum())]


class LeastRecentlyUsed:
    """Smallest `last_use` first, exactly, without scanning the slots for each batch; what it knows is the past alone.

    Each batch leaves the list of slots that it used. A use is live while no later batch used the slot, so the live uses
    of the oldest list are the least recently used slots. Dead uses are dropped when met, and all at once when they
    outnumber the slots, which costs O(1) per use.

    Args:
        num_slots: S.
    """

    def __init__(self, num_slots: int) -> None:
        self._uses: deque[tuple[int, Tensor]] = deque()
        self._num_uses = 0
        self._compact_above = 2 * num_slots

    def used(self, slots: Tensor, notes_of_new: Tensor, batch_index: int, last_use: Tensor) -> None:
        """See :class:`EvictionOrder`."""
        if slots.numel() == 0:
            return
        self._uses.append((batch_index, slots))
        self._num_uses += slots.numel()
        if self._num_uses > self._compact_above:
            self._compact(last_use)

    def choose(self, num_victims: int, uses: SlotUses, first_held: int) -> Tensor:
        """See :class:`EvictionOrder`."""
        last_use = uses.last_use
        chosen: list[Tensor] = []
        seen: list[tuple[int, Tensor]] = []
        num_missing = num_victims
        for batch_index, slots in self._uses:
            if num_missing == 0 or batch_index >= first_held:
                break
            live = slots[last_use.index_select(0, slots) == batch_index]
            seen.append((batch_index, live))
            chosen.append(live[:num_missing])
            num_missing -= chosen[-1].numel()
        if num_missing == 0:  # else the plan is taken back, and slots that look used now are as old as before
            self._replace_oldest(seen)
        return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=last_use.device)

    def note(self, slots: Tensor) -> Tensor | None:
        """See :class:`EvictionOrder`: nothing."""

    def rebuild(self, last_use: Tensor, next_batch: int) -> None:
        """See :class:`EvictionOrder`."""
        # Hits of a batch that is being planned bear its number already; they are noted once, when its plan stands.
        occupied = ((last_use >= 0) & (last_use < next_batch)).nonzero().view(-1)
        batches = last_use.index_select(0, occupied)
        self.purge()
        for batch_index in batches.unique().tolist():
            self.used(occupied[batches == batch_index], batches[:0], batch_index, last_use)

    def purge(self) -> None:
        """See :class:`EvictionOrder`."""
        self._uses.clear()
        self._num_uses = 0

    def grow(self, num_slots: int) -> None:
        """See :class:`EvictionOrder`."""
        self._compact_above = 2 * num_slots

    def _replace_oldest(self, live_uses: list[tuple[int, Tensor]]) -> None:
        for _ in live_uses:
            self._num_uses -= self._uses.popleft()[1].numel()
        for batch_index, live in reversed(live_uses):
            if live.numel() > 0:
                self._uses.appendleft((batch_index, live))
                self._num_uses += live.numel()

    def _compact(self, last_use: Tensor) -> None:
        live_uses = (
            (batch_index, slots[last_use.index_select(0, slots) == batch_index]) for batch_index, slots in self._uses
        )
        self._uses = deque((batch_index, slots) for batch_index, slots in live_uses if slots.numel() > 0)
        self._num_uses = sum(slots.numel() for _, slots in self._uses)
