"""One thread per test process: small models gain nothing from more, and the processes share the cores."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)
