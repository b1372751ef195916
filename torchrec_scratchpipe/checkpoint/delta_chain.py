# SPDX-License-Identifier: BSD-3-Clause
"""Puts the segments of all ranks and runs together: which deltas there are, and whether they follow each other.

A *run* is a job from its start or resume to its end, on a number of ranks. A *delta set* is what all ranks of a run
have recorded up to one batch. Only whole sets count: what one rank has recorded and another has not was never complete.
"""

import hashlib
import itertools
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torchrec_scratchpipe.checkpoint.delta_files import Record, Segment, SegmentReader, segment_paths
from torchrec_scratchpipe.checkpoint.files import MANIFEST_FILE, Manifest
from torchrec_scratchpipe.errors import CheckpointMismatchError

__all__ = ["LOG_DIRECTORY", "Chain", "DeltaSet", "Position", "RankRecord", "digest_of", "digest_of_base"]

LOG_DIRECTORY = "deltas"  # in the directory of the checkpoints
MAX_RECORDS_APART = 2  # ranks train together: one may be writing a record while another writes the next


class RankRecord(NamedTuple):
    """A record and who can read it."""

    reader: SegmentReader
    record: Record

    @property
    def segment(self) -> Segment:
        """What the record is in."""
        assert self.reader.segment is not None
        return self.reader.segment


class Position(NamedTuple):
    """A delta set by its digests."""

    run: str
    step: int
    digest: str  # of the set
    digests: tuple[str, ...]  # of the newest record of each rank


@dataclass(frozen=True)
class DeltaSet:
    """All that changed after batch `since`, on all ranks, as it was after batch `step`."""

    run: str
    since: int
    step: int
    ranks: tuple[tuple[RankRecord, ...], ...]  # by rank; one each, but where a record could not be written at once

    @property
    def records(self) -> list[RankRecord]:
        """Of all ranks, in the order in which they are to be applied."""
        return [record for records in self.ranks for record in records]

    @property
    def newest(self) -> list[RankRecord]:
        """Of each rank."""
        return [records[-1] for records in self.ranks]

    @property
    def has_state(self) -> bool:
        """Whether a job can go on from here: what is in no pool was logged too."""
        return all(record.has_state for _, record in self.newest)

    @property
    def time_s(self) -> float:
        """When it was taken, by the clock of the last rank."""
        return max(record.time_s for _, record in self.newest)

    @property
    def digest(self) -> str:
        """What a run that goes on from here says that it follows."""
        return digest_of([record.digest for _, record in self.newest])

    @property
    def position(self) -> Position:
        """To be found again by :meth:`Chain.after_set`."""
        return Position(self.run, self.step, self.digest, tuple(record.digest for _, record in self.newest))


class _Found(NamedTuple):
    """A file by the directory alone."""

    inode: int
    num_bytes: int


@dataclass
class _Run:
    name: str
    since: int
    world_size: int
    follows: str
    segments: list[list[SegmentReader]]  # by rank, ascending
    sets: list[DeltaSet] = field(default_factory=list)
    num_done: list[int] = field(default_factory=list)  # by rank, records that are in sets
    seen: list[list[Segment]] = field(default_factory=list)  # by rank, when the sets were found

    @property
    def has_records(self) -> bool:
        """Of any rank."""
        return any(_of(reader).records for readers in self.segments for reader in readers)

    def records(self, rank: int, first: int) -> list[RankRecord]:
        """From the record of this number on."""
        found = []
        for reader in self.segments[rank]:
            records = _of(reader).records
            found += [RankRecord(reader, record) for record in records[first:]]
            first = max(0, first - len(records))
        return found

    def find_sets(self, before: "_Run | None") -> None:
        """By all records; or, where the run was seen before and has only grown, by those that have come."""
        self.seen = [[_of(reader) for reader in readers] for readers in self.segments]
        self.num_done = [0] * self.world_size
        if before is not None and all(
            len(old) <= len(new) and all(one is two for one, two in zip(old, new, strict=False))
            for old, new in zip(before.seen, self.seen, strict=True)
        ):
            self.sets, self.num_done = before.sets, before.num_done
        ranks = [self.records(rank, first) for rank, first in enumerate(self.num_done)]
        done = [0] * self.world_size
        for step in sorted(set.intersection(*({record.step for _, record in records} for records in ranks))):
            parts = []
            for rank, records in enumerate(ranks):
                first = done[rank]
                done[rank] = next(i for i in range(first, len(records)) if records[i].record.step == step) + 1
                parts.append(tuple(records[first : done[rank]]))
            # Equal on all ranks, but where old segments were deleted.
            since = max(records[0].record.since for records in parts)
            self.sets.append(DeltaSet(self.name, since, step, tuple(parts)))
        self.num_done = [old + new for old, new in zip(self.num_done, done, strict=True)]

    def has(self, position: Position) -> bool:
        """Whether all ranks have it, or what goes on from it."""
        return self.name == position.run and all(
            any(
                digest in (_of(reader).digest, _of(reader).schema.follows)
                or any(digest == record.digest for record in reversed(_of(reader).records))
                for reader in reversed(readers)
            )
            for digest, readers in zip(position.digests, self.segments, strict=True)
        )


@dataclass
class Chain:
    """All whole delta sets of a directory, ascending, each of which goes on from the one before.

    Raises CheckpointMismatchError.
    """

    directory: Path  # of the checkpoints
    sets: list[DeltaSet] = field(default_factory=list)
    _readers: dict[Path, SegmentReader] = field(default_factory=dict)
    _runs: list[_Run] = field(default_factory=list)
    _seen: "dict[Path, _Found]" = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> "Chain":
        """Scan all headers; payloads are not read."""
        chain = cls(directory)
        chain.update()
        return chain

    def update(self) -> bool:
        """Take in what has come, and what was deleted, since; False if that is nothing, and then no file is read."""
        seen = self._look()
        if seen == self._seen:
            return False
        before, self._seen = self._seen, {}  # what fails is read anew the next time
        for path, reader in list(self._readers.items()):
            if path not in seen or seen[path].inode != reader.inode:  # a resumed job may give a name to another file
                self._readers.pop(path).close()
        readers = []
        for path, found in seen.items():
            if path not in self._readers:
                try:
                    self._readers[path] = SegmentReader(path)
                except CheckpointMismatchError:
                    if not path.exists():  # deleted in this moment
                        continue
                    raise
            reader = self._readers[path]
            if (found == before.get(path) and reader.segment is not None) or reader.scan() is not None:
                readers.append(reader)
        runs_before = {run.name: run for run in self._runs}
        self._runs = []
        runs = self._sort(readers)
        for run in runs:
            run.find_sets(runs_before.get(run.name))
        self._runs = runs
        self.sets = [delta_set for run in runs for delta_set in run.sets]
        self._check_runs()
        self._seen = seen
        return True

    def _look(self) -> "dict[Path, _Found]":
        found = {}
        for path in segment_paths(self.directory / LOG_DIRECTORY):
            try:
                status = path.stat()
            except FileNotFoundError:  # deleted in this moment
                continue
            found[path] = _Found(status.st_ino, status.st_size)
        return found

    @property
    def begins(self) -> list[int]:
        """The batches after which runs began to log."""
        return [run.since for run in self._runs]

    def after_set(self, position: Position) -> list[DeltaSet] | None:
        """The sets that lead on from one, ascending.

        Args:
            position: Of the one.

        Returns:
            None if the log does not lead on from there: what was between is deleted, or a run has gone back before it.
        """
        if not any(run.follows == position.digest or run.has(position) for run in self._runs):
            return None
        sets = [delta_set for delta_set in self.sets if delta_set.step > position.step]
        step = position.step
        for delta_set in sets:
            if delta_set.since > step:
                return None
            step = delta_set.step
        return sets

    def after(self, base: Manifest, directory: Path) -> list[DeltaSet]:
        """The sets that lead on from a base, ascending.

        Args:
            base: What the base says of itself.
            directory: Where it is.

        Returns:
            None of them where the base is the latest.
        """
        sets = [delta_set for delta_set in self.sets if delta_set.step > base.step]
        if not sets:
            return []
        first = next(run for run in self._runs if run.name == sets[0].run)
        is_of_run = any(run.name == base.run and run.since <= base.step for run in self._runs)
        followed = {base.digest, digest_of_base(directory)} - {""}
        is_followed = first.since == base.step and first.follows in followed
        if not (is_of_run or is_followed):
            raise CheckpointMismatchError(
                f"{self.directory / LOG_DIRECTORY} has deltas of another run than {directory}. Put those back that "
                "belong to it, or take these away."
            )
        step = base.step
        for delta_set in sets:
            if delta_set.since > step:
                raise CheckpointMismatchError(
                    f"{self.directory / LOG_DIRECTORY}: the deltas of batches {step} to {delta_set.since} are missing. "
                    f"Put their files back, or load step {step}."
                )
            step = delta_set.step
        return sets

    def cut(self, since: int) -> None:
        """Delete, for good, all that was recorded after a batch. Raises OSError."""
        for reader in list(self._readers.values()):
            segment = reader.segment
            if segment is None or segment.schema.since >= since:
                reader.path.unlink()
                continue
            ends = [record.end_offset for record in segment.records if record.step <= since]
            end = ends[-1] if ends else segment.begin
            if end < reader.path.stat().st_size:
                with reader.path.open("r+b") as file:
                    file.truncate(end)
                    os.fsync(file.fileno())

    def delete_before(self, base: int) -> None:
        """Delete segments that no checkpoint of this batch or a later one needs. Raises OSError."""
        for index, run in enumerate(self._runs):
            run_after = self._runs[index + 1] if index + 1 < len(self._runs) else None
            for readers in run.segments:
                ends = [_of(reader).schema.since for reader in readers[1:]]
                ends += [run_after.since] if run_after is not None else []
                for reader, end in zip(readers, ends, strict=False):
                    if end <= base:
                        reader.path.unlink(missing_ok=True)

    def file_bytes(self) -> int:
        """Of all segments that are there now; reads none. Raises OSError."""
        return sum(path.stat().st_size for path in segment_paths(self.directory / LOG_DIRECTORY))

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _sort(self, readers: Sequence[SegmentReader]) -> list[_Run]:
        runs: dict[str, _Run] = {}
        for reader in readers:
            schema = _of(reader).schema
            if schema.run not in runs:
                ranks: list[list[SegmentReader]] = [[] for _ in range(schema.world_size)]
                runs[schema.run] = _Run(schema.run, schema.run_since, schema.world_size, schema.run_follows, ranks)
            run = runs[schema.run]
            if schema.world_size != run.world_size or schema.rank >= run.world_size:
                raise CheckpointMismatchError(f"{reader.path}: is of another number of ranks than its run.")
            run.segments[schema.rank].append(reader)
        # Ranks log only when all of them have begun. What none of them has logged in yet is not looked at.
        whole = [run for run in runs.values() if all(run.segments) or run.has_records]
        for run in whole:
            self._check_ranks(run)
        return sorted(whole, key=lambda run: run.since)

    def _check_ranks(self, run: _Run) -> None:
        log = self.directory / LOG_DIRECTORY
        for rank, readers in enumerate(run.segments):
            if not readers:
                raise CheckpointMismatchError(
                    f"{log}: of the run that began after batch {run.since}, the files of rank {rank} of "
                    f"{run.world_size} are missing. Put them back."
                )
            for reader in readers:
                if reader.path.name != _of(reader).own_name:
                    raise CheckpointMismatchError(
                        f"{reader.path}: was {_of(reader).own_name} when it was written. Give it its name back."
                    )
            for before, after in itertools.pairwise(_of(reader) for reader in readers):
                if before.is_torn or (after.schema.since, after.schema.follows) != (before.step, before.digest):
                    raise CheckpointMismatchError(
                        f"{after.path}: does not go on from {before.path.name}, which ends with batch {before.step}. "
                        "Records are missing, or of another run. Put the files back."
                    )
        steps = [_of(readers[-1]).step for readers in run.segments]
        for rank, readers in enumerate(run.segments):
            newest_first = (record for reader in reversed(readers) for record in reversed(_of(reader).records))
            num_more = sum(1 for _ in itertools.takewhile(lambda record: record.step > min(steps), newest_first))
            if num_more > MAX_RECORDS_APART:
                raise CheckpointMismatchError(
                    f"{log}: rank {steps.index(min(steps))} has no record after batch {min(steps)}, and rank {rank} "
                    f"has {num_more}. Records are missing; put the file back as it was."
                )

    def _check_runs(self) -> None:
        for before, run in itertools.pairwise(self._runs):
            followed = [digest_of_base(self.directory / f"step_{run.since:012d}")]
            followed += [one.digest for one in self.sets if one.run == before.name and one.step == run.since]
            has_more = any(_of(readers[-1]).step > run.since for readers in before.segments)
            if has_more or run.follows not in followed:
                raise CheckpointMismatchError(
                    f"{_of(run.segments[0][0]).path}: does not go on from the deltas before it. They are of two runs; "
                    "take those away that do not belong here."
                )


def digest_of_base(directory: Path) -> str:
    """What a run that goes on from a base says that it follows; empty if there is none."""
    try:
        return f"base {zlib.crc32((directory / MANIFEST_FILE).read_bytes()):08x}"
    except OSError:
        return ""


def digest_of(digests: Sequence[str]) -> str:
    """Of one record of each rank, by rank."""
    return hashlib.blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()


def _of(reader: SegmentReader) -> Segment:
    assert reader.segment is not None, "it was scanned"
    return reader.segment
