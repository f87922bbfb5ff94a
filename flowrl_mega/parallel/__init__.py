"""Process groups and layout, packing, optimizer, and Megatron on machines without CUDA."""

import warnings

from flowrl_mega.parallel import cuda_is_cpu

warnings.filterwarnings("ignore", message="Apex is not installed")  # Megatron's, in each module; we ask for neither
# Before anything else in this package, in model/ or in checkpoint/ can import megatron.
cuda_is_cpu.install()
