# SPDX-License-Identifier: BSD-3-Clause
"""The command ``python -m torchrec_scratchpipe.data``, which is ``torchrec-scratchpipe data``."""

import sys

from torchrec_scratchpipe.data.command import main

if __name__ == "__main__":
    sys.exit(main())
