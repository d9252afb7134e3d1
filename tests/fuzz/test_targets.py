"""Every fuzz target for a moment, with the same inputs in each run. `make fuzz` looks for others for an hour.

How many inputs of the seed fit into that moment depends on the machine. `FUZZ_SEED=123` gives others.
"""

import os
import time

import pytest

from tests.fuzz.running import running
from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("FUZZ_SEED", "909785370"))
SECONDS = 0.6
"""How long the inputs of the seed are tried for each target. It bounds their number, and decides on no result."""


@pytest.mark.parametrize("name", TARGETS)
def test_a_target(name: str) -> None:
    target = TARGETS[name]
    print(f"FUZZ_SEED={SEED}")
    with running(target) as run:
        run.regressions()
        run.repeatably(50)
        run.until(time.monotonic() + SECONDS, SEED)
    assert run.executions > 50
