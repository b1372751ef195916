# SPDX-License-Identifier: BSD-3-Clause
"""Whole training states in and out."""
