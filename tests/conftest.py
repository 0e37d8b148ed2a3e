"""Shared set-up: one thread, so that suites side by side do not spin against each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
