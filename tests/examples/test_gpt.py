"""examples/gpt.py as a program, with the text that ships with xpnet, and its model."""

import gzip
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from programs import run_program

import xpnet
from xpnet import datasets

EXAMPLES = Path(__file__).parents[2] / "examples"

if not EXAMPLES.exists():
    pytest.skip("the tests run away from the source tree", allow_module_level=True)


@pytest.fixture
def gpt(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("gpt")


def test_a_few_steps_beat_the_frequencies_of_characters_and_the_model_is_saved(tmp_path):
    path = tmp_path / "models" / "gpt.safetensors"
    done = run_program(EXAMPLES / "gpt.py", tmp_path, "--steps", 20, "--sample", 70, "--save", path)
    assert done.returncode == 0, done.stderr
    assert "excerpt" in done.stderr and "data     99,804 characters" in done.stdout
    assert re.search(r"^epoch 10/10  loss \d\.\d+ ", done.stdout, re.MULTILINE)
    assert re.search(r"^trained for \d+\.\d s, [\d,]+ tokens per second$", done.stdout, re.MULTILINE)
    last = done.stdout.splitlines()[-1]
    loss = float(re.fullmatch(r"validation loss: (\d\.\d{4})", last)[1])
    assert loss < 3.2  # 4.1 at the start, and 3.3 for the frequencies of characters

    excerpt = gzip.decompress((Path(datasets.__file__).parent / "data" / "shakespeare.txt.gz").read_bytes()).decode()
    model, tokenizer = xpnet.load(path, "cpu"), datasets.CharTokenizer(excerpt)
    sample = tokenizer.decode(xpnet.generate(model, tokenizer.encode("\n")[None], 70, temperature=0.8)[0])
    assert sample in done.stdout


def test_the_configs_have_their_sizes_and_initial_losses(gpt):
    sizes = {name: sum(p.size for p in gpt.build(config, 65, "cpu").parameters) for name, config in gpt.CONFIGS.items()}
    assert sizes == {"small": 812_416, "full": 10_770_048}
    model = gpt.build(gpt.CONFIGS["small"], 65, "cpu")
    x, y = datasets.token_windows(np.random.default_rng(0).integers(65, size=257), 64)
    assert abs(model.evaluate(x, y, "softmax_cross_entropy")["loss"] - np.log(65)) < 0.05
    ends = {p.name[2:]: float(np.std(p.value)) for p in model[3].parameters}
    assert abs(ends["contract.weight"] / ends["expand.weight"] - 8**-0.5) < 0.01
    assert abs(ends["attention.output_weight"] / ends["attention.key_weight"] - 8**-0.5) < 0.02


def test_a_step_of_a_small_gpt_repeats_on_every_backend(gpt, backend):
    config = gpt.Config(blocks=1, heads=2, features=8, context=6, dropout=0.1, batch_size=3, steps=4)
    tokens = np.random.default_rng(1).integers(11, size=200)
    states = []
    for device in (backend, "cpu"):
        model = gpt.build(config, 11, device)
        gpt.train(model, tokens, config, verbose=0)
        states.append(model.state_dict())
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], rtol=1e-3, atol=2e-5, err_msg=name)


def test_mistakes_are_one_line_errors(tmp_path):
    done = run_program(EXAMPLES / "gpt.py", tmp_path, "--data-dir", tmp_path / "nowhere")
    assert done.returncode == 1 and done.stderr.startswith("gpt.py: ") and done.stderr.count("\n") == 1
    assert "argument --steps" in run_program(EXAMPLES / "gpt.py", tmp_path, "--steps", 0).stderr
