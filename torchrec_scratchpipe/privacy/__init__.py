# SPDX-License-Identifier: BSD-3-Clause
"""Differentially private training: per-example gradients, Poisson samples, accounting."""
