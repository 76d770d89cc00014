"""Settings of every test: one thread each, so that two workers share a small machine."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
