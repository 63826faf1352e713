"""What kernels need of the machine: numbers at an address, a function at an address, a pipe.

Threads that are woken, work and say that they are through by these alone never wait for Python's
lock, nor hold it while another would go on (docs/measurements.md: what that gained).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _pointer(_: Any, address: Any) -> Any:
    """An address as `numba.carray` takes it."""

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), make


def _added(_: Any, address: Any, number: Any) -> Any:
    """What an int64 at an address was before `number` was added to it, in one step for all."""

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", where, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), make


def _seen(_: Any, address: Any) -> Any:
    """An int64 that another thread may change."""

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.load_atomic(where, "acquire", 8)

    return types.int64(types.int64), make


def _call(_: Any, function: Any, argument: Any) -> Any:
    """Calls the function at an address, of one int64, which returns nothing."""

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), make


def _transfer(name: str) -> Any:
    """`read` or `write` of the C library: file, address, bytes; what it returns."""

    def make_for(_: Any, file: Any, address: Any, size: Any) -> Any:
        def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(_I64, [_I32, cgutils.voidptr_t, _I64])
            call = cgutils.get_or_insert_function(builder.module, kind, name)
            file, address, size = arguments
            address = builder.inttoptr(address, cgutils.voidptr_t)
            return builder.call(call, [builder.trunc(file, _I32), address, size])

        return types.int64(types.int64, types.int64, types.int64), make

    return make_for


pointer: Any = intrinsic(_pointer)
added: Any = intrinsic(_added)
seen: Any = intrinsic(_seen)
call: Any = intrinsic(_call)
read: Any = intrinsic(_transfer("read"))
write: Any = intrinsic(_transfer("write"))
