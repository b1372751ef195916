# SPDX-License-Identifier: BSD-3-Clause
"""The command ``python -m torchrec_scratchpipe.compact``, which is ``torchrec-scratchpipe compact``."""

import sys

from torchrec_scratchpipe.checkpoint.compact_command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
