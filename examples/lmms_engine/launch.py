"""LMMs-Engine's own launcher, with assayer's client where LMMs-Engine imports lmms-eval's.

LMMs-Engine 0.1.4 hands its client ``lmms_engine_kwargs``, which that of lmms-eval up to 0.7.3 does not take: every submission ends in a
TypeError there, and nothing is sent. Both have the same methods otherwise.

    torchrun --nproc_per_node=8 examples/lmms_engine/launch.py config_yaml=examples/lmms_engine/train.yaml
"""

import runpy
import sys
from types import ModuleType

from assayer.client import EvalClient


def main() -> None:
    """Runs ``lmms_engine.launch.cli`` with the words of this command line."""
    entrypoints = ModuleType("lmms_eval.entrypoints")
    vars(entrypoints)["EvalClient"] = EvalClient
    sys.modules[entrypoints.__name__] = entrypoints
    runpy.run_module("lmms_engine.launch.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
