# SPDX-License-Identifier: BSD-3-Clause
"""Differentially private training: noise reaches a row when the row is next used, gradients are clipped by example."""
