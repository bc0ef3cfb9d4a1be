"""Several ranks make the same run as one: as threads of this process, and by a real mpiexec where there is one."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from strict import StrictBackend
from threads_as_ranks import on_ranks

import xpnet
from xpnet import callbacks, datasets, distributed, layers, losses, optimizers, training
from xpnet.errors import ArgumentError, DistributedError, DivergenceError, MissingPackageError
from xpnet.ranks import ALONE, Ranks

X, Y = (a[:203] for a in datasets.digits())
X = X.reshape(203, 64) / 16.0
IMAGES = X.reshape(-1, 8, 8, 1)


def mlp(backend="cpu", seed=3):
    stack = [layers.Dense(24, l2=1e-3), layers.ReLU(), layers.Dropout(0.3), layers.Dense(10)]
    return xpnet.Sequential(stack, (64,), backend=backend, seed=seed, dtype="float64")


def cnn(backend="cpu"):
    stack = [
        # Without a bias, whose gradient before a BatchNorm is rounding alone, of which Adam would make whole steps.
        *[layers.Conv2D(4, 3, padding="same", use_bias=False), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2)],
        *[layers.Flatten(), layers.Dropout(0.2), layers.Dense(12), layers.LayerNorm(), layers.Dense(10)],
    ]
    return xpnet.Sequential(stack, (8, 8, 1), backend=backend, seed=3, dtype="float64")


def fit(model, ranks, x=X, y=Y, **options):
    """(figures, weights) of a run."""
    given = {"epochs": 3, "batch_size": 32, "optimizer": optimizers.Adam(0.01), "verbose": 0, **options}
    history = model.fit(x, y, distributed=ranks, **given)
    return dict(history), model.state_dict()


def agree(got, want, rtol=1e-10):
    for name, values in want[0].items():
        np.testing.assert_allclose(got[0][name], values, rtol=rtol, err_msg=name)
    for name, value in want[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=rtol, atol=rtol * np.abs(value).max(), err_msg=name)


KINDS = {
    "as it is": {},
    "in order": {"shuffle": False},
    "accumulated": {"accumulate": 3},
    "sample weights": {"sample_weight": np.linspace(0.0, 2, 203)},
    "class weights": {"class_weight": {3: 5.0}},
    "a loss that sums": {"y": np.eye(10)[Y], "loss": losses.HalfSquaredError("sum"), "optimizer": optimizers.SGD(1e-3)},
    "metrics": {"metrics": ["accuracy", "f1", "top_k_accuracy"]},
    "squares": {"y": np.eye(10)[Y], "loss": "mse", "metrics": ["r2", "mae"]},
    "validated": {"validation_data": (X[:31], Y[:31])},
    "clipped": {"optimizer": optimizers.AdamW(0.01, clip_norm=0.1)},
    "in one batch": {"batch_size": None},
    "fewer rows than ranks": {"batch_size": 2, "epochs": 1},
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_any_number_of_ranks_makes_the_same_run(options, size):
    want = fit(mlp(), False, **options)
    results = on_ranks(size, lambda ranks: fit(mlp(), ranks, **options))
    for result in results:
        agree(result, want)
        assert result[0] == results[0][0]
        for name, value in result[1].items():
            np.testing.assert_array_equal(value, results[0][1][name])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("batch_size", [32, 3])
def test_a_batch_normalised_over_all_ranks(size, batch_size):
    options = {"x": IMAGES[:99], "y": Y[:99], "batch_size": batch_size, "epochs": 2}
    want = fit(cnn(), False, **options)
    for result in on_ranks(size, lambda ranks: fit(cnn(), ranks, **options)):
        agree(result, want)


def test_a_batch_normalised_by_each_rank_for_itself():
    options = {"x": IMAGES, "batch_size": 32, "epochs": 1}
    want = fit(cnn(), False, **options)
    result, other = on_ranks(2, lambda ranks: fit(cnn(), ranks, **options), batch_norm="per rank")
    assert abs(result[0]["loss"][0] - want[0]["loss"][0]) > 1e-6
    for name, value in result[1].items():
        if "running" not in name:
            np.testing.assert_array_equal(value, other[1][name])


@pytest.mark.parametrize("weights", [None, np.linspace(0.1, 2, 203)])
@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_reads_its_own_rows_of_a_stream(size, weights):
    class Disk:
        """An array on disk, that notes which rows are read."""

        def __init__(self):
            self.shape, self.dtype, self.rows = X.shape, X.dtype, []

        def __len__(self):
            return len(X)

        def __getitem__(self, key):
            self.rows.append(np.arange(len(X))[key])
            return X[key]

    def stream(x):
        return datasets.Stream(x, Y, weights, block=40, window_bytes=2 * 40 * 64 * 8)

    want = fit(mlp(), False, stream(X), None, batch_size=20, epochs=2)
    disks = [Disk() for _ in range(size)]
    results = on_ranks(size, lambda ranks: fit(mlp(), ranks, stream(disks[ranks.rank]), None, batch_size=20, epochs=2))
    for result in results:
        agree(result, want)
    read = [np.concatenate(disk.rows) for disk in disks]
    assert sorted(np.concatenate(read)) == sorted([*range(203)] * 2), "each row once an epoch, by one rank"


def test_batches_of_a_stream_are_shared():
    def batches():
        return ((X[i : i + 20], Y[i : i + 20]) for i in range(0, 203, 20))

    want = fit(mlp(), False, batches, None)
    for result in on_ranks(3, lambda ranks: fit(mlp(), ranks, batches, None)):
        agree(result, want)


def test_on_the_devices_that_refuse_what_cupy_refuses():
    want = fit(mlp(), False)
    for make in (StrictBackend, emulated):
        for result in on_ranks(2, lambda ranks, make=make: fit(mlp(make()), ranks)):
            agree(result, want, rtol=1e-8)


def emulated():
    from emulated_cuda import COMPILER, EmulatedGPU

    return EmulatedGPU() if COMPILER else StrictBackend()


def test_only_the_first_rank_prints_and_writes(tmp_path, capfd):
    def work(ranks):
        files = [tmp_path / f"{name} {ranks.rank}" for name in ("log.csv", "run.safetensors")]
        more = [callbacks.CSVLogger(files[0]), callbacks.Checkpoint(files[1], keep_best=1, monitor="loss")]
        return fit(mlp(), ranks, verbose=2, callbacks=more)

    on_ranks(2, work)
    assert capfd.readouterr().out.count("epoch") == 3
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if "epoch" not in name] == ["log.csv 0", "run.safetensors 0"]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (1, 3), (2, 2)])
def test_a_run_resumes_on_another_number_of_ranks(tmp_path, before, after):
    path = tmp_path / "run.safetensors"

    class Stop(callbacks.Callback):
        def on_step_end(self, model, step):
            if step == 10:  # in the middle of the second epoch
                self.run.save(path)

    want = fit(mlp(), False, callbacks=[Stop()])
    on_ranks(before, lambda ranks: fit(mlp(), ranks, callbacks=[Stop()]))

    def again(ranks):
        return fit(mlp(), ranks if ranks.size > 1 else False, callbacks=[Stop()], resume_from=path)

    if before != after:
        with pytest.warns(UserWarning, match=f"ranks was '{before}' and is '{after}'"):
            results = on_ranks(after, again)
    else:
        results = on_ranks(after, again)
    for result in results:
        agree(result, want)


def test_minutes_go_by_one_clock(tmp_path, monkeypatch):
    """Each rank's clock says something else, and all write together nevertheless."""
    clocks = iter(range(10**9))
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(clocks) * 17.0)
    path = tmp_path / "run.safetensors"
    on_ranks(3, lambda ranks: fit(mlp(), ranks, callbacks=[callbacks.Checkpoint(path, every=99, minutes=1)]))
    assert path.exists()


# Disagreement and failure --------------------------------------------------------------------------------------------

OTHERWISE = {
    "the model": (lambda rank: {"build": mlp if rank != 1 else lambda: cnn_of_rows()}, "the model"),
    "the seed": (lambda rank: {"build": lambda: mlp(seed=3 + (rank == 1))}, "the seed"),
    "batch_size": (lambda rank: {"batch_size": 32 + (rank == 1)}, "batch_size = 33, but rank 0 has 32"),
    "the optimiser": (lambda rank: {"optimizer": "sgd" if rank == 1 else "adam"}, "optimizer"),
    "epochs": (lambda rank: {"epochs": 2 + (rank == 1)}, "epochs = 3, but rank 0 has 2"),
    "a length": (lambda rank: {"x": X[: 203 - (rank == 1)], "y": Y[: 203 - (rank == 1)]}, "samples = 202"),
    "the data": (lambda rank: {"x": X + (rank == 1)}, "the data"),
    "the labels": (lambda rank: {"y": (Y + (rank == 1)) % 10}, "the data"),
    "callbacks": (lambda rank: {"callbacks": [callbacks.EarlyStopping("loss")] * (rank == 1)}, "callbacks"),
}


def cnn_of_rows():
    return xpnet.Sequential([layers.Dense(10)], (64,), backend="cpu", seed=3, dtype="float64")


@pytest.mark.parametrize(("given", "named"), OTHERWISE.values(), ids=OTHERWISE.keys())
def test_ranks_that_disagree_are_refused_on_all(given, named):
    def work(ranks):
        options = given(ranks.rank)
        with pytest.raises(DistributedError, match=r"^rank 1 has .*give every rank the same") as caught:
            fit(options.pop("build", mlp)(), ranks, **options)
        return str(caught.value)

    said = on_ranks(3, work)
    assert len(set(said)) == 1 and named in said[0]


def test_what_one_rank_cannot_do_stops_all():
    def work(ranks):
        x = X.copy()
        x[5] = np.nan if ranks.rank == 2 else x[5]
        with pytest.raises((DistributedError, xpnet.errors.DataError)) as caught:
            fit(mlp(), ranks, x)
        return str(caught.value)

    first, second, own = on_ranks(3, work)
    assert first == second == f"rank 2 cannot train: DataError: {own}"
    assert own.startswith("x holds NaN or infinity")


def test_divergence_is_found_on_all_ranks_alike():
    def work(ranks):
        with pytest.raises(DivergenceError) as caught:
            fit(mlp(), ranks, optimizer=optimizers.SGD(1e200))
        return str(caught.value)

    said = on_ranks(2, work)
    assert said[0] == said[1] and "in epoch 1" in said[0]


def test_an_error_on_one_rank_ends_the_others(capsys):
    class Fails(callbacks.Callback):
        def on_step_end(self, model, step):
            if self.run.ranks.rank == 1 and step == 4:
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        on_ranks(2, lambda ranks: fit(mlp(), ranks, callbacks=[Fails()]))
    assert "rank 1 of 2 has failed, and ends the others:" in capsys.readouterr().err


class Watches(callbacks.Callback):
    """Which step was the last."""

    def on_step_end(self, model, step):
        self.last = step


def test_one_rank_that_is_interrupted_stops_all_after_the_same_step(monkeypatch, tmp_path):
    """And what was written then goes on as if nothing had been."""
    path = tmp_path / "run.safetensors"

    def work(ranks):
        class Interrupted(threading.Event):
            def is_set(self):
                return (ranks.rank == 1 and watch.last == 9) or super().is_set()

        watch, model = Watches(), mlp()
        event = Interrupted()
        events[threading.get_ident()] = event
        history = model.fit(
            X, Y, epochs=3, batch_size=32, optimizer=optimizers.Adam(0.01), distributed=ranks, verbose=0,
            callbacks=[watch, callbacks.Checkpoint(path, every=99)],
        )  # fmt: skip
        return history.stopped, watch.last, model.state_dict()["0.weight"]

    events = {}
    monkeypatch.setattr(training, "_interruptible", lambda: contextlib.nullcontext(events[threading.get_ident()]))
    (stopped, last, weight), (other, last_too, weight_too) = on_ranks(2, work)
    assert stopped == other == "interrupted" and last == last_too == 9
    np.testing.assert_array_equal(weight, weight_too)
    monkeypatch.undo()

    def again(ranks):
        return fit(mlp(), ranks, resume_from=path, callbacks=[callbacks.Checkpoint(tmp_path / "again.safetensors")])

    want = fit(mlp(), False)
    for result in on_ranks(2, again):
        agree(result, want)


@pytest.mark.parametrize("when", ["on_step_end", "on_epoch_end"])
def test_a_callback_that_stops_on_one_rank_stops_all(when):
    class Stops(Watches):
        def on_epoch_end(self, model, epoch, logs):
            if when == "on_epoch_end" and self.run.ranks.rank == 1:
                self.run.history.stopped = "enough"

        def on_step_end(self, model, step):
            super().on_step_end(model, step)
            if when == "on_step_end" and self.run.ranks.rank == 1 and step == 3:
                self.run.history.stopped = "enough"

    def work(ranks):
        watch = Stops()
        history = mlp().fit(X, Y, epochs=3, batch_size=32, callbacks=[watch], distributed=ranks, verbose=0)
        return history.stopped, watch.last, len(history["loss"])

    (first, second) = on_ranks(2, work)
    assert first == second == ("enough", 3 if when == "on_step_end" else 7, 1)


def test_an_error_before_anything_is_agreed_on_ends_the_others_too(capsys):
    def work(ranks):
        return fit(mlp(), ranks, x=datasets.Stream(X, Y) if ranks.rank == 1 else X)  # and y beside the Stream

    with pytest.raises(xpnet.errors.XpnetError):
        on_ranks(2, work)
    assert "rank 1 of 2 has failed, and ends the others:" in capsys.readouterr().err


# Arguments -----------------------------------------------------------------------------------------------------------


def test_the_rows_of_a_batch_are_shared_evenly_and_in_order():
    for size in (1, 2, 3, 4, 7):
        for rows in (1, 2, 5, 43, 64):
            shares = []
            for rank in range(size):
                ranks = Ranks()
                ranks.rank, ranks.size = rank, size
                shares.append(ranks.share(rows))
            assert [i for share in shares for i in range(rows)[share]] == list(range(rows))
            lengths = [share.stop - share.start for share in shares]
            assert max(lengths) - min(lengths) <= 1


def test_arguments_that_are_none():
    with pytest.raises(ArgumentError, match="distributed must be True, False or a Communicator, not 'yes'"):
        mlp().fit(X, Y, distributed="yes", verbose=0)
    with pytest.raises(ArgumentError, match='batch_norm must be "synchronized" or "per rank"'):
        distributed.Communicator(object(), batch_norm="mine")


def test_without_mpi4py_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(MissingPackageError, match=r'needs mpi4py and an MPI .*Run: pip install "xpnet\[mpi\]"'):
        mlp().fit(X, Y, distributed=True, verbose=0)


def test_alone_nothing_is_added_up():
    assert ALONE.share(7) == slice(0, 7) and ALONE.gather(3) == [3] and ALONE.of_first("a") == "a"
    assert ALONE.any(True) and not ALONE.any(False)


def test_devices_are_dealt_to_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(distributed, "available_backends", lambda: {"gpu": None})
    monkeypatch.setattr("xpnet.backends.gpu.device_count", lambda: 2)
    assert on_ranks(3, lambda ranks: ranks.backend("gpu")) == ["gpu:0", "gpu:1", "gpu:0"]
    assert on_ranks(2, lambda ranks: ranks.backend()) == ["gpu:0", "gpu:1"]
    monkeypatch.setattr(distributed, "available_backends", lambda: {"gpu": "none here"})
    assert on_ranks(2, lambda ranks: ranks.backend()) == ["cpu", "cpu"]
    assert on_ranks(2, lambda ranks: ranks.backend("cpu")) == ["cpu", "cpu"]


# NCCL, recorded ------------------------------------------------------------------------------------------------------


class Nccl:
    """A pretended cupy.cuda.nccl: what it is asked is written down, and the threads of the test do the sums."""

    available = True

    def __init__(self, comm):
        self.calls, self._comm = [], comm

    def get_unique_id(self):
        return ("identity", 42)

    def NcclCommunicator(self, size, identity, rank):  # noqa: N802
        self.calls.append(("create", size, identity, rank))
        return self

    def allReduce(self, send, receive, count, kind, operation, stream):  # noqa: N802
        self.calls.append(("allReduce", send == receive, count, kind, operation, stream))
        import ctypes

        dtype = {7: np.float32, 8: np.float64, 4: np.int64}[kind]
        memory = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(send)
        self._comm.Allreduce(None, np.frombuffer(memory, dtype=dtype))


def test_between_gpus_gradients_are_added_up_by_nccl_on_the_models_stream(monkeypatch):
    from emulated_cuda import COMPILER, EmulatedGPU

    if not COMPILER:
        pytest.skip("the kernels of a GPU are emulated by g++, and there is none")

    def work(ranks):
        gpu = EmulatedGPU()
        gpu.index = ranks.rank  # as if each had its own
        monkeypatch.setattr(gpu, "device", lambda: __import__("contextlib").nullcontext())
        gpu.xp.cuda.nccl = nccl = Nccl(ranks._comm)
        return fit(mlp(gpu), ranks, epochs=1), nccl.calls

    want = fit(mlp(), False, epochs=1)
    results = on_ranks(2, work)
    for rank, (result, calls) in enumerate(results):
        agree(result, want, rtol=1e-8)
        assert calls[0] == ("create", 2, ("identity", 42), rank)
        flat = [call for call in calls[1:] if call[2] > 100]
        assert len(flat) == 7, "one all-reduce an update"
        assert {call[1:5] for call in flat} == {(True, flat[0][2], 8, 0)}
        assert all(call[5] != 0 for call in flat), "not on the default stream"


def test_ranks_that_share_a_gpu_or_lack_nccl_go_through_the_host(caplog):
    from xpnet.backends.collectives import HostCollective, NcclCollective, collective

    def kinds(indices, available):
        def work(ranks):
            gpu = StrictBackend()
            gpu.index = indices[ranks.rank]
            gpu.xp.cuda = type("cuda", (), {"nccl": type("nccl", (), {"available": available[ranks.rank]})})
            return type(collective(gpu, ranks._comm))

        return on_ranks(2, work)

    assert kinds([0, 0], [True, True]) == [HostCollective] * 2
    assert kinds([0, 1], [True, False]) == [HostCollective] * 2
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [
        "several ranks share a GPU",
        "NCCL is missing on rank 1",
    ]
    assert issubclass(NcclCollective, HostCollective)


# By a real MPI -------------------------------------------------------------------------------------------------------

MPIEXEC = shutil.which("mpiexec") or shutil.which("mpiexec", path=str(Path(sys.executable).parent))
ENDS_WITHIN = 10  # seconds, as docs/distributed.md says

PROGRAM = """
import os, signal, sys, time
import numpy as np
sys.path[:0] = [{tests!r}]
from test_distributed import fit, mlp, cnn, X, Y, IMAGES
from xpnet import callbacks, distributed

ranks, what, path = distributed.Communicator(), sys.argv[1], sys.argv[2]

class Dies(callbacks.Callback):
    def on_step_end(self, model, step):
        if ranks.rank == 1 and step == 10:
            print("dying", time.time(), flush=True)
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk is full")

if what in ("mlp", "cnn"):
    result = fit(mlp(), True) if what == "mlp" else fit(cnn(), ranks, IMAGES)
elif what == "disagree":
    fit(mlp(seed=ranks.rank), True)
elif what == "resumed":
    path_too = path + ".safetensors"
    result = fit(mlp(), True, resume_from=path_too, callbacks=[callbacks.Checkpoint(path_too)])
else:
    fit(mlp(), True, callbacks=[callbacks.Checkpoint(path + ".safetensors"), Dies()], epochs=3)
np.savez(path + f"-{{ranks.rank}}.npz", loss=result[0]["loss"], **result[1])
"""


@pytest.fixture
def mpiexec(tmp_path):
    """Runs the program above on so many ranks; (its exit status, what it said, seconds)."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    if MPIEXEC is None:
        pytest.skip("there is no mpiexec")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "XPNET_FAST": "0", "TMPDIR": "/tmp"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(xpnet.__file__).parent.parent), *sys.path])

    def run(size, what, path="run"):
        start = time.monotonic()
        done = subprocess.run(
            [MPIEXEC, "-n", str(size), "--oversubscribe", sys.executable, str(program), what, str(tmp_path / path)],
            capture_output=True, text=True, env=environment, timeout=240, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, time.monotonic() - start

    run.folder, run.environment = tmp_path, environment
    return run


def results_of(folder, size, path="run"):
    for rank in range(size):
        with np.load(folder / f"{path}-{rank}.npz") as arrays:
            yield {"loss": arrays["loss"]}, {name: arrays[name] for name in arrays if name != "loss"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("what", ["mlp", "cnn"])
def test_processes_make_the_same_run_and_repeat_it_to_the_bit(mpiexec, size, what):
    want = fit(mlp(), False) if what == "mlp" else fit(cnn(), False, IMAGES)
    for path in ("first", "second"):
        status, said, _ = mpiexec(size, what, path)
        assert status == 0, said
    first, second = (list(results_of(mpiexec.folder, size, path)) for path in ("first", "second"))
    for one, other in zip(first, second, strict=True):
        agree(one, ({"loss": want[0]["loss"]}, want[1]))
        for name, value in one[1].items():
            np.testing.assert_array_equal(value, other[1][name])
            np.testing.assert_array_equal(value, first[0][1][name])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_rank_that_dies_ends_the_others_and_the_last_checkpoint_resumes(mpiexec, how):
    status, said, _ = mpiexec(2, how)
    ended = time.time()
    assert status != 0, said
    died = float(next(line.split()[1] for line in said.splitlines() if line.startswith("dying")))
    assert ended - died < ENDS_WITHIN
    assert (how == "raises") == ("rank 1 of 2 has failed, and ends the others" in said)
    status, said, _ = mpiexec(4, "resumed")
    assert status == 0, said
    want = fit(mlp(), False)
    for result in results_of(mpiexec.folder, 4):
        agree(result, ({"loss": want[0]["loss"]}, want[1]))


@pytest.mark.slow
def test_processes_that_disagree_end_with_the_reason(mpiexec):
    status, said, seconds = mpiexec(2, "disagree")
    assert status != 0 and "DistributedError: rank 1 has the seed = 1, but rank 0 has 0" in said
    assert seconds < 60


@pytest.mark.slow
def test_the_example_trains_on_two_ranks(mpiexec):
    example = Path(__file__).parent.parent / "examples" / "mnist.py"
    closed = "http://127.0.0.1:9"  # nobody listens there, so a download fails at once, and the bundled digits are taken
    environment = {**mpiexec.environment, "http_proxy": closed, "https_proxy": closed}
    environment |= {"XDG_CACHE_HOME": str(mpiexec.folder), "HOME": str(mpiexec.folder)}
    environment.pop("XPNET_DATA_DIR", None)
    done = subprocess.run(
        [MPIEXEC, "-n", "2", "--oversubscribe", sys.executable, str(example), "--distributed", "--backend", "cpu"],
        capture_output=True, text=True, env=environment, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test accuracy") == 1 and "2 ranks share each batch" in done.stdout
    assert float(done.stdout.split()[-1]) >= 0.97
