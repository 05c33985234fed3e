"""A program that runs on a CPU: the methods of an export as eager PyTorch, in the place of compiled ones."""

from __future__ import annotations

import torch

from flashpte.export.models.caches import KVCache
from flashpte.export.models.methods import CausalLMMethod
from flashpte.export.options import ExportOptions
from flashpte.export.pipeline import load_weights, plan_export
from flashpte.export.runtime.signature import MethodSignature, TensorSpec


def signatures(methods, vocabulary=512, dtype=torch.bfloat16):
    """Signatures of ``{name: (fewest, most)}`` tokens."""
    found = {}
    for name, (low, high) in methods.items():
        size, dynamic = (low, {}) if low == high else ((low, high), "s0")
        axes = [{1: dynamic}, {0: dynamic}] if dynamic else [{}, {}]
        rows = size if name == "target_verify" else 1
        found[name] = MethodSignature(
            name,
            (
                TensorSpec("tokens", torch.int64, (1, size), axes[0]),
                TensorSpec("input_pos", torch.int64, (size,), axes[1]),
            ),
            (TensorSpec("logits", dtype, (1, rows, vocabulary)),),
        )
    return found


class EagerProgram:
    """Methods of a plan's model over one cache, called as those of a ``Program``.

    Tests make it wrong: ``unshared`` names a method that gets a cache of its own for one layer, ``swapped`` one whose
    inputs change places.
    """

    def __init__(self, plan, *, unshared=None, swapped=None):
        self.plan = plan
        self.swapped = swapped
        specs = {spec.name: spec for spec in plan.methods}
        ranges = {name: (spec.min_tokens, spec.max_tokens) for name, spec in specs.items()}
        self.signatures = signatures(ranges, plan.facts.vocab_size, plan.dtype)
        self.constants = plan.constant_methods
        cache = self._cache()
        self.buffers = {f"kv_cache.{name}": tensor for name, tensor in cache.named_buffers()}
        self._modules = {}
        for name, spec in specs.items():
            own = cache
            if name == unshared:
                own = self._cache()
                for key, tensor in cache.named_buffers():
                    if key != "k_1":
                        setattr(own, key, tensor)
            self._modules[name] = CausalLMMethod(plan.model, own, all_logits=spec.all_logits).eval()
        self.calls = []

    def _cache(self):
        return KVCache(self.plan.facts.attention, self.plan.max_seq_len, self.plan.dtype)

    def run(self, method, *inputs):
        self.signatures[method].check(inputs)
        tokens, positions = inputs
        self.calls.append((method, tokens.shape[1], int(positions[0])))
        if method == self.swapped:
            tokens, positions = positions[None], tokens[0] % self.plan.max_seq_len
        with torch.no_grad():
            return [self._modules[method](tokens, positions)]

    def reset(self):
        for module in self._modules.values():
            for tensor in module.kv_cache.buffers():
                tensor.zero_()

    def synchronize(self):
        pass


def small_plan(**options):
    """The built-in small Gemma 4 with random weights, in bfloat16."""
    defaults = dict(target="gemma4-31b", small=True, random_seed=0, verify_window=5)
    plan = plan_export(ExportOptions(**{**defaults, **options}))
    load_weights(plan)
    return plan
