# SPDX-License-Identifier: BSD-3-Clause
"""The command ``torchrec-scratchpipe``, which is ``python -m torchrec_scratchpipe``."""

import argparse
import sys

from torchrec_scratchpipe.planning import command, disk_speed

COMMANDS = {"plan": command.main, "disk": disk_speed.main}


def main() -> int:
    """Run a command by its name.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="torchrec-scratchpipe", description="Run one of: plan, disk.")
    parser.add_argument(
        "command",
        choices=COMMANDS,
        help="plan: a memory budget in, a sharding plan out; disk: how fast it is for tables",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="plan --help and disk --help say what they take")
    args = parser.parse_args()
    return COMMANDS[args.command](args.arguments)


if __name__ == "__main__":
    sys.exit(main())
