"""Every fuzz target for a moment: with the same inputs in each run, then with new ones. `make fuzz` takes an hour.

The seed of the new inputs is in the output of a test that fails. `FUZZ_SEED=123` gives the same ones again.
"""

import os
import secrets
import time

import pytest

from tests.fuzz.running import running
from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("FUZZ_SEED") or secrets.randbelow(1 << 32))
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
