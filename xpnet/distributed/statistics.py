"""Statistics over the rows of all ranks, for layers that normalize by the whole batch."""

from xpnet.backends import Array, Backend
from xpnet.distributed.process_group import ProcessGroup


def moments_over_ranks(
    backend: Backend, group: ProcessGroup, rows: Array, has_no_rows: bool
) -> tuple[Array, Array, int]:
    """(mean, variance) of each column over the rows of all ranks, and the number of these rows.

    Each rank has a count n, a mean m and a variance v. With N = Σ n, the mean of all rows is M = Σ n m / N, and their
    variance Σ n (v + (m - M)²) / N (Chan et al. 1979). A rank with `has_no_rows` has one placeholder row, with n = 0.
    """
    xp = backend.xp
    mean, variance = (a.astype(xp.float64) for a in backend.moments(rows))
    counts = group.all_gather(0 if has_no_rows else len(rows))
    share = counts[group.rank] / max(1, sum(counts))
    common_mean = mean * share
    group.all_reduce(common_mean)
    common_variance = (variance + xp.square(mean - common_mean)) * share
    group.all_reduce(common_variance)
    return common_mean.astype(rows.dtype), common_variance.astype(rows.dtype), sum(counts)


def sums_over_ranks(group: ProcessGroup, arrays: tuple[Array, ...], has_no_rows: bool) -> tuple[Array, ...]:
    """The sums of these arrays over all ranks, as new arrays. A rank with `has_no_rows` adds nothing."""
    sums = tuple(array * (0.0 if has_no_rows else 1.0) for array in arrays)
    for array in sums:
        group.all_reduce(array)
    return sums
