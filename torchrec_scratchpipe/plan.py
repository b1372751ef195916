# SPDX-License-Identifier: BSD-3-Clause
"""The command ``python -m torchrec_scratchpipe.plan``, which is ``torchrec-scratchpipe plan``."""

import sys

from torchrec_scratchpipe.planning.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
