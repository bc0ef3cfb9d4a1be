"""Random ONNX graphs and exported random models against ONNX Runtime: equal, or refused by name."""

import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_files
import random_onnx

import xpnet
from reliability.architectures import as_list, random_model, samples_for
from reliability.cases import Cases, refused, run_cases
from reliability.results import Result, scaled
from xpnet.errors import ArgumentError, XpnetError


class OnnxGraphs(Cases):
    """Random graphs of ONNX operators: chains, branches, several inputs and outputs."""

    OUTCOMES = ("equal", "refused")
    SECONDS, MEGABYTES = 20.0, 2000  # loops are compiled

    def run(self, case: int) -> str:
        number = self.seed * 1_000_000 + case
        with self.in_reference():
            if case % 2:
                graph, outputs = random_onnx.with_branches(number)
            else:
                graph = random_onnx.RandomGraph(number)
                outputs = [next(reversed(graph.outputs))]
        model, want = graph.model(*outputs), [graph.outputs[name] for name in outputs]
        scale = max(1.0, *(float(np.abs(a[np.isfinite(a)]).max(initial=0)) for a in graph.outputs.values()))
        got, message = onnx_files.outcome(
            model, list(graph.x.values()), want, self.folder / "g.onnx", rtol=1e-3, atol=1e-5 * scale
        )
        assert got != "wrong", message
        assert got == "equal" or re.search(onnx_files.NAMED, message), f"refused, but not by name: {message}"
        return got


class ExportedModels(Cases):
    """Random models of xpnet, exported: ONNX Runtime and the imported file must compute the same."""

    OUTCOMES = ("equal", "refused by the export", "refused by the import", "refused at build")
    SECONDS, MEGABYTES = 20.0, 2000  # loops are compiled

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed)
        warnings.simplefilter("ignore")  # of models in float64, which the file has in float32

    def run(self, case: int) -> str:
        rng, path = random.Random(f"{self.seed} exported {case}"), self.folder / "m.onnx"
        try:
            model = random_model(rng)
            x = samples_for(np.random.default_rng(case), model, 3)
            want = as_list(model.predict(x))
        except XpnetError as error:
            refused(error)
            return "refused at build"
        first = rng.random() < 0.3
        try:
            xpnet.export_onnx(model, path, channels_first=first)
        except ArgumentError as error:
            refused(error)
            return "refused by the export"
        given = [random_onnx.in_file(a, first) for a in as_list(x)]
        with self.in_reference():
            file = onnx.load(path)
            outputs = random_onnx.run(file, dict(zip((i.name for i in file.graph.input), given, strict=True)))
        assert outputs is not None, f"ONNX Runtime refuses the file: {model.layers}"
        for a, b in zip(outputs, want, strict=True):
            expected = random_onnx.in_file(b, first)
            assert a.dtype == b.dtype and a.shape == expected.shape, f"{a.dtype} {a.shape}, not {b.dtype} {b.shape}"
            self._assert_close(a, expected, f"ONNX Runtime computes something else: {model.layers}")
        try:
            imported = xpnet.import_onnx(path, "cpu")
        except ArgumentError as error:
            refused(error)
            assert re.search(onnx_files.NAMED, str(error)), f"refused, but not by name: {error}"
            return "refused by the import"
        for a, b in zip(as_list(imported.predict(x)), want, strict=True):
            self._assert_close(a, b, f"the imported model predicts something else: {model.layers}")
        return "equal"

    def _assert_close(self, a: Any, b: Any, what: str) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(np.abs(b).max(initial=0))), err_msg=what)


def run(scale: float, seed: int, folder: Path) -> list[Result]:
    return [
        run_cases("random ONNX graphs", OnnxGraphs, scaled(10_000, scale, least=20), seed, folder),
        run_cases("random models exported to ONNX", ExportedModels, scaled(3000, scale, least=20), seed, folder),
    ]
