# SPDX-License-Identifier: BSD-3-Clause
"""Live figures of a job, and advice that follows from them."""
