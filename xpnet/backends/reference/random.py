"""Random numbers inside a step: a counter-based hash of (seed, layer, step, row, column), equal on every device."""

from collections.abc import Sequence

from xpnet.backends.arrays import Array
from xpnet.backends.base import Device

_MASK32 = 0xFFFFFFFF


class RandomOperators(Device):
    def random_bits(self, key: Sequence[int], rows: int, columns: int, first_row: int = 0) -> Array:
        """Uniform uint32 noise (rows, columns), a function of (key, row, column) alone.

        `first_row` is the number of row 0 in the global batch, so that parts of a batch see the noise of the whole.
        """
        row_hash, word = self._hash_rows(key, rows, first_row)
        column_hash = _hash32_array(self.xp.arange(columns, dtype=self.xp.uint32) ^ word)
        return _hash32_array(row_hash[:, None] ^ column_hash[None, :])

    def dropout_mask(self, key: Sequence[int], rate: float, out: Array, first_row: int = 0) -> Array:
        """out (rows, columns) = 0 with probability `rate`, where `random_bits` are low, else 1 / (1 - rate)."""
        rows, columns = out.shape
        out[...] = self.random_bits(key, rows, columns, first_row) >= int(rate * 2**32)
        out *= 1.0 / (1.0 - rate)
        return out

    def _hash_rows(self, key: Sequence[int], rows: int, first_row: int) -> tuple[Array, int]:
        """(the hash of each row's number, the word to hash with the number of a column)."""
        xp = self.xp
        word = _hash_key(key)
        row = xp.arange(first_row, first_row + rows, dtype=xp.uint64)
        # Both halves of the row's number are hashed, so that more than 2**32 rows do not repeat.
        high = _hash32_array((row >> 32).astype(xp.uint32) ^ word)
        return _hash32_array(high ^ (row & _MASK32).astype(xp.uint32)), _hash32(word ^ 0x9E3779B9)


def _hash32_array(h: Array) -> Array:
    """The hash "lowbias32" of each element of a uint32 array, in place.

    A bijection of 32 bits that flips each output bit with a probability close to ½. Wellons 2018, "Prospecting for hash
    functions", https://nullprogram.com/blog/2018/07/31/
    """
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    h ^= h >> 16
    return h


def _hash32(h: int) -> int:
    """The same hash of a Python int."""
    h ^= h >> 16
    h = h * 0x7FEB352D & _MASK32
    h ^= h >> 15
    h = h * 0x846CA68B & _MASK32
    return h ^ h >> 16


def _hash_key(key: Sequence[int]) -> int:
    """Hash (seed, layer, step) into one 32-bit word. Of 64-bit parts, both halves count."""
    word = 0
    for part in key:
        word = _hash32(word ^ (part & _MASK32))
        word = _hash32(word ^ (part >> 32 & _MASK32) ^ 0x5BD1E995)
    return word


def step_word(key: Sequence[int], step: int) -> tuple[float]:
    """The 32-bit word from which the noise of this step is hashed, as the numbers of a step's update on a GPU."""
    return (float(_hash_key((*key, step))),)
