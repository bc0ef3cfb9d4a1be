"""Random programs on arrays: views, in-place operations, aliases, reductions, slices and arrays of indices."""

import random

import numpy as np

UNARY = ["negative", "tanh", "abs", "square", "sign", "ceil", "reciprocal", "exp", "sqrt"]
BINARY = ["add", "subtract", "multiply", "maximum", "minimum", "true_divide"]
NUMBERS = [0.0, -0.0, 1.0, 0.5, -2.0, 3, -1, 0]


class Program:
    """A program of random operations on some arrays, which a seed describes."""

    def __init__(self, seed, length=30):
        self.seed, self.length = seed, length

    def arrays(self, seed):
        """Values for the arrays that the program reads and writes."""
        choose, rng = random.Random(self.seed), np.random.default_rng([self.seed, seed])
        dtype = choose.choice(["float32", "float32", "float64"])
        rows, columns = choose.randint(1, 5), choose.randint(1, 5)
        shapes = [
            (rows, columns),
            (rows, columns),
            (columns,),
            (rows,),
            (columns, choose.randint(1, 4)),
            (2, rows, columns),
        ]
        values = [rng.normal(size=shape).astype(dtype) for shape in shapes]
        for a in values:
            a[rng.random(a.shape) < 0.2] = choose.choice([0.0, -0.0, 1.0])
        return values

    def __call__(self, xp, *given):
        *arrays, number = given
        choose = random.Random(self.seed + 1)
        self.xp, self.number, self.dtype = xp, number, arrays[0].dtype
        self.model, self.pool, self.done = list(arrays), list(arrays), []
        for _ in range(choose.randint(3, self.length)):
            state = choose.getstate()
            if self.done and choose.random() < 0.15:  # the same operation again, on what the arrays are now
                choose = self.again(choose.choice(self.done), choose)
                continue
            operation = choose.choice(OPERATIONS)
            position = len(self.pool)
            operation(self, choose)
            self.done.append((operation, state, position))
            del self.pool[6:-14]
        for a in self.pool[-6:]:
            targets = [m for m in self.model if m.shape == a.shape]
            if targets and a.dtype == self.dtype:
                choose.choice(targets)[...] = a

    def again(self, done, choose):
        operation, state, _ = done
        repeated = random.Random()
        repeated.setstate(state)
        repeated.random()
        repeated.choice(OPERATIONS)
        operation(self, repeated)
        return choose

    # What operations use ---------------------------------------------------------------------------------------------

    def one(self, choose, wanted=lambda a: True):
        found = [a for a in self.pool if wanted(a) and a.ndim and a.dtype == self.dtype]
        return choose.choice(found)

    def like(self, choose, a):
        """An array of the shape of `a`, or of one that can be broadcast to it, or a number."""
        kind = choose.random()
        if kind < 0.25:
            return choose.choice([*NUMBERS, self.number])
        found = [b for b in self.pool if b.dtype == self.dtype and _fits(b.shape, a.shape)]
        return choose.choice(found)

    def keep(self, a):
        if a.ndim == 0 and not hasattr(a, "trace"):
            a = np.asarray(a)
        self.pool.append(a)


def _fits(shape, target):
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape[::-1], target[::-1], strict=False))


def _unary(p, choose):
    a = p.one(choose)
    p.keep(getattr(p.xp, choose.choice(UNARY))(a))


def _unary_out(p, choose):
    a = p.one(choose)
    out = p.one(choose, lambda b: b.shape == a.shape)
    getattr(p.xp, choose.choice(UNARY))(a, out=out)


def _binary(p, choose):
    a = p.one(choose)
    b = p.like(choose, a)
    name, swapped = choose.choice(BINARY), choose.random() < 0.3
    p.keep(getattr(p.xp, name)(*((b, a) if swapped else (a, b))))


def _operator(p, choose):
    a = p.one(choose)
    b, kind = p.like(choose, a), choose.randrange(6)
    p.keep([lambda: a + b, lambda: a - b, lambda: b * a, lambda: b - a, lambda: a / (abs(a) + 1), lambda: a**2][kind]())


def _binary_out(p, choose):
    a = p.one(choose)
    b, out = p.like(choose, a), p.one(choose, lambda c: c.shape == a.shape)
    getattr(p.xp, choose.choice(BINARY))(a, b, out=out)


def _in_place(p, choose):
    a = p.one(choose)
    b, kind = p.like(choose, a), choose.randrange(3)
    if kind == 0:
        a += b
    elif kind == 1:
        a -= b
    else:
        a *= b


def _in_place_of_a_part(p, choose):
    a, b = p.one(choose), choose.choice([0.5, 2.0])
    a[choose.randrange(len(a)), ...] *= b


def _view(p, choose):
    a = p.one(choose)
    middle = choose.randint(0, len(a) - 1)
    p.keep(choose.choice([
        lambda: a[: middle + 1], lambda: a[middle:], lambda: a[::-1], lambda: a[::2], lambda: a.T,
        lambda: a[..., None], lambda: a[None], lambda: a[..., middle % a.shape[-1] :], lambda: a[..., 0, None],
        lambda: p.xp.swapaxes(a, 0, -1), lambda: p.xp.broadcast_to(a, (2, *a.shape)).copy(), lambda: p.xp.flip(a),
    ])())  # fmt: skip


def _reshape(p, choose):
    a = p.one(choose)
    p.keep(choose.choice([
        lambda: a.reshape(-1), lambda: a.reshape(a.shape[::-1]), lambda: a.ravel(), lambda: a.T.reshape(-1),
        lambda: a.flatten(), lambda: p.xp.ravel(a), lambda: a.reshape(1, -1),
    ])())  # fmt: skip


def _fancy(p, choose):
    a = p.one(choose)
    rows = p.xp.asarray([choose.randrange(len(a)) for _ in range(choose.randint(1, 4))])
    p.keep(choose.choice([
        lambda: a[rows], lambda: p.xp.take(a, rows, axis=0), lambda: a.take(rows, axis=0), lambda: a[rows, ...],
    ])())  # fmt: skip


def _fancy_write(p, choose):
    a = p.one(choose)
    rows = choose.sample(range(len(a)), choose.randint(1, len(a)))
    a[p.xp.asarray(rows)] = choose.choice([0.25, a[: len(rows)] * 0.5])


def _indices_of_values(p, choose):
    a = p.one(choose, lambda a: a.ndim == 2)
    kind = choose.randrange(2)
    rows = p.xp.arange(len(a))
    if kind:
        p.keep(a[rows, a.argmax(axis=1)])
    else:
        a[rows, p.xp.argmin(a, axis=1)] -= 1.0


def _reduce(p, choose):
    a = p.one(choose)
    name, axis = choose.choice(["sum", "max", "min", "mean", "var", "prod"]), choose.choice([None, 0, -1])
    keepdims = choose.random() < 0.5
    if choose.random() < 0.5:
        p.keep(getattr(p.xp, name)(a, axis=axis, keepdims=keepdims))
    else:
        p.keep(getattr(a, name)(axis=axis, keepdims=keepdims))


def _reduce_out(p, choose):
    a = p.one(choose, lambda a: a.ndim == 2)
    out = [b for b in p.pool if b.shape == a.shape[:1] and b.dtype == p.dtype]
    if out:
        getattr(p.xp, choose.choice(["sum", "max", "min"]))(a, axis=1, out=choose.choice(out))


def _matmul(p, choose):
    a = p.one(choose, lambda a: a.ndim == 2)
    found = [b for b in p.pool if b.ndim == 2 and len(b) == a.shape[1] and b.dtype == p.dtype]
    if found:
        b = choose.choice(found)
        p.keep(choose.choice([lambda: a @ b, lambda: p.xp.matmul(a, b), lambda: a.dot(b), lambda: p.xp.dot(a, b)])())


def _matmul_out(p, choose):
    a = p.one(choose, lambda a: a.ndim == 2)
    out = p.xp.empty((len(a), len(a)), p.dtype)
    p.xp.matmul(a, a.T, out=out)
    p.keep(out)


def _assign(p, choose):
    a = p.one(choose)
    a[...] = p.like(choose, a)


def _assign_a_part(p, choose):
    a, first = p.one(choose), 0
    first = choose.randrange(len(a))
    a[first:] = choose.choice([0.0, 1.5, a[:1] * 2.0])


def _copy(p, choose):
    a = p.one(choose)
    p.keep(choose.choice([
        lambda: a.copy(), lambda: p.xp.array(a), lambda: p.xp.ascontiguousarray(a), lambda: a.astype("float64"),
        lambda: p.xp.asarray(a), lambda: a.astype(a.dtype, copy=False),
    ])())  # fmt: skip


def _copyto(p, choose):
    a = p.one(choose)
    b = p.one(choose, lambda b: b.shape == a.shape)
    if choose.random() < 0.5:
        p.xp.copyto(a, b)
    else:
        p.xp.copyto(a, b, where=b > 0)


def _made(p, choose):
    shape = p.one(choose).shape
    a = choose.choice([
        lambda: p.xp.zeros(shape, p.dtype), lambda: p.xp.ones(shape, p.dtype), lambda: p.xp.full(shape, 0.5, p.dtype),
        lambda: p.xp.zeros_like(p.one(choose)), lambda: p.xp.empty(shape, p.dtype),
        lambda: p.xp.arange(4).astype(p.dtype), lambda: p.xp.asarray([1.0, 2.0, 3.0], p.dtype),
    ])()  # fmt: skip
    if choose.random() < 0.5 or a.shape == shape:
        a.fill(choose.choice([0.0, -1.0, 2.5]))
    p.keep(a)


def _joined(p, choose):
    a = p.one(choose)
    b = p.one(choose, lambda b: b.shape == a.shape)
    p.keep(choose.choice([
        lambda: p.xp.concatenate([a, b]), lambda: p.xp.stack([a, b]), lambda: p.xp.where(a > b, a, b),
        lambda: p.xp.where(a > 0, b, 0.0), lambda: p.xp.clip(a, -1.0, 1.0), lambda: a.clip(0.0, 0.5),
        lambda: p.xp.cumsum(a, axis=0), lambda: p.xp.roll(a, 1), lambda: p.xp.repeat(a, 2, axis=0),
        lambda: p.xp.einsum("...i,...i->...", a, b), lambda: p.xp.outer(a[..., 0], b[..., 0]),
    ])())  # fmt: skip


def _split(p, choose):
    for part in p.xp.array_split(p.one(choose), 2):
        if len(part):
            p.keep(part)


def _number(p, choose):
    a, n = p.one(choose), p.number
    p.keep(choose.choice([
        lambda: a * n, lambda: a + (1 - 0.9**n), lambda: (2 * n + 1) * a, lambda: a / n, lambda: a - (-n) ** 2,
        lambda: a * (n - 3) / (n * n), lambda: a + -(n * 0.5), lambda: a + (-2) ** (n - 0.5),
    ])())  # fmt: skip


def _at(p, choose):
    a = p.one(choose)
    rows = p.xp.asarray([choose.randrange(len(a)) for _ in range(3)])
    p.xp.add.at(a, rows, 1.0)


def _nothing_that_is_used(p, choose):
    a = p.one(choose)
    (a * 2.0).sum()


OPERATIONS = [
    _unary, _unary_out, _binary, _binary, _operator, _operator, _binary_out, _in_place, _in_place,
    _in_place_of_a_part, _view, _view, _reshape, _fancy, _fancy_write, _indices_of_values, _reduce, _reduce,
    _reduce_out, _matmul, _matmul_out, _assign, _assign, _assign_a_part, _copy, _copy, _copyto, _made, _joined, _split,
    _number, _at, _nothing_that_is_used,
]  # fmt: skip
