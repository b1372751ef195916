# SPDX-License-Identifier: BSD-3-Clause
"""TorchRec's side of training."""
