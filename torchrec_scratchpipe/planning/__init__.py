# SPDX-License-Identifier: BSD-3-Clause
"""A memory budget in, a sharding plan out."""
