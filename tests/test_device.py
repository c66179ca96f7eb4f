import subprocess
import sys

import pytest

NEW_PAGES = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import device
if sys.argv[2] == "reserve":
    device.reserve_memory()
import jax, jax.numpy as jnp
program = jax.jit(lambda x: (jax.lax.optimization_barrier(jnp.sin(x)) @ x).sum())
x = jnp.ones((2048, 2048))
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the other systems' memory is left to them")
def test_a_program_that_runs_again_asks_the_system_for_no_new_pages(pytestconfig):
    pages = {
        how: int(subprocess.check_output([sys.executable, "-c", NEW_PAGES, str(pytestconfig.rootpath), how]))
        for how in ("leave", "reserve")
    }
    assert pages["leave"] > 2048**2 * 4 / 4096  # one array of the program, in pages of 4 KiB
    assert pages["reserve"] < 100
