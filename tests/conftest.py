"""What every test shares: one thread (the numbers do not depend on the machine) and hypothesis without a deadline."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("nanoqpt", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("nanoqpt")
