# SPDX-License-Identifier: BSD-3-Clause
"""Triton's interpreter, without what it does over and over.

It puts functions of its own into `triton.language` when a kernel starts, and again whenever a kernel calls a function
that is compiled with it. Each time it looks through all names of the language. That is nearly half of its time.
"""

from collections.abc import Callable
from typing import Any


def make_quick() -> None:
    """Have names looked up once, and functions put in once for a kernel."""
    from triton import language
    from triton.runtime import interpreter

    needed = ("_patch_lang", "_patch_builtin", "_patch_attr", "_LangPatchScope", "GridExecutor")
    if not all(hasattr(interpreter, name) for name in needed):
        return  # of another version: it stays as it is
    patch_lang, patch_builtin, call = (
        interpreter._patch_lang,
        interpreter._patch_builtin,
        interpreter.GridExecutor.__call__,
    )
    is_builtin: Callable[[Any], bool] = language.core.is_builtin
    packages = (language, language.core, language.tensor, language.math, language.core.tensor_descriptor_base)
    names = {
        id(package): [name for name in dir(package) if is_builtin(getattr(package, name, None))] for package in packages
    }
    seen_by_kernel: set[int] = set()  # the global names of functions, for the kernel that runs

    def patch_known(package: Any, builder: Any, scope: Any) -> None:
        if id(package) not in names:
            patch_builtin(package, builder, scope)
            return
        for name in names[id(package)]:
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in seen_by_kernel:
            return interpreter._LangPatchScope()
        seen_by_kernel.add(id(function.__globals__))
        return patch_lang(function)

    def call_kernel(self: Any, *args: Any, **kwargs: Any) -> None:
        seen_by_kernel.clear()
        call(self, *args, **kwargs)

    interpreter._patch_builtin, interpreter._patch_lang = patch_known, patch_once
    interpreter.GridExecutor.__call__ = call_kernel
