# SPDX-License-Identifier: BSD-3-Clause
"""`python -m tests.conformance`."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
