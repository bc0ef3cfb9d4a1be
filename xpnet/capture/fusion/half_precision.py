"""Half precision: small products round float32 matrices themselves, and large ones read matrices in 16 bits."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from xpnet.backends import Array
from xpnet.backends.cuda.cublas import HalfMatrix, elements
from xpnet.capture.calls import Call, address_of, given_by_name, is_array, mapped, same_view
from xpnet.capture.fusion.matching import calls_between, in_place_of
from xpnet.capture.passes import Memory, without_unused_results

_Key = tuple[int, int, int]  # the owner of an array's memory, its first byte, and the byte after its last


def without_casts(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """cast(x) → x16; matmul(x16, y16, out) → matmul(x, y, out), which rounds x and y, if these are still the same."""
    casts = [call for call in calls if call.function == backend.cast and call.result is not None]
    if not casts:
        return calls
    calls = list(calls)
    for i, call in enumerate(calls):
        if call.function != backend.matmul:
            continue
        *rounded, out = given_by_name(call).values()
        a, b = (_unrounded(calls, casts, call, matrix, memory) for matrix in rounded)
        if a is not None and b is not None:
            calls[i] = in_place_of(call, Call(backend.matmul, (a, b, out), reads=(a, b), writes=(out,)))
    return without_unused_results(calls, memory)


def _unrounded(calls: Sequence[Call], casts: Sequence[Call], user: Call, matrix: Any, memory: Memory) -> Array | None:
    """The float32 matrix of which a call uses this rounded copy; None if it has changed since."""
    if is_array(matrix):
        return matrix
    for cast in casts:
        bits, (x,) = cast.result.bits, cast.args
        source = x if same_view(matrix.bits, bits) else x.T if same_view(matrix.bits, bits.T) else None
        if source is not None:
            changed = any(memory.writes(call, x) for call in calls_between(calls, cast, user))
            return None if changed else source
    return None


def with_half_matrices(calls: list[Call], memory: Memory, backend: Any) -> list[Call]:
    """Let large products read and write matrices in 16 bits, if the model computes in such a precision.

    An array that only such products read is stored in 16 bits, if the call that writes it can do that. Of another array
    that they read, to_halves(x, copy) makes one copy for all of them. The copy of the weights is written by the update.
    """
    precision = next((p for call in calls if (p := half_precision_of(call, backend)) is not None), None)
    if precision is None:
        return calls
    calls = _with_copied_weights(calls, precision, memory, backend)
    flexible = [_flexible(call, backend) for call in calls]
    stored = _stored_in_halves(calls, flexible, memory, backend)
    copies = copied_weights(calls, backend)  # (array that has not changed since, copy)
    result: list[Call] = []

    def in_halves(a: Array) -> HalfMatrix:
        if not a.flags.c_contiguous:
            return in_halves(a.T).T
        if _key(a, memory) in stored:
            return HalfMatrix(_bits_of(a), precision)
        x, copy = next(((x, copy) for x, copy in copies if memory.overlap(a, x)), (a, None))
        if copy is None or not _within(a, x):
            x, copy = a, HalfMatrix(memory.own(backend.empty(a.shape, "uint16")), precision)
            copies.append((x, copy))
            rounds = Call(backend.to_halves, (x, copy), reads=(x,), writes=(copy.bits,))
            result.append(in_place_of(call, rounds))
        return _part(copy, x, a)

    for call, arrays in zip(calls, flexible, strict=True):
        needed = arrays[:2] if half_precision_of(call, backend) else ()
        halves = {id(a): in_halves(a) for a in arrays if _key(a, memory) in stored or any(a is b for b in needed)}
        result.append(_with(call, halves))
        copies = [(x, copy) for x, copy in copies if not memory.writes(call, x)]
    return result


def copied_weights(calls: Sequence[Call], backend: Any) -> list[tuple[Array, HalfMatrix]]:
    """The vectors of weights that are updated by these calls, together with copies, which must be right before them."""
    updates = [given_by_name(call) for call in calls if call.function == backend.whole_update]
    copied = [(given["vectors"][0], given["copy"]) for given in updates if given.get("copy") is not None]
    return copied[:1]  # all updates of a step write into one copy


def rounded_weight(a: Array, calls: Sequence[Call], backend: Any) -> Any:
    """A weight in such a copy of all weights, or the array itself if there is no copy of it."""
    return next((_part(copy, x, a) for x, copy in copied_weights(calls, backend) if _within(a, x)), a)


def _with_copied_weights(calls: list[Call], precision: str, memory: Memory, backend: Any) -> list[Call]:
    """Let the update write a copy of all weights, if only the update changes them, and large products read most."""
    updates = [call for call in calls if call.function == backend.whole_update]
    if not updates:
        return calls
    weights = given_by_name(updates[0])["vectors"][0]
    factors = [a for call in calls if half_precision_of(call, backend) for a in _flexible(call, backend)[:2]]
    sizes = {_key(a, memory): a.size for a in factors if memory.overlap(a, weights)}
    changed = any(memory.writes(call, weights) for call in calls if call.function != backend.whole_update)
    if changed or 2 * sum(sizes.values()) < weights.size:
        return calls
    with backend.lasting_memory():
        copy = HalfMatrix(backend.empty(weights.shape, "uint16"), precision)
    return [
        replace(call, kwargs={**call.kwargs, "copy": copy}, writes=(*call.writes, copy.bits))
        if call.function == backend.whole_update
        else call
        for call in calls
    ]


def half_precision_of(call: Call, backend: Any) -> str | None:
    """The precision in which a product should read matrices in 16 bits; None if not, and for other calls."""
    if call.function not in (backend.matmul, backend.matmul_bias):
        return None
    a, b, *_ = given_by_name(call).values()
    if not all(is_array(x) and x.dtype == "float32" and _is_contiguous(x) for x in (a, b)):
        return None
    precision: str | None = backend.half_precision_of(*a.shape, b.shape[1])
    return precision


def _is_contiguous(a: Array) -> bool:
    return bool(a.flags.c_contiguous or a.T.flags.c_contiguous)


def _flexible(call: Call, backend: Any) -> tuple[Array, ...]:
    """The arrays that a call accepts in 16 bits. It is all or none of them for relu_grad_sum_rows."""
    arrays = (*call.reads, *call.writes)
    plain = call.result is None and all(a.dtype == "float32" and a.flags.c_contiguous for a in arrays)
    if half_precision_of(call, backend):
        a, b, *_ = given_by_name(call).values()
        out = given_by_name(call)["out"]
        return (a, b, out) if out.flags.c_contiguous else (a, b)
    if call.function == backend.relu_grad_sum_rows and plain:
        return call.args[:3]
    if call.function in (backend.relu, backend.relu_grad, backend.add_arrays, backend.multiply_arrays) and plain:
        return call.writes
    return ()


def _stored_in_halves(
    calls: Sequence[Call], flexible: Sequence[tuple[Array, ...]], memory: Memory, backend: Any
) -> set[_Key]:
    """The keys of arrays made in the step that all their users accept in 16 bits."""
    if any(call.opaque for call in calls):
        return set()
    uses: dict[int, set[tuple[_Key, bool]]] = {}  # by owner: the key, and whether it is accepted
    for call, arrays in zip(calls, flexible, strict=True):
        accepted = {id(a) for a in arrays if a.dtype == "float32" and _is_contiguous(a)}
        for a in (*call.reads, *call.writes):
            whole = id(a) in accepted and memory.reusable(a)
            uses.setdefault(memory.owner(a), set()).add((_key(a, memory), whole))
    stored = {
        key
        for others in uses.values()
        for key, _ in others
        if all(accepted and other == key for other, accepted in others if other[1] < key[2] and key[1] < other[2])
    }
    all_or_none = [
        {_key(a, memory) for a in arrays}
        for call, arrays in zip(calls, flexible, strict=True)
        if call.function == backend.relu_grad_sum_rows
    ]
    while (some := next((keys for keys in all_or_none if keys & stored and keys - stored), None)) is not None:
        stored -= some
    return stored


def _key(a: Array, memory: Memory) -> _Key:
    return memory.extent(a)[1:]


def _within(a: Array, x: Array) -> bool:
    return bool(address_of(x) <= address_of(a) and address_of(a) + a.nbytes <= address_of(x) + x.nbytes)


def _part(copy: HalfMatrix, x: Array, a: Array) -> HalfMatrix:
    """What a copy of x contains of a contiguous array a, which is a part of x."""
    first = (address_of(a) - address_of(x)) // a.itemsize
    return HalfMatrix(copy.bits.reshape(-1)[first : first + a.size].reshape(a.shape), copy.precision)


def _bits_of(a: Array) -> Array:
    """An array of uint16 in the memory of a contiguous float32 array, of the same shape."""
    return a.reshape(-1).view("uint16")[: a.size].reshape(a.shape)


def _with(call: Call, halves: dict[int, HalfMatrix]) -> Call:
    """A call with matrices in 16 bits in place of the arrays with these ids."""

    def swapped(a: Any) -> Any:
        return halves.get(id(a), a)

    reads, writes = (tuple(elements(swapped(a)) for a in arrays) for arrays in (call.reads, call.writes))
    return replace(
        call, args=mapped(swapped, call.args), kwargs=mapped(swapped, call.kwargs), reads=reads, writes=writes
    )
