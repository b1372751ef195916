# SPDX-License-Identifier: BSD-3-Clause
"""Lets any enumerator, TorchRec's or the user's own, offer what scratchpad tables need."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.planner.types import Enumerator, ShardingOption
from torchrec.distributed.types import ModuleSharder

from torchrec_scratchpipe.sharding.lookup import SCRATCHPAD_KERNEL

__all__ = ["FUSED", "SCRATCHPAD", "ScratchpadEnumerator", "ScratchpadRules"]

FUSED = EmbeddingComputeKernel.FUSED.value
SCRATCHPAD = SCRATCHPAD_KERNEL.value
DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
ALL_TYPES = tuple(kind.value for kind in ShardingType)
# An enumerator that knows of no constraint keeps all of these.
ALWAYS_KEPT = {
    DATA_PARALLEL,
    ShardingType.TABLE_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
}
REPLACED_METHODS = ("_filter_sharding_types", "_filter_compute_kernels", "populate_estimates")


class ScratchpadRules(Protocol):
    """Which tables are planned as scratchpad tables, and how."""

    alias: str  # the kernel under which they are planned

    def forget(self) -> None:
        """Drop what :meth:`learn` was told."""

    def learn(self, name: str, kernels: set[str]) -> bool:
        """Take note of what the enumerator's own constraints leave of `fused` and `fused_uvm_caching`."""

    def has_slots(self, name: str) -> bool:
        """Whether it is planned as a scratchpad table."""

    def sharding_types(self, name: str) -> Sequence[str]:
        """What the planner's constraints name; none where they do not say."""

    def preferred_type(self, name: str) -> str | None:
        """The one to take where no constraint says."""

    def estimate(self, options: list[ShardingOption], sharders: Sequence[ModuleSharder[nn.Module]]) -> None:
        """Correct the estimates of the enumerator."""


class ScratchpadEnumerator(Enumerator):
    """Another enumerator, whose options for scratchpad tables are those that can be planned.

    The other one does the work, with its own constraints, estimators and search order. While it enumerates, this
    object's methods stand in for those that filter sharding types and kernels and that estimate, where it has them. Of
    an enumerator that has none of these, the options are sorted out afterwards. All else is the other's.
    """

    def __init__(self, theirs: Enumerator, rules: ScratchpadRules, *, is_cpu: bool) -> None:
        self._theirs = theirs
        self._rules = rules
        self._is_cpu = is_cpu
        self._methods = {name: getattr(theirs, name) for name in REPLACED_METHODS if hasattr(theirs, name)}
        self._sharders: Sequence[ModuleSharder[nn.Module]] = ()
        self._filtered: set[str] = set()  # tables whose sharding types were chosen by this object
        self._types_added: set[tuple[str, str]] = set()  # to what sharders offer
        self._has_learned = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_theirs" not in vars(self):
            raise AttributeError(name)
        return getattr(self._theirs, name)

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """As stock."""
        self._sharders = sharders
        self._rules.forget()
        self._has_learned = False
        options = self._enumerate(module, sharders)
        if self._has_learned:  # too late for the options that came before
            options = self._enumerate(module, sharders)
        return self._sorted_out(options)

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """As stock, but for what the rules correct."""
        for option in sharding_options:
            if self._is_cpu and option.compute_kernel == SCRATCHPAD:
                self._learn(option.name, {SCRATCHPAD})
                option.compute_kernel = self._rules.alias
        self._methods["populate_estimates"](sharding_options)
        self._rules.estimate(sharding_options, self._sharders)

    def _enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        self._filtered, self._types_added = set(), set()
        self._forget_search_space()  # it keeps that of the same module, storage included
        with self._standing_in():
            options = list(self._theirs.enumerate(module, sharders))
        self._forget_search_space()  # which another planner of the same enumerator would take for its own
        return options

    def _forget_search_space(self) -> None:
        if hasattr(self._theirs, "_last_stored_module"):
            self._theirs._last_stored_module = None

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        """Have the other one call this object's methods where it would call its own."""
        theirs = getattr(self._theirs, "__dict__", {})
        before = {name: theirs[name] for name in self._methods if name in theirs}
        try:
            for name in self._methods:
                with suppress(AttributeError):  # of a class with slots
                    setattr(self._theirs, name, getattr(self, name))
            yield
        finally:
            for name in self._methods:
                if name in before:
                    setattr(self._theirs, name, before[name])
                elif name in theirs:
                    delattr(self._theirs, name)

    def _learn(self, name: str, kernels: set[str]) -> None:
        self._has_learned |= self._rules.learn(name, kernels)

    def _filter_sharding_types(self, name: str, allowed: list[str], *args: Any, **kwargs: Any) -> list[str]:
        filter_types = self._methods["_filter_sharding_types"]
        has_slots = self._rules.has_slots(name)
        if not has_slots and not self._is_cpu:
            return list(filter_types(name, allowed, *args, **kwargs))
        # Managed collision takes row-wise alone: on a CPU, stock offers nothing.
        allowed = allowed or [ShardingType.ROW_WISE.value]
        # Stock offers row-wise and its kin on CUDA alone; scratchpads have them on a CPU too, where they are asked for.
        offered = list(filter_types(name, list(dict.fromkeys([*allowed, *ALL_TYPES])), *args, **kwargs))
        is_asked = not set(offered) >= ALWAYS_KEPT
        if not is_asked:
            offered = [kind for kind in offered if kind in allowed]
        if has_slots:
            self._filtered.add(name)
            return self._types_for_slots(name, offered, is_asked=is_asked)
        self._types_added |= {(name, kind) for kind in offered if kind not in allowed}
        return offered

    def _types_for_slots(self, name: str, offered: list[str], *, is_asked: bool) -> list[str]:
        named, preferred = self._rules.sharding_types(name), self._rules.preferred_type(name)
        if named:
            offered = [kind for kind in offered if kind in named] if is_asked else list(named)
        elif not is_asked and preferred in offered:
            offered = [preferred]
        return [kind for kind in offered if kind != DATA_PARALLEL]

    def _filter_compute_kernels(
        self, name: str, allowed: list[str], sharding_type: str, *args: Any, **kwargs: Any
    ) -> list[str]:
        filter_kernels = self._methods["_filter_compute_kernels"]
        if sharding_type != DATA_PARALLEL:
            offered = filter_kernels(
                name, list(dict.fromkeys([*allowed, FUSED, SCRATCHPAD])), sharding_type, *args, **kwargs
            )
            self._learn(name, {FUSED, SCRATCHPAD} & set(offered))
        if self._rules.has_slots(name):
            return [self._rules.alias] if sharding_type != DATA_PARALLEL else []
        if (name, sharding_type) in self._types_added:
            return []
        return list(filter_kernels(name, allowed, sharding_type, *args, **kwargs))

    def _sorted_out(self, options: list[ShardingOption]) -> list[ShardingOption]:
        """What is left where this object's methods were not called; else all of them."""
        kept: dict[Any, ShardingOption] = {}
        changed = []
        types_of: dict[str, set[str]] = {}
        for option in options:
            types_of.setdefault(option.fqn, set()).add(option.sharding_type)
        for index, option in enumerate(options):
            if not self._rules.has_slots(option.name) or option.name in self._filtered:
                kept[index] = option
            elif self._is_offered(option, types_of[option.fqn]):
                option.compute_kernel = self._rules.alias
                changed.append(kept.setdefault((option.fqn, option.sharding_type), option))
        if changed:
            self.populate_estimates(changed)
        return list(kept.values())

    def _is_offered(self, option: ShardingOption, types: set[str]) -> bool:
        named, preferred = self._rules.sharding_types(option.name), self._rules.preferred_type(option.name)
        if option.compute_kernel not in (FUSED, SCRATCHPAD) or option.sharding_type == DATA_PARALLEL:
            return False
        if named:
            return option.sharding_type in named
        return preferred not in types or option.sharding_type == preferred
