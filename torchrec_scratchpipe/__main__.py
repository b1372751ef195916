# SPDX-License-Identifier: BSD-3-Clause
"""The command ``torchrec-scratchpipe``, which is ``python -m torchrec_scratchpipe``."""

import argparse
import sys

from torchrec_scratchpipe.checkpoint import compact_command
from torchrec_scratchpipe.data import command as data
from torchrec_scratchpipe.planning import command, disk_speed

COMMANDS = {"plan": command.main, "disk": disk_speed.main, "data": data.main, "compact": compact_command.main}


def main() -> int:
    """Run a command by its name.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="torchrec-scratchpipe", description="Run one of: plan, disk, data, compact.")
    parser.add_argument(
        "command",
        choices=COMMANDS,
        help="plan: a memory budget in, a sharding plan out; disk: how fast it is for tables; data: other formats to "
        "Parquet; compact: deltas into a new checkpoint",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="plan --help and so on say what they take")
    args = parser.parse_args()
    return COMMANDS[args.command](args.arguments)


if __name__ == "__main__":
    sys.exit(main())
