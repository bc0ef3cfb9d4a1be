"""Files are data: nothing in them is unpickled, evaluated, imported or executed, whatever they contain."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import xpnet

PACKAGE = Path(xpnet.__file__).parent
FORBIDDEN_MODULES = {"cloudpickle", "codeop", "dbm", "dill", "joblib", "marshal", "pickle", "pickletools",
                     "runpy", "shelve", "torch", "yaml"}  # fmt: skip
FORBIDDEN_CALLS = {"__import__", "breakpoint", "compile", "eval", "exec", "execfile", "system", "popen", "run_path",
                   "allow_pickle", "read_pickle", "literal_eval"}  # fmt: skip
#: The only place that may: it compiles text that xpnet has made from the calls of a step, see the dynamic test.
GENERATED = {("capture/program.py", "exec"), ("capture/program.py", "compile")}


def uses(tree):
    """(line, name) of the modules that are imported, and of what could run data as code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call):
            function = node.func
            root = getattr(getattr(function, "value", None), "id", "")
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name == "import_module" and isinstance(node.args[0], ast.Constant):
                yield node.lineno, node.args[0].value.partition(".")[0]
            elif not (name == "compile" and root == "re"):
                yield node.lineno, name
        elif isinstance(node, ast.keyword):
            yield node.value.lineno, node.arg or ""
        elif isinstance(node, ast.Name):  # handed on, as in map(eval, …)
            yield node.lineno, node.id


def forbidden(source, file=""):
    """The lines of the source of a module of xpnet that could run data as code."""
    found = [(line, name) for line, name in uses(ast.parse(source)) if name in FORBIDDEN_CALLS | FORBIDDEN_MODULES]
    return [(line, name) for line, name in found if (file, name) not in GENERATED]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_can_run_data_as_code(path):
    assert forbidden(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()) == []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from pickle import loads", "import_module('marshal')", "eval(x)", "list(map(eval, x))",
     "exec(x)", "import yaml.cyaml", "numpy.load(path, allow_pickle=True)", "builtins.compile(x, '', 'exec')",
     "os.system(x)"],
)  # fmt: skip
def test_the_scan_finds(code):
    assert forbidden(code) != []


HOOKED = r"""
import json, pathlib, pickle, re, sys, warnings
import numpy as np
import xpnet
from xpnet import callbacks, datasets, layers
warnings.simplefilter("ignore")
folder = pathlib.Path(sys.argv[1])
EVIL = "__import__('os').system('touch {folder}/ran')".replace("{folder}", str(folder))

TEXTS = (EVIL.encode(), b"builtins.eval", b"os.system", b"numpy.load", b"{0.__class__}", b"%s", b"a\\n\\nimport os\\n")

class Exploit:
    def __reduce__(self):
        import os
        return os.system, (f"touch {folder}/ran",)

def model():
    stack = [layers.Dense(4, name="first"), layers.ReLU(), layers.Dense(3, name="second")]
    return xpnet.Sequential(stack, (5,), "cpu")

x, y = np.ones((12, 5), np.float32), np.arange(12) % 3

def use(loaded):
    loaded.predict(x)
    loaded.fit(x, y, batch_size=4, epochs=30, verbose=0)
    loaded.summary()

def resume(path):
    model().fit(x, y, epochs=4, resume_from=path, verbose=0)

READERS = [lambda p: use(xpnet.load(p, "cpu")), resume, datasets.read_idx]
if ONNX:
    READERS.append(lambda p: use(xpnet.import_onnx(p, backend="cpu")))

def write(path):
    trained = model()
    trained.fit(x, y, epochs=2, callbacks=[callbacks.Checkpoint(folder / "a.ckpt")], verbose=0)
    trained.save(folder / "a.safetensors")
    if ONNX:
        xpnet.export_onnx(trained, folder / "a.onnx")

write(folder)
good = {p.name: p.read_bytes() for p in folder.iterdir()}
def altered(content):
    # the same file with a name in it, of a class or layer, replaced by code
    for i, name in enumerate(sorted(set(re.findall(rb"[A-Za-z_][A-Za-z_.0-9]{2,30}", content[:20000])))):
        text = TEXTS[i % len(TEXTS)]
        yield content.replace(name, text)
        yield content.replace(name, text[: len(name)].ljust(len(name), b"_"))

files = []
for name, content in good.items():
    for i, changed in enumerate(altered(content)):
        files.append(folder / f"{i}-{name}")
        files[-1].write_bytes(changed)
for suffix in ("safetensors", "ckpt", "idx", "npz", "onnx"):
    files.append(folder / f"pickle.{suffix}")
    files[-1].write_bytes(pickle.dumps(Exploit()))
np.savez(folder / "objects.npz", np.array([Exploit()], dtype=object))
np.save(folder / "objects.npy", np.array([Exploit()], dtype=object))
files += [folder / "objects.npz", folder / "objects.npy", *(folder / name for name in good)]

def read_all(paths):
    accepted = 0
    for path in paths:
        for reader in READERS:
            try:
                reader(path)
                accepted += 1
            except xpnet.errors.XpnetError:
                pass
    return accepted

read_all([folder / name for name in good])  # imports all modules
xpnet.capture.program._code.cache_clear()
files = files[-10:] if FAULT else files
seen, texts, active = [], [], True
DANGEROUS = ("pickle.find_class", "marshal.loads", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
             "subprocess.Popen", "socket.connect", "ctypes.dlopen", "code.__new__", "shutil.rmtree", "os.remove",
             "urllib.Request", "import")

def hook(event, arguments):
    if not active:
        return
    if event in DANGEROUS:
        seen.append(f"{event} {arguments!r}"[:200])
    elif event in ("exec", "compile"):
        code = arguments[0]
        name = arguments[1] if event == "compile" else code.co_filename
        if name != "<captured step>":
            seen.append(f"{event} {arguments!r}"[:200])
        elif event == "compile":
            texts.append(str(code))

sys.addaudithook(hook)
accepted = read_all(files)
if FAULT:
    eval("1 + 1")
active = False
leaked = [text for text in texts if re.search(r"\bos\b|eval|system|first|second", text)]
print(json.dumps({"files": len(files), "accepted": accepted, "seen": seen[:20], "leaked": leaked[:2],
                  "texts": len(texts), "ran": (folder / "ran").exists()}))
"""


def read_with_hook(folder, fault):
    """What the process saw that reads altered files under an audit hook of Python."""
    code = HOOKED.replace("if ONNX", f"if {HAS_ONNX}").replace("if FAULT", f"if {fault}")
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


try:
    import onnx  # noqa: F401
except ImportError:
    HAS_ONNX = False
else:
    HAS_ONNX = True


def test_reading_files_executes_nothing(tmp_path):
    result = read_with_hook(tmp_path, fault=False)
    assert result["files"] > 200 and result["accepted"] > 3 and result["texts"] > 0
    assert not result["ran"] and result["leaked"] == [] and result["seen"] == []


def test_the_hook_notices(tmp_path):
    assert read_with_hook(tmp_path, fault=True)["seen"] != []
