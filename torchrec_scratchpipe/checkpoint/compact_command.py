# SPDX-License-Identifier: BSD-3-Clause
"""Fold the deltas of a directory of checkpoints into a new checkpoint.

The checkpoint is of the last step that the deltas lead to. A job may train, log and save there meanwhile.
"""

import argparse
import sys
from collections.abc import Sequence

from torchrec_scratchpipe.checkpoint.compaction import compact
from torchrec_scratchpipe.errors import ScratchPipeError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Fold and say what is there, or why not.

    Args:
        arguments: Of the command line; None for the process's own.

    Returns:
        The exit status: 0, or 1 with one line that says why.
    """
    parser = argparse.ArgumentParser(
        prog="torchrec-scratchpipe compact", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="of a CheckpointManager with delta_every")
    parser.add_argument(
        "--keep_last",
        type=int,
        help="delete all checkpoints but so many, the new one included, and deltas that lead to none of them; default: "
        "keep all",
    )
    args = parser.parse_args(arguments)
    try:
        step = compact(args.directory, args.keep_last)
    except ScratchPipeError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{args.directory}: nothing to fold" if step is None else f"{args.directory}: step {step} is a checkpoint now"
    )
    return 0
