# SPDX-License-Identifier: BSD-3-Clause
"""One pool, its rows, and the way of a batch; nothing here knows of TorchRec."""
