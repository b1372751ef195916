# SPDX-License-Identifier: BSD-3-Clause
"""Tensors that show host tables to everybody outside: as if every row were always in its table.

Rows that have trained are newer in the scratchpad than in their table, and rows in the scratchpad do not see what is
written to the table. So no plain tensor of a host table leaves this package. What leaves is a view of a class of its
own. PyTorch asks that class before it runs any operation on the view, and the class asks the table's
:class:`TableOwner`:

* before an operation that reads: bring the table up to date;
* before an operation that writes: that too, and have resident rows read anew before they are used again;
* of an operation that names rows by their indices: for these rows alone, wherever they are;
* where memory is handed out for which PyTorch is not asked any more (NumPy, DLPack, storages): the same, and once more
  before and after every batch, as long as somebody has that memory.

A view of a view is such a view, so that ``state_dict()``, ``parameter.data``, a slice and what was kept from last week
behave alike.
"""

from typing import Any, NoReturn, Protocol, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchrec.distributed.composable.table_batched_embedding_slice import TableBatchedEmbeddingSlice

from torchrec_scratchpipe.core.host_table import LentMemory
from torchrec_scratchpipe.errors import ConfigError

__all__ = ["TableOwner", "TableParameter", "TableView", "shown", "to_write"]

NUM_DRAWN_TOGETHER = 1 << 24  # values: 64 MB of float32 on the device


class TableOwner(Protocol):
    """Who knows whether a host table is up to date."""

    # Draws random numbers for the host, which draws them one after another; None if there is none.
    drawing_device: torch.device | None

    def prepare_read(self, shown: Tensor) -> None:
        """The table is read now, where it lies in the memory of a tensor: bring it up to date."""

    def prepare_write(self, shown: Tensor) -> None:
        """The table is written now, and perhaps until the next batch, where it lies in the memory of a tensor.

        Bring it up to date, and read resident rows anew then.
        """

    def read_rows(self, shown: Tensor, rows: Tensor) -> Tensor | None:
        """Some rows of what a tensor shows, as they are now; None if it does not show whole rows.

        Shapes: `rows` [N] int64 on the host, returns [N, D] or [N].
        """

    def write_rows(self, shown: Tensor, rows: Tensor, values: Tensor) -> None:
        """Write rows that :meth:`read_rows` has returned. Shapes: `rows` [N] int64, each once; `values` as returned."""

    def note_reset(self, num_rows: int) -> None:
        """So many rows are given to other ids."""

    def note_lent(self, memory: "LentMemory") -> None:
        """The table may be read and written, unseen, as long as this memory is in somebody's hands."""


class _ShowsTable:
    """What both classes of views do; mixed into a class of tensors."""

    _shown: Tensor  # the same memory as a plain tensor
    _owner: TableOwner

    # Operations of subclasses would give results of the subclass; results of this class are chosen below.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Ask the owners of all tables that an operation is about, and run it on their memory."""
        kwargs = kwargs or {}
        if func in _OF_ROWS:
            result = _on_rows(func, *args, **kwargs)
            if result is not None:
                return result
        views: list[_ShowsTable] = []
        written_views: list[_ShowsTable] = []
        plain_args, plain_kwargs = tree_map(lambda value: _unwrap(value, views), (args, kwargs))
        if not func.is_view and func not in _METADATA:
            written = _written(func, args, kwargs)
            for view in views:
                if any(view is other for other in written):
                    written_views.append(view)
                    view._owner.prepare_write(view._shown)
                else:
                    view._owner.prepare_read(view._shown)
        device = views[0]._owner.drawing_device if func in _DRAWS else None
        if device is not None and plain_kwargs.get("generator") is None and plain_args[0].is_contiguous():
            result = _draw(func, *plain_args, device=device, **plain_kwargs)
        else:
            result = func(*plain_args, **plain_kwargs)
        for view in written_views:
            torch.autograd.graph.increment_version(view._shown)
        return tree_map(lambda value: _wrap(value, views), result)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            self._owner.prepare_read(self._shown)
            memo[id(self)] = self._copied()
        return memo[id(self)]

    def __copy__(self) -> Any:
        alias = cast(Tensor, self).detach()
        return nn.Parameter(alias, self.requires_grad) if isinstance(self, nn.Parameter) else alias

    def __format__(self, spec: str) -> str:
        self._owner.prepare_read(self._shown)
        return self._shown.detach().__format__(spec)

    def __repr__(self, **kwargs: Any) -> str:
        self._owner.prepare_read(self._shown)
        return repr(self._shown)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._owner.prepare_read(self._shown)
        return self._copied().__reduce_ex__(protocol)  # files, and other processes, get a tensor of torch

    def _copied(self) -> Tensor:
        copied = self._shown.detach().clone()
        if isinstance(self, nn.Parameter):
            return nn.Parameter(copied, self.requires_grad)
        return copied.requires_grad_(cast(Tensor, self).requires_grad)

    def _lend(self) -> Tensor:
        return self._lend_memory(self._shown.detach()).requires_grad_(self._shown.requires_grad)

    def _lend_memory(self, memory: Tensor) -> Tensor:
        if memory.numel() == 0:
            return memory
        lent = LentMemory(memory)
        self._owner.note_lent(lent)
        return lent.take()

    def numpy(self, *args: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
        """As of a tensor."""
        return self._lend().numpy(*args, **kwargs)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
        return self._lend().__array__(*args, **kwargs)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._lend().__dlpack__(*args, **kwargs)

    def untyped_storage(self) -> Any:
        """As of a tensor: the memory of all tables of the pool."""
        whole = torch.tensor([], dtype=self._shown.dtype).set_(self._shown.untyped_storage())
        return self._lend_memory(whole).untyped_storage()

    def storage(self) -> Any:
        """As of a tensor: the memory of all tables of the pool."""
        return torch.storage.TypedStorage(wrap_storage=self.untyped_storage(), dtype=self._shown.dtype, _internal=True)

    def data_ptr(self) -> int:
        """As of a tensor; what is written there counts until the next batch."""
        self._owner.prepare_write(self._shown)
        return self._shown.data_ptr()

    def is_pinned(self, *args: Any, **kwargs: Any) -> bool:
        """False, of page-locked tables too: TorchRec makes ShardedTensors of tables that say so, and of no others."""
        return False

    def share_memory_(self) -> NoReturn:
        """Refused: the table would stay where it is. Raises ConfigError."""
        raise ConfigError(
            "share_memory_() of a table behind a scratchpad: tables cannot be moved to shared memory. Give other "
            "processes a copy (clone()), or files (CheckpointManager, to_stock())."
        )

    def tolist(self) -> Any:
        """As of a tensor."""
        self._owner.prepare_read(self._shown)
        return self._shown.tolist()


class TableView(_ShowsTable, Tensor):  # type: ignore[misc]  # it takes over what Tensor has
    """A view of host tables; see the module."""

    @staticmethod
    def __new__(cls, shown: Tensor, owner: TableOwner) -> Self:  # noqa: D102
        # .data: torch counts every operation that writes, on the view, even one that the table need not hear of. So the
        # view has a count of its own, and __torch_dispatch__ counts on the table.
        view: Self = Tensor._make_subclass(cls, shown.data, shown.requires_grad)
        view._shown, view._owner = shown, owner
        return view

    def __init__(self, shown: Tensor, owner: TableOwner) -> None:
        super().__init__()


class TableParameter(_ShowsTable, TableBatchedEmbeddingSlice):
    """A view of one table as the parameter that TorchRec's fused kernels show.

    Made by :meth:`of`, because TorchRec's class sets the constructor.
    """

    @classmethod
    def of(cls, weights: nn.Parameter, table: Tensor, first: int, last: int, owner: TableOwner) -> "TableParameter":
        """Make one of some rows; `weights` is the table's memory in one piece.

        Shapes: `weights` [R * D], `table` [R, D], returns [rows, D].
        """
        dim = table.shape[1]
        parameter = cls(weights, first * dim, last * dim, -1, dim)
        parameter._shown, parameter._owner = table[first:last], owner
        return parameter

    def _copied(self) -> Tensor:
        values = self._shown.clone().view(-1)
        copied = TableBatchedEmbeddingSlice(values, 0, values.numel(), -1, self._shown.shape[1])
        return copied.requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._owner.prepare_read(self._shown)
        return nn.Parameter(self._shown.clone(), self.requires_grad).__reduce_ex__(protocol)


def shown(tensor: Tensor) -> Tensor:
    """The tensor behind a view, for this package's own use: nobody is asked before it is read or written."""
    return tensor._shown if isinstance(tensor, _ShowsTable) else tensor


def to_write(tensor: Tensor) -> Tensor:
    """The tensor behind a view, whose owner expects it to be written until the next batch; for this package alone."""
    if isinstance(tensor, _ShowsTable):
        tensor._owner.prepare_write(tensor._shown)
        return tensor._shown.detach()
    return tensor.detach()


# Read nothing, and show nothing.
_METADATA = frozenset({torch.ops.aten.is_pinned.default, torch.ops.aten.alias.default, torch.ops.aten.detach.default})

# Operations that name rows of their first argument.
_OF_ROWS = frozenset({torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default})

# What fills a table with random numbers.
_DRAWS = frozenset({torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default})


def _draw(func: Any, table: Tensor, *args: Any, device: torch.device, **kwargs: Any) -> Tensor:
    """Fill a table on the host with what a device draws: initial weights of 10 GB in a second instead of 18."""
    values = table.view(-1)
    drawn = torch.empty(min(NUM_DRAWN_TOGETHER, values.numel()), dtype=table.dtype, device=device)
    for some in values.split(NUM_DRAWN_TOGETHER):
        some.copy_(func(drawn[: some.numel()], *args, **kwargs))
    return table


def _on_rows(func: Any, table: Any, indices: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation that names rows of a view on these rows alone; None if it must be run on the whole table.

    What is read comes to the device that the indices are on: there the caller computes what is to be written.
    """
    if not isinstance(table, _ShowsTable) or len(indices) != 1 or any(isinstance(arg, _ShowsTable) for arg in args):
        return None
    named, num_rows = indices[0], table._shown.shape[0]
    if not isinstance(named, Tensor) or named.dim() != 1 or named.dtype not in (torch.int32, torch.int64):
        return None
    rows, places = named.cpu().long().unique(return_inverse=True)
    # torch's own operation has the errors for rows that are not there, and is faster for most of a table.
    if not 0 < rows.numel() <= num_rows // 2 or int(rows[0]) < 0 or int(rows[-1]) >= num_rows:
        return None
    values = table._owner.read_rows(table._shown, rows)
    if values is None:
        return None
    if func is torch.ops.aten.index.Tensor:
        return values.index_select(0, places).to(named.device)
    func(values, [places], *(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args), **kwargs)
    table._owner.write_rows(table._shown, rows, values)
    return table


def _unwrap(value: Any, views: list[_ShowsTable]) -> Any:
    if not isinstance(value, _ShowsTable):
        return value
    views.append(value)
    return value._shown


def _wrap(value: Any, views: list[_ShowsTable]) -> Any:
    """A result that shows a table becomes a view; one that is an argument stays that argument."""
    if not isinstance(value, Tensor) or isinstance(value, _ShowsTable):
        return value
    for view in views:
        if value is view._shown:
            return view
    for view in views:
        if value.device == view._shown.device and _shares_memory(value, view._shown):
            return TableView(value, view._owner)
    return value


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.layout == torch.strided and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation may write; of other libraries than ATen, which do not always say, all of them."""
    named = list(zip(func._schema.arguments, args, strict=False))
    named += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
    is_known = func.namespace in ("aten", "prims")
    written: list[Any] = []
    for argument, value in named:
        if not is_known or (argument.alias_info is not None and argument.alias_info.is_write):
            tree_map(written.append, value)
    return written
