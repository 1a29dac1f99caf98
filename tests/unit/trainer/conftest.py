"""One thread: tests run side by side, and waiting threads would take the others' time."""

import torch

torch.set_num_threads(1)
