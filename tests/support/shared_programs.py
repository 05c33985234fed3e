"""Runs exported programs of several methods on a CPU over shared caches."""

from __future__ import annotations

import torch

CACHES = ("kv_cache.", "draft_cache.")


class SharedPrograms:
    """Runs programs on shared caches, as a runtime that shares buffers by name does. The caches start full of 3.0."""

    def __init__(self, programs):
        self.modules = {name: program.module() for name, program in programs.items()}
        self.caches = {}
        for module in self.modules.values():
            for name, buffer in list(module.named_buffers()):
                if name.startswith(CACHES):
                    shared = self.caches.setdefault(name, torch.full_like(buffer, 3.0))
                    owner, _, leaf = name.rpartition(".")
                    setattr(module.get_submodule(owner), leaf, shared)

    def run(self, method, *inputs):
        with torch.no_grad():
            return self.modules[method](*inputs)

    def __call__(self, method, tokens, start, *others):
        return self.run(method, tokens, torch.arange(start, start + tokens.shape[1]), *others)
