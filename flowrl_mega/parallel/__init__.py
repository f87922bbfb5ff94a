"""Process groups and layout, packing, optimizer, and Megatron on machines without CUDA."""

import warnings

from flowrl_mega.parallel import backends, cuda_is_cpu

# At import Megatron warns of what it lacks (Apex) and of parts that nobody here asked for, once for each module.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
# Collectives have names, here and in Megatron, that torch 2.13 wants changed; torch 2.11 knows no others.
warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
# Before anything else in this package, in model/ or in checkpoint/ can import megatron.
backends.prepare()
cuda_is_cpu.install()
