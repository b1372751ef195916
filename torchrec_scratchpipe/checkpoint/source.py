# SPDX-License-Identifier: BSD-3-Clause
"""What a state is loaded from: a checkpoint, and the delta sets that lead on from it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from torchrec_scratchpipe.checkpoint.delta_chain import Chain, DeltaSet, RankRecord, digest_of_base
from torchrec_scratchpipe.checkpoint.delta_load import (
    LoggedState,
    RowWriter,
    check_fit,
    first_of_each,
    logged_names,
    read_state,
    states_between,
    write_state,
)
from torchrec_scratchpipe.checkpoint.files import Manifest, base_path, base_steps, check_values
from torchrec_scratchpipe.checkpoint.loading import brief, check_file, check_files, check_fits, check_metadata
from torchrec_scratchpipe.checkpoint.pieces import Piece
from torchrec_scratchpipe.checkpoint.ranks import Ranks
from torchrec_scratchpipe.checkpoint.reads import read_checkpoint
from torchrec_scratchpipe.errors import CheckpointMismatchError
from torchrec_scratchpipe.sharding.table_view import to_write

__all__ = ["Source", "find_source", "open_source"]


def find_source(directory: Path, step: int | None) -> tuple[int, int] | None:
    """The checkpoint to begin with, and the step that its deltas lead to; None if there is no checkpoint at all.

    Args:
        directory: Of the checkpoints.
        step: The step that is wanted; None: the latest.

    Returns:
        Both steps; equal where no deltas are needed.

    Raises:
        CheckpointMismatchError: There is no such step, or deltas are missing, or are not of this checkpoint.
    """
    if step is not None and base_path(directory, step).is_dir():  # whole or not; whoever reads it says what is wrong
        return step, step
    bases = base_steps(directory)
    base = max((base for base in bases if step is None or base < step), default=None)
    if base is None and step is None:
        return None
    steps: list[int] = []
    if base is not None:
        chain = Chain.read(directory)
        sets = chain.after(Manifest.read_base(directory, base), base_path(directory, base))
        chain.close()
        steps = [base, *(delta_set.step for delta_set in sets if delta_set.has_state)]
    if step is not None and step not in steps:
        ends = f", and deltas that lead to {steps[-1]}" if len(steps) > 1 else ""
        raise CheckpointMismatchError(
            f"{base_path(directory, step)} does not exist. Steps that were saved: "
            f"{', '.join(map(str, bases)) or 'none'}{ends}."
        )
    assert base is not None
    return base, steps[-1] if step is None else step


@dataclass
class Source:
    """A checkpoint, whose files are whole, and delta sets, whose records are."""

    directory: Path  # of the checkpoint
    manifest: Manifest
    metadata: Metadata
    sets: Sequence[DeltaSet]  # that lead on from it
    states: Sequence[LoggedState]  # of the ranks at the last of them
    is_checked: bool  # whether all bytes are known to be what was written
    between: Mapping[int, Sequence[LoggedState]]  # by set, tensors that went into a scratchpad after it

    def __post_init__(self) -> None:
        self._logged = first_of_each(self.states) if self.states else None
        self._logged_names = logged_names(self.sets)

    @property
    def names(self) -> set[str]:
        """All names of the flat state."""
        if self._logged is None:
            return set(self.metadata.state_dict_metadata)
        return self._logged_names | self._logged.names

    @property
    def world_size(self) -> int:
        """Of the job that saved it."""
        return len(self.states) or self.manifest.world_size

    @property
    def digest(self) -> str:
        """What a log that goes on from here says that it follows."""
        return self.sets[-1].digest if self.sets else digest_of_base(self.directory)

    def beside(self, rank: int) -> tuple[Any, Any, Any]:
        """What no state_dict shows: `extra`, states of the optimizer's wrappers, and of private training if any.

        Raises CheckpointMismatchError.
        """
        path = self.directory / f"extra_{rank}.pt"
        if not self.states and not self.is_checked and path.name in self.manifest.files:
            check_file(self.directory, path.name, self.manifest.files[path.name], self.metadata)
        try:
            content = self.states[rank].beside if self.states else torch.load(path, weights_only=True)
            return content["extra"], content["optimizer_wrappers"], content.get("privacy")
        except Exception as error:
            raise CheckpointMismatchError(
                f"{path}: is not plain data ({brief(error)}), and reading it might run code. Load another step."
            ) from error

    def check(
        self,
        state: dict[str, Any],
        flat: Mapping[str, Any],
        names: set[str],
        pieces: Mapping[str, Sequence[Piece]],
    ) -> None:
        """Compare names, sizes and dtypes. Raises CheckpointMismatchError.

        Args:
            state: What is to be loaded, on this rank.
            flat: The same.
            names: Of the flat states of all ranks.
            pieces: By name in it, the pieces of each tensor.
        """
        if self._logged is None:
            check_fits(state, self.metadata, names, self.directory)
            check_values(self.directory, self.metadata, flat)
            return
        left = sorted(names ^ {name for name in self.names if name.partition(".")[0] in state})
        if left:
            where = (
                "is in the delta log, and not here" if left[0] in self.names else "is here, and not in the delta log"
            )
            raise CheckpointMismatchError(
                f"{self.directory.parent}: {left[0]} {where}. Build the model with the same tables and optimizers."
            )
        check_fits(self._of_checkpoint(flat), self.metadata, None, self.directory)
        check_fit(self.sets, self._logged, pieces)

    def load(self, pieces: Mapping[str, Sequence[Piece]], set_value: Callable[[str, Any], None]) -> None:
        """Write tables and other tensors where they are, on this rank.

        Args:
            pieces: By name in the flat state, the pieces of each tensor that are here; empty for what is no tensor.
            set_value: Takes what is no tensor, by name in the flat state.

        Raises:
            CheckpointMismatchError: A file is damaged, if that is not known to be otherwise; some of it was loaded.
        """
        targets = {
            name: [piece._replace(tensor=to_write(piece.tensor)) for piece in some] for name, some in pieces.items()
        }
        files = None if self.is_checked else self.manifest.files
        if self._logged is None:
            values = read_checkpoint(self.directory, self.metadata, files, targets)
        else:
            logged = {name: some for name, some in targets.items() if name in self._logged_names}
            read_checkpoint(self.directory, self.metadata, files, logged)
            writer = RowWriter(targets, is_checked=self.is_checked)
            records: list[RankRecord] = []
            for number, delta_set in enumerate(self.sets):
                records += delta_set.records
                if number in self.between:
                    writer.write(records)
                    records = []
                    for state in self.between[number]:
                        write_state(state, targets)
            writer.write(records)
            write_state(self._logged, targets)
            values = self._logged.values
        for name, value in values.items():
            if name in pieces:
                set_value(name, value)

    def _of_checkpoint(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """What deltas have only changes of. All the rest, the last of them has."""
        return {name: flat[name] for name in self._logged_names if name in flat}


@contextmanager
def open_source(
    directory: Path, base: int, step: int, ranks: Ranks, make_error: Callable[[str], Exception], *, check_first: bool
) -> Iterator[Source]:
    """Open all that :func:`find_source` has found; with `check_first`, read all of it, on each rank a share.

    All ranks call it. Raises what `make_error` makes.
    """
    chain = Chain(directory)

    def read() -> Source:
        path = base_path(directory, base)
        manifest = Manifest.read_base(directory, base)
        sets: list[DeltaSet] = []
        if step > base:
            chain.update()
            sets = [one for one in chain.after(manifest, path) if one.step <= step]
        records = [record for one in sets for record in one.records]
        for reader, record in records[ranks.rank :: ranks.world_size] if check_first else ():
            reader.check(record)
        states = [read_state(record) for record in sets[-1].newest] if sets else []
        metadata = (
            check_files(path, manifest, ranks.rank, ranks.world_size) if check_first else check_metadata(path, manifest)
        )
        return Source(path, manifest, metadata, sets, states, check_first, states_between(sets))

    try:
        yield ranks.each_or_fail(read, make_error)
    finally:
        chain.close()
