# SPDX-License-Identifier: BSD-3-Clause
"""The tree of errors is what its drawing says."""

import builtins
import inspect
import re

import torchrec_scratchpipe
from torchrec_scratchpipe import errors

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, BaseException) and kind.__module__ == errors.__name__
}
DRAWN = dict(re.findall(r"[├└]── (\w+) +\((\w+)\) +\S", errors.__doc__ or ""))


def test_every_error_is_drawn_with_its_bases_under_the_root() -> None:
    bases = {name: [base.__name__ for base in kind.__bases__] for name, kind in CLASSES.items()}
    assert bases.pop("ScratchPipeError") == ["Exception"]
    assert {name: ["ScratchPipeError", standard] for name, standard in DRAWN.items()} == bases
    assert all(issubclass(getattr(builtins, standard), Exception) for standard in DRAWN.values())


def test_every_error_is_public() -> None:
    assert sorted(errors.__all__) == sorted(CLASSES)
    assert set(CLASSES) <= set(torchrec_scratchpipe.__all__)


def test_every_error_says_what_it_means() -> None:
    assert all(kind.__doc__ for kind in CLASSES.values())
