"""What every test needs."""

import torch

# The tensors here are small, and processes that fight for cores wait for each other's threads.
torch.set_num_threads(1)
