"""Random programs on arrays: the replay of their trace, on other values, equals running them directly, bit for bit."""

import numpy as np
import pytest
from random_programs import Program
from seeds import seeds
from traced_programs import STEP, Traced, directly, same_bits


@pytest.mark.parametrize("seed", seeds(60, 750))
def test_a_replay_of_a_random_program_equals_running_it(seed):
    program = Program(seed)
    with np.errstate(all="ignore"):
        want = directly(program, program.arrays(0), STEP)
        for passes, shared in ((True, True), (True, False), (False, True), (False, False)):
            traced = Traced(program, program.arrays(0), passes, shared)
            assert all(map(same_bits, traced.after, want)), "the step that was traced"
            for data, step in ((1, STEP + 1), (2, STEP + 50), (0, STEP)):
                values = program.arrays(data)
                want_now = directly(program, values, step)
                for i, (a, b) in enumerate(zip(traced.replay(values, step), want_now, strict=True)):
                    assert same_bits(a, b), (passes, shared, data, i)
