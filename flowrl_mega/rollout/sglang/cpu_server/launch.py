"""SGLang's server on a machine without GPU: PYTHON launch.py FLAGS, where PYTHON is one that has sglang.

Supplies what its imports ask for and a CPU does not have. The server's own children import this file too, as
multiprocessing's spawn does with a main module, so all that they need happens on import.
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
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
