"""`sbora` in one of several processes on a CPU, whose weights FSDP2 divides.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.core.llm.divided llm train …

accelerate takes the variables that its launcher sets for FSDP on GPUs alone; what it does with them
is the same on a CPU.
"""

from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType

from sbora_diffusion import cli

_start = AcceleratorState.__init__


def _divided(state: AcceleratorState, *args, **options) -> None:
    _start(state, *args, **options)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        state.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = _divided  # type: ignore[method-assign]
    cli.main()
