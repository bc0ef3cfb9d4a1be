"""Several ranks train the same model as one, as threads of this process and with a real mpiexec if there is one."""

import importlib.util
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
from threads_as_ranks import run_on_ranks

import xpnet
from xpnet import callbacks, datasets, distributed, layers, losses, optimizers
from xpnet.distributed import mpi
from xpnet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from xpnet.errors import ArgumentError, DistributedError, DivergenceError, MissingPackageError
from xpnet.training import loop as training

X, Y = (a[:203] for a in datasets.digits())
X = X.reshape(203, 64) / 16.0
IMAGES = X.reshape(-1, 8, 8, 1)


def mlp(backend="cpu", seed=3):
    stack = [layers.Dense(24, l2=1e-3), layers.ReLU(), layers.Dropout(0.3), layers.Dense(10)]
    return xpnet.Sequential(stack, (64,), backend=backend, seed=seed, dtype="float64")


def cnn(backend="cpu"):
    stack = [
        # A bias before BatchNorm would have a gradient of rounding errors only, which Adam would scale to full steps.
        *[layers.Conv2D(4, 3, padding="same", use_bias=False), layers.BatchNorm(), layers.ReLU(), layers.MaxPool2D(2)],
        *[layers.Flatten(), layers.Dropout(0.2), layers.Dense(12), layers.LayerNorm(), layers.Dense(10)],
    ]
    return xpnet.Sequential(stack, (8, 8, 1), backend=backend, seed=3, dtype="float64")


def fit(model, ranks, x=X, y=Y, **options):
    """Train and return (history, state)."""
    options = {"epochs": 3, "batch_size": 32, "optimizer": optimizers.Adam(0.01), "verbose": 0, **options}
    history = model.fit(x, y, distributed=ranks, **options)
    return dict(history), model.state_dict()


def agree(got, want, rtol=1e-10):
    for name, values in want[0].items():
        np.testing.assert_allclose(got[0][name], values, rtol=rtol, err_msg=name)
    for name, value in want[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=rtol, atol=rtol * np.abs(value).max(), err_msg=name)


KINDS = {
    "defaults": {},
    "in order": {"shuffle": False},
    "accumulated": {"accumulate": 3},
    "scores of all outputs": {"metrics": ["auc", "log_loss", "cohen_kappa", "f1"], "validation_data": (X[:50], Y[:50])},
    "sample weights": {"sample_weight": np.linspace(0.0, 2, 203)},
    "class weights": {"class_weight": {3: 5.0}},
    "a loss that sums": {"y": np.eye(10)[Y], "loss": losses.HalfSquaredError("sum"), "optimizer": optimizers.SGD(1e-3)},
    "metrics": {"metrics": ["accuracy", "f1", "top_k_accuracy"]},
    "squares": {"y": np.eye(10)[Y], "loss": "mse", "metrics": ["r2", "mae"]},
    "validated": {"validation_data": (X[:31], Y[:31])},
    "clipped": {"optimizer": optimizers.AdamW(0.01, clip_norm=0.1)},
    "muon and rates": {"optimizer": optimizers.Muon(matrices=["0.weight"], parameter_rates={"*.bias": 2.0})},
    "in one batch": {"batch_size": None},
    "fewer rows than ranks": {"batch_size": 2, "epochs": 1},
}


def test_averages_and_the_learning_rate_finder_agree_on_all_ranks(tmp_path):
    def run(ranks):
        model, finder = mlp(), callbacks.LearningRateFinder(1e-3, 1.0, steps=9)
        fit(model, ranks, callbacks=finder)
        average = callbacks.ExponentialMovingAverage(0.9, validate=True)
        more = []
        if importlib.util.find_spec("tensorboardX"):
            more = [callbacks.TensorBoard(tmp_path / str(ranks is not False), every=2)]
        history, state = fit(model, ranks, callbacks=[average, *more], validation_data=(X[:31], Y[:31]))
        return {**history, "rates": finder.rates, "losses": finder.losses}, state

    for got in run_on_ranks(2, run):
        agree(got, run(False))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_several_ranks_train_like_one_process(options, size):
    want = fit(mlp(), False, **options)
    results = run_on_ranks(size, lambda ranks: fit(mlp(), ranks, **options))
    for result in results:
        agree(result, want)
        assert result[0] == results[0][0]
        for name, value in result[1].items():
            np.testing.assert_array_equal(value, results[0][1][name])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("batch_size", [32, 3])
def test_batch_norm_normalizes_over_all_ranks(size, batch_size):
    options = {"x": IMAGES[:99], "y": Y[:99], "batch_size": batch_size, "epochs": 2}
    want = fit(cnn(), False, **options)
    for result in run_on_ranks(size, lambda ranks: fit(cnn(), ranks, **options)):
        agree(result, want)


def test_batch_norm_per_rank_normalizes_each_rank_separately():
    options = {"x": IMAGES, "batch_size": 32, "epochs": 1}
    want = fit(cnn(), False, **options)
    result, other = run_on_ranks(2, lambda ranks: fit(cnn(), ranks, **options), batch_norm="per rank")
    assert abs(result[0]["loss"][0] - want[0]["loss"][0]) > 1e-6
    for name, value in result[1].items():
        if "running" not in name:
            np.testing.assert_array_equal(value, other[1][name])


@pytest.mark.parametrize("weights", [None, np.linspace(0.1, 2, 203)])
@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_reads_only_its_rows_of_a_stream(size, weights):
    class Disk:
        """Like an array on disk; records which rows are read."""

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
    results = run_on_ranks(
        size, lambda ranks: fit(mlp(), ranks, stream(disks[ranks.rank]), None, batch_size=20, epochs=2)
    )
    for result in results:
        agree(result, want)
    read = [np.concatenate(disk.rows) for disk in disks]
    assert sorted(np.concatenate(read)) == sorted([*range(203)] * 2), "each row must be read once per epoch by one rank"


def test_batches_of_a_stream_are_split_over_the_ranks():
    def batches():
        return ((X[i : i + 20], Y[i : i + 20]) for i in range(0, 203, 20))

    want = fit(mlp(), False, batches, None)
    for result in run_on_ranks(3, lambda ranks: fit(mlp(), ranks, batches, None)):
        agree(result, want)


def test_several_ranks_train_like_one_process_on_the_stand_ins():
    want = fit(mlp(), False)
    for make in (StrictBackend, emulated_gpu):
        for result in run_on_ranks(2, lambda ranks, make=make: fit(mlp(make()), ranks)):
            agree(result, want, rtol=1e-8)


def emulated_gpu():
    from emulated_cuda import COMPILER, EmulatedGPU

    return EmulatedGPU() if COMPILER else StrictBackend()


def test_only_the_first_rank_prints_and_writes(tmp_path, capfd):
    def work(ranks):
        files = [tmp_path / f"{name} {ranks.rank}" for name in ("log.csv", "run.safetensors")]
        more = [callbacks.CSVLogger(files[0]), callbacks.Checkpoint(files[1], keep_best=1, monitor="loss")]
        return fit(mlp(), ranks, verbose=2, callbacks=more)

    run_on_ranks(2, work)
    assert capfd.readouterr().out.count("epoch") == 3
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if "epoch" not in name] == ["log.csv 0", "run.safetensors 0"]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (1, 3), (2, 2)])
def test_a_run_resumes_on_another_number_of_ranks(tmp_path, before, after):
    path = tmp_path / "run.safetensors"

    class Save(callbacks.Callback):
        def on_step_end(self, model, step):
            if step == 10:  # in the middle of the second epoch
                self.run.save(path)

    want = fit(mlp(), False, callbacks=[Save()])
    run_on_ranks(before, lambda ranks: fit(mlp(), ranks, callbacks=[Save()]))

    def resume(ranks):
        return fit(mlp(), ranks if ranks.size > 1 else False, callbacks=[Save()], resume_from=path)

    if before != after:
        with pytest.warns(UserWarning, match=f"ranks was '{before}' and is '{after}'"):
            results = run_on_ranks(after, resume)
    else:
        results = run_on_ranks(after, resume)
    for result in results:
        agree(result, want)


def test_checkpoints_by_minutes_follow_the_clock_of_one_rank(tmp_path, monkeypatch):
    """The clocks of the ranks differ, but all ranks must write at the same step."""
    clocks = iter(range(10**9))
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(clocks) * 17.0)
    path = tmp_path / "run.safetensors"
    run_on_ranks(3, lambda ranks: fit(mlp(), ranks, callbacks=[callbacks.Checkpoint(path, every=99, minutes=1)]))
    assert path.exists()


# Disagreement and failure --------------------------------------------------------------------------------------------

DISAGREEMENTS = {
    "the model": (lambda rank: {"build": mlp if rank != 1 else lambda: one_layer()}, "the model"),
    "the seed": (lambda rank: {"build": lambda: mlp(seed=3 + (rank == 1))}, "the seed"),
    "batch_size": (lambda rank: {"batch_size": 32 + (rank == 1)}, "batch_size = 33, but rank 0 has 32"),
    "the optimizer": (lambda rank: {"optimizer": "sgd" if rank == 1 else "adam"}, "optimizer"),
    "epochs": (lambda rank: {"epochs": 2 + (rank == 1)}, "epochs = 3, but rank 0 has 2"),
    "the number of samples": (lambda rank: {"x": X[: 203 - (rank == 1)], "y": Y[: 203 - (rank == 1)]}, "samples = 202"),
    "the data": (lambda rank: {"x": X + (rank == 1)}, "the data"),
    "the labels": (lambda rank: {"y": (Y + (rank == 1)) % 10}, "the data"),
    "callbacks": (lambda rank: {"callbacks": [callbacks.EarlyStopping("loss")] * (rank == 1)}, "callbacks"),
}


def one_layer():
    return xpnet.Sequential([layers.Dense(10)], (64,), backend="cpu", seed=3, dtype="float64")


@pytest.mark.parametrize(("options_of", "text"), DISAGREEMENTS.values(), ids=DISAGREEMENTS.keys())
def test_disagreeing_ranks_are_refused_on_all_ranks(options_of, text):
    def work(ranks):
        options = options_of(ranks.rank)
        with pytest.raises(DistributedError, match=r"^rank 1 has .*give every rank the same") as caught:
            fit(options.pop("build", mlp)(), ranks, **options)
        return str(caught.value)

    messages = run_on_ranks(3, work)
    assert len(set(messages)) == 1 and text in messages[0]


def test_data_refused_on_one_rank_stop_all_ranks():
    def work(ranks):
        x = X.copy()
        x[5] = np.nan if ranks.rank == 2 else x[5]
        with pytest.raises((DistributedError, xpnet.errors.DataError)) as caught:
            fit(mlp(), ranks, x)
        return str(caught.value)

    first, second, own = run_on_ranks(3, work)
    assert first == second == f"rank 2 cannot train: DataError: {own}"
    assert own.startswith("x contains NaN or infinity")


def test_divergence_raises_the_same_error_on_all_ranks():
    def work(ranks):
        with pytest.raises(DivergenceError) as caught:
            fit(mlp(), ranks, optimizer=optimizers.SGD(1e38))
        return str(caught.value)

    messages = run_on_ranks(2, work)
    assert messages[0] == messages[1] and "in epoch 1" in messages[0]


def test_an_error_on_one_rank_ends_the_others(capsys):
    class Fail(callbacks.Callback):
        def on_step_end(self, model, step):
            if self.run.group.rank == 1 and step == 4:
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        run_on_ranks(2, lambda ranks: fit(mlp(), ranks, callbacks=[Fail()]))
    assert "rank 1 of 2 has failed and ends the other ranks:" in capsys.readouterr().err


class LastStep(callbacks.Callback):
    """Records the number of the last step."""

    last = 0

    def on_step_end(self, model, step):
        self.last = step


def test_an_interrupt_on_one_rank_stops_all_ranks_after_the_same_step(monkeypatch, tmp_path):
    """The checkpoint of the interrupted run must resume bit for bit."""
    path = tmp_path / "run.safetensors"

    def work(ranks):
        recorder, model = LastStep(), mlp()
        presses[threading.get_ident()] = lambda: ranks.rank == 1 and recorder.last == 9
        history = model.fit(
            X, Y, epochs=3, batch_size=32, optimizer=optimizers.Adam(0.01), distributed=ranks, on_interrupt="stop",
            callbacks=[recorder, callbacks.Checkpoint(path, every=99)], verbose=0,
        )  # fmt: skip
        return history.stopped, recorder.last, model.state_dict()["0.weight"]

    presses = {}
    monkeypatch.setattr(training, "take_press", lambda: presses[threading.get_ident()]())
    (stopped, last, weight), (other_stopped, other_last, other_weight) = run_on_ranks(2, work)
    assert stopped == other_stopped == "interrupted" and last == other_last == 9
    np.testing.assert_array_equal(weight, other_weight)
    monkeypatch.undo()

    def resume(ranks):
        return fit(mlp(), ranks, resume_from=path, callbacks=[callbacks.Checkpoint(tmp_path / "resumed.safetensors")])

    want = fit(mlp(), False)
    for result in run_on_ranks(2, resume):
        agree(result, want)


@pytest.mark.parametrize("when", ["on_step_end", "on_epoch_end"])
def test_a_callback_that_stops_one_rank_stops_all_ranks(when):
    class Stop(LastStep):
        def on_epoch_end(self, model, epoch, logs):
            if when == "on_epoch_end" and self.run.group.rank == 1:
                self.run.history.stopped = "enough"

        def on_step_end(self, model, step):
            super().on_step_end(model, step)
            if when == "on_step_end" and self.run.group.rank == 1 and step == 3:
                self.run.history.stopped = "enough"

    def work(ranks):
        callback = Stop()
        history = mlp().fit(X, Y, epochs=3, batch_size=32, callbacks=[callback], distributed=ranks, verbose=0)
        return history.stopped, callback.last, len(history["loss"])

    (first, second) = run_on_ranks(2, work)
    assert first == second == ("enough", 3 if when == "on_step_end" else 7, 1)


def test_an_error_before_the_first_communication_ends_the_other_ranks(capsys):
    def work(ranks):
        return fit(mlp(), ranks, x=datasets.Stream(X, Y) if ranks.rank == 1 else X)  # a Stream and y is refused

    with pytest.raises(xpnet.errors.XpnetError):
        run_on_ranks(2, work)
    assert "rank 1 of 2 has failed and ends the other ranks:" in capsys.readouterr().err


# Arguments -----------------------------------------------------------------------------------------------------------


def test_the_rows_of_a_batch_are_split_evenly_and_in_order():
    for size in (1, 2, 3, 4, 7):
        for rows in (1, 2, 5, 43, 64):
            parts = []
            for rank in range(size):
                group = ProcessGroup()
                group.rank, group.size = rank, size
                parts.append(group.rows_of(rows))
            assert [i for part in parts for i in range(rows)[part]] == list(range(rows))
            lengths = [part.stop - part.start for part in parts]
            assert max(lengths) - min(lengths) <= 1


def test_invalid_arguments_are_refused():
    with pytest.raises(ArgumentError, match="distributed must be True, False or a Communicator, not 'yes'"):
        mlp().fit(X, Y, distributed="yes", verbose=0)
    with pytest.raises(ArgumentError, match='batch_norm must be "synchronized" or "per rank"'):
        distributed.Communicator(object(), batch_norm="mine")


def test_the_error_without_mpi4py_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(MissingPackageError, match=r'needs mpi4py and an MPI .*Run: pip install "xpnet\[mpi\]"'):
        mlp().fit(X, Y, distributed=True, verbose=0)


def test_collectives_of_a_single_process_return_their_input():
    assert (
        SINGLE_PROCESS.rows_of(7) == slice(0, 7)
        and SINGLE_PROCESS.all_gather(3) == [3]
        and SINGLE_PROCESS.broadcast_value("a") == "a"
    )
    assert SINGLE_PROCESS.any(True) and not SINGLE_PROCESS.any(False)


def test_the_gpus_of_a_machine_are_distributed_over_its_ranks(monkeypatch):
    monkeypatch.setattr(mpi, "available_backends", lambda: {"gpu": None})
    monkeypatch.setattr("xpnet.backends.cuda.probe.device_count", lambda: 2)
    assert run_on_ranks(3, lambda ranks: ranks.backend("gpu")) == ["gpu:0", "gpu:1", "gpu:0"]
    assert run_on_ranks(2, lambda ranks: ranks.backend()) == ["gpu:0", "gpu:1"]
    monkeypatch.setattr(mpi, "available_backends", lambda: {"gpu": "none here"})
    assert run_on_ranks(2, lambda ranks: ranks.backend()) == ["cpu", "cpu"]
    assert run_on_ranks(2, lambda ranks: ranks.backend("cpu")) == ["cpu", "cpu"]


# NCCL ----------------------------------------------------------------------------------------------------------------


class Nccl:
    """A fake cupy.cuda.nccl: it records its calls, and the threads of the test compute the sums."""

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


def test_nccl_reduces_gradients_on_the_stream_of_the_model(monkeypatch):
    from emulated_cuda import COMPILER, EmulatedGPU

    if not COMPILER:
        pytest.skip("the kernels of a GPU are emulated by g++, and there is none")

    def work(ranks):
        gpu = EmulatedGPU()
        gpu.index = ranks.rank  # as if each rank had its own GPU
        monkeypatch.setattr(gpu, "device", lambda: __import__("contextlib").nullcontext())
        gpu.xp.cuda.nccl = nccl = Nccl(ranks._comm)
        return fit(mlp(gpu), ranks, epochs=1), nccl.calls

    want = fit(mlp(), False, epochs=1)
    results = run_on_ranks(2, work)
    for rank, (result, calls) in enumerate(results):
        agree(result, want, rtol=1e-8)
        assert calls[0] == ("create", 2, ("identity", 42), rank)
        gradients = [call for call in calls[1:] if call[2] > 100]
        assert len(gradients) == 7, "there must be one all-reduce per update"
        assert {call[1:5] for call in gradients} == {(True, gradients[0][2], 8, 0)}
        assert all(call[5] != 0 for call in gradients), "an all-reduce must not use the default stream"


def test_ranks_that_share_a_gpu_or_lack_nccl_communicate_through_the_host(caplog):
    from xpnet.distributed.collectives import HostCollective, NcclCollective, collective

    def kinds(indices, available):
        def work(ranks):
            gpu = StrictBackend()
            gpu.index = indices[ranks.rank]
            gpu.xp.cuda = type("cuda", (), {"nccl": type("nccl", (), {"available": available[ranks.rank]})})
            return type(collective(gpu, ranks._comm))

        return run_on_ranks(2, work)

    assert kinds([0, 0], [True, True]) == [HostCollective] * 2
    assert kinds([0, 1], [True, False]) == [HostCollective] * 2
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [
        "several ranks share a GPU",
        "NCCL is missing on rank 1",
    ]
    assert issubclass(NcclCollective, HostCollective)


# Real MPI processes --------------------------------------------------------------------------------------------------

MPIEXEC = shutil.which("mpiexec") or shutil.which("mpiexec", path=str(Path(sys.executable).parent))
ENDS_WITHIN = 10  # seconds, as docs/distributed.md promises

PROGRAM = """
import os, signal, sys, time
import numpy as np
sys.path[:0] = [{tests!r}]
from test_distributed import fit, mlp, cnn, X, Y, IMAGES
from xpnet import callbacks, distributed

ranks, mode, path = distributed.Communicator(), sys.argv[1], sys.argv[2]

class Die(callbacks.Callback):
    def on_step_end(self, model, step):
        if ranks.rank == 1 and step == 10:
            print("dying", time.time(), flush=True)
            if mode == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk is full")

checkpoint = path + ".safetensors"
if mode in ("mlp", "cnn"):
    result = fit(mlp(), True) if mode == "mlp" else fit(cnn(), ranks, IMAGES)
elif mode == "disagree":
    fit(mlp(seed=ranks.rank), True)
elif mode == "resumed":
    result = fit(mlp(), True, resume_from=checkpoint, callbacks=[callbacks.Checkpoint(checkpoint)])
else:
    fit(mlp(), True, callbacks=[callbacks.Checkpoint(checkpoint), Die()], epochs=3)
np.savez(path + f"-{{ranks.rank}}.npz", loss=result[0]["loss"], **result[1])
"""


@pytest.fixture
def mpiexec(tmp_path):
    """Runs the program above on a number of ranks; returns (exit status, output, seconds)."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    if MPIEXEC is None:
        pytest.skip("there is no mpiexec")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "XPNET_FAST": "0", "TMPDIR": "/tmp"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(xpnet.__file__).parent.parent), *sys.path])

    def run(size, mode, path="run"):
        start = time.monotonic()
        done = subprocess.run(
            [MPIEXEC, "-n", str(size), "--oversubscribe", sys.executable, str(program), mode, str(tmp_path / path)],
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
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_processes_train_like_one_process_and_reproducibly(mpiexec, size, model):
    want = fit(mlp(), False) if model == "mlp" else fit(cnn(), False, IMAGES)
    for path in ("first", "second"):
        status, output, _ = mpiexec(size, model, path)
        assert status == 0, output
    first, second = (list(results_of(mpiexec.folder, size, path)) for path in ("first", "second"))
    for one, other in zip(first, second, strict=True):
        agree(one, ({"loss": want[0]["loss"]}, want[1]))
        for name, value in one[1].items():
            np.testing.assert_array_equal(value, other[1][name])
            np.testing.assert_array_equal(value, first[0][1][name])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["killed", "raises"])
def test_a_rank_that_dies_ends_the_others_and_the_last_checkpoint_resumes(mpiexec, mode):
    status, output, _ = mpiexec(2, mode)
    ended = time.time()
    assert status != 0, output
    died = float(next(line.split()[1] for line in output.splitlines() if line.startswith("dying")))
    assert ended - died < ENDS_WITHIN
    assert (mode == "raises") == ("rank 1 of 2 has failed and ends the other ranks" in output)
    status, output, _ = mpiexec(4, "resumed")
    assert status == 0, output
    want = fit(mlp(), False)
    for result in results_of(mpiexec.folder, 4):
        agree(result, ({"loss": want[0]["loss"]}, want[1]))


@pytest.mark.slow
def test_disagreeing_processes_end_with_the_reason(mpiexec):
    status, output, seconds = mpiexec(2, "disagree")
    assert status != 0 and "DistributedError: rank 1 has the seed = 1, but rank 0 has 0" in output
    assert seconds < 60


@pytest.mark.slow
def test_the_example_trains_on_two_ranks(mpiexec):
    example = Path(__file__).parents[2] / "examples" / "mnist.py"
    closed = "http://127.0.0.1:9"  # a closed port: downloads fail at once, so the example uses the bundled digits
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
