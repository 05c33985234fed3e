"""A program that runs on a CPU: the methods of an export in eager PyTorch, instead of compiled ones."""

from __future__ import annotations

import torch

from flashpte.export.common.options import ExportOptions
from flashpte.export.files.signature import MethodSignature, TensorSpec
from flashpte.export.models.eagle3_methods import DraftMethod, TargetMethod
from flashpte.export.models.methods import CausalLMMethod
from flashpte.export.pipeline import load_weights, plan_export
from flashpte.export.state.model_state import ModelState


def signatures(methods, vocabulary=512, dtype=torch.bfloat16, feature_size=None):
    """Signatures of methods ``{name: (fewest, most tokens)}``; ``feature_size`` is that of a program with a draft."""
    found = {}
    for name, (low, high) in methods.items():
        size, dynamic = (low, {}) if low == high else ((low, high), "s0")
        axes = [{1: dynamic}, {0: dynamic}] if dynamic else [{}, {}]
        rows = size if name == "target_verify" else 1
        inputs = [
            TensorSpec("tokens", torch.int64, (1, size), axes[0]),
            TensorSpec("input_pos", torch.int64, (size,), axes[1]),
        ]
        outputs = [TensorSpec("logits", dtype, (1, rows, vocabulary))]
        features = TensorSpec("features", dtype, (1, size, feature_size), axes[0])
        if name == "draft_decode":
            inputs.insert(1, features)
            outputs = [
                TensorSpec("proposal", torch.int64, (1, 1)),
                TensorSpec("feature", dtype, (1, 1, feature_size)),
            ]
        elif feature_size is not None and name != "decode":
            outputs.append(features)
        found[name] = MethodSignature(name, tuple(inputs), tuple(outputs))
    return found


class EagerProgram:
    """Methods of a plan's model over one cache, called like those of a ``Program``.

    Options make it wrong. ``unshared`` names a method with its own cache for one layer, ``swapped`` one with swapped
    inputs, ``late`` one whose positions are off by one, and ``restarted`` one that counts positions from 0 in every
    call.
    """

    def __init__(self, plan, *, unshared=None, swapped=None, late=None, restarted=None):
        self.plan = plan
        self.late = late
        self.restarted = restarted
        self.swapped = swapped
        specs = {spec.name: spec for spec in plan.methods}
        ranges = {name: (spec.min_tokens, spec.max_tokens) for name, spec in specs.items()}
        size = plan.draft.head.hidden_size if plan.draft is not None else None
        self.signatures = signatures(ranges, plan.facts.vocab_size, plan.dtype, size)
        self.constants = plan.constant_methods
        self.states = plan.states
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
            self._modules[name] = self._module(spec, own).eval()
        self.calls = []

    def _module(self, spec, cache):
        draft, model = self.plan.draft, self.plan.model
        if draft is None or spec.name == "decode":
            return CausalLMMethod(model, cache, all_logits=spec.all_logits)
        if spec.name != "draft_decode":
            return TargetMethod(model, cache, draft.fusion, draft.taps, all_logits=spec.all_logits)
        own = ModelState([draft.head.attention], self.plan.max_seq_len, self.plan.dtype)
        self.buffers |= {f"draft_cache.{name}": tensor for name, tensor in own.named_buffers()}
        return DraftMethod(model, draft.head, own)

    def _cache(self):
        return ModelState(self.plan.facts.states, self.plan.max_seq_len, self.plan.dtype)

    def run(self, method, *inputs):
        self.signatures[method].check(inputs)
        tokens, *features, positions = inputs
        self.calls.append((method, tokens.shape[1], int(positions[0])))
        if method == self.swapped:
            tokens, positions = positions[None], tokens[0] % self.plan.max_seq_len
        if method == self.late:
            positions = (positions + 1).clamp(max=self.plan.max_seq_len - 1)
        if method == self.restarted:
            positions = positions - positions[0]
        with torch.no_grad():
            results = self._modules[method](tokens, *features, positions)
        return [results] if isinstance(results, torch.Tensor) else list(results)

    def reset(self):
        for module in self._modules.values():
            cache = module.kv_cache if hasattr(module, "kv_cache") else module.draft_cache
            for tensor in cache.buffers():
                tensor.zero_()

    def synchronize(self):
        pass


def small_plan(**options):
    """The built-in small Gemma 4 with random weights in bfloat16; with ``chain``, a random draft too."""
    defaults = dict(target="gemma4-31b", small=True, random_seed=0)
    if "chain" not in options:
        defaults["verify_window"] = 5
    plan = plan_export(ExportOptions(**{**defaults, **options}))
    load_weights(plan)
    return plan
