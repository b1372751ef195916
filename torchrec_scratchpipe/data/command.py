# SPDX-License-Identifier: BSD-3-Clause
"""The command ``torchrec-scratchpipe data``: other formats to Parquet.

    torchrec-scratchpipe data criteo_to_parquet train.txt train.parquet

A Criteo TSV may be gzip'd, and begin with a line of names, which is left out. OUT appears when it is complete. The
exit status is 0 when all is written, 2 for a command line that cannot be used, 1 for any other error, with one line
that says why.
"""

import argparse
import sys
from collections.abc import Sequence

from torchrec_scratchpipe.data.criteo import criteo_to_parquet
from torchrec_scratchpipe.errors import ScratchPipeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, or say why not.

    Args:
        arguments: Of the command line; None for the process's own.

    Returns:
        The exit status: 0, or 1 with one line that says why.
    """
    parser = argparse.ArgumentParser(
        prog="torchrec-scratchpipe data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["criteo_to_parquet"], help="what to do")
    parser.add_argument("source", metavar="IN", help="a raw Criteo TSV, as it is or gzip'd")
    parser.add_argument("target", metavar="OUT", help="the Parquet file to write; replaced if it exists")
    parser.add_argument("--rows_per_group", type=int, default=65_536, help="rows of a row group; default: 65536")
    args = parser.parse_args(arguments)
    if args.rows_per_group < 1:
        parser.error("--rows_per_group must be at least 1")
    try:
        num_rows = criteo_to_parquet(args.source, args.target, args.rows_per_group)
    except (ScratchPipeError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"{args.target}: {num_rows:,} samples")
    return 0
