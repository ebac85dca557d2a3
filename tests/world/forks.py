"""Processes that are forked from a server that has imported everything, as each would take seconds to import it.

The test process cannot fork itself, once it has used autograd.
"""

import multiprocessing

from tests.world.disk import never_wait_for_disk

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.tensor", "transformers.modeling_utils", "datasets", "pytest"]
    + ["torch._decomp.decompositions_for_jvp"]  # which torch imports, and compiles, when a pass first goes forward
    + [f"dualsft.commands.{verb}" for verb in ("select", "fit", "validate")]
    + ["tests.world.jobs", "tests.world.fits", "tests.references", "tests.world.ranks", __name__]
)

never_wait_for_disk()  # in the server, and so in its children
