import subprocess
import sys

import pytest

NEW_PAGES = """
import resource, statistics, sys
sys.path.insert(0, sys.argv[1])
import device
if sys.argv[2] == "reserve":
    device.reserve_memory()
import jax, jax.numpy as jnp
program = jax.jit(lambda x: jax.lax.optimization_barrier(jnp.sin(x)).sum())
x, pages = jnp.ones(2**24), []
for _ in range(15):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(pages))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the other systems' memory is left to them")
def test_a_program_that_runs_again_asks_the_system_for_no_new_pages(pytestconfig):
    pages = {
        how: float(subprocess.check_output([sys.executable, "-c", NEW_PAGES, str(pytestconfig.rootpath), how]))
        for how in ("leave", "reserve")
    }
    assert pages["reserve"] < 10 < pages["leave"]  # the array between has 16,384 small pages, or 32 huge ones
