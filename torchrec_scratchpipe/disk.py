# SPDX-License-Identifier: BSD-3-Clause
"""The command ``python -m torchrec_scratchpipe.disk``, which is ``torchrec-scratchpipe disk``."""

import sys

from torchrec_scratchpipe.planning.disk_speed import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
