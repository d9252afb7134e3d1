"""Every fuzz target for a moment: with the same inputs in each run, then with new ones. `make fuzz` takes an hour.

The seed is fixed, so that a run can be repeated. `FUZZ_SEED=123` gives other inputs.
"""

import os
import time

import pytest

from tests.fuzz.running import running
from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("FUZZ_SEED") or 909785370)  # `make fuzz` looks for new inputs
SECONDS = 0.6
"""How long new inputs are tried for each target: it bounds the number of inputs, and never decides on a result."""


@pytest.mark.parametrize("name", TARGETS)
def test_a_target(name: str) -> None:
    target = TARGETS[name]
    print(f"FUZZ_SEED={SEED}")
    with running(target) as run:
        run.regressions()
        run.repeatably(50)
        run.until(time.monotonic() + SECONDS, SEED)
    assert run.executions > 50
