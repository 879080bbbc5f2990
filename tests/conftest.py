"""One thread a process: tests run many ranks on few cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # megatron-core compiles small functions, 18 s a run

import torch

torch.set_num_threads(1)
