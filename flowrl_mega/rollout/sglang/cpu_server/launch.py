"""SGLang's server on a machine without GPU: PYTHON launch.py FLAGS, where PYTHON is one that has sglang.

Supplies what its imports ask for and a CPU does not have. The server's other processes are forks of it here: SGLang has
them spawned, since CUDA cannot be used in a fork, and each would import everything again, for ten seconds of a core.
"""

import importlib
import os
import sys

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

# Python puts a script's folder first; last, it gives a real sgl_kernel the preference over the one beside this file.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _HERE] + [_HERE]

import torch  # noqa: E402

try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError, OSError):
    # The common wheel of torchvision is built for CUDA and leaves these undeclared beside a CPU torch. sglang imports
    # it for models that see; nothing calls them here.
    _DECLARED = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _DECLARED.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if __name__ == "__main__":
    import multiprocessing

    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *_, **__: None

    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
