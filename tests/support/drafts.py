"""EAGLE-3 draft heads for tests: checkpoints of both families on disk, and the same math in plain, uncached form."""

from __future__ import annotations

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

VOCAB, DRAFT_VOCAB, HIDDEN = 96, 40, 48
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16

LAYER = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
}


def speculators_config(layer=None, **fields):
    """A config.json as vLLM's speculators library writes it."""
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.4.0",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "x", "architectures": []}},
        "transformer_layer_config": {**LAYER, **(layer or {})},
        "draft_vocab_size": DRAFT_VOCAB,
        "norm_before_residual": False,
        **fields,
    }


def flat_config(**fields):
    """A config.json as SafeAILab and SpecForge write it."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **LAYER,
        "draft_vocab_size": DRAFT_VOCAB,
        "bos_token_id": 1,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "torch_dtype": "float32",
        **fields,
    }


def settings(config):
    """The config's flags and its layer's fields as one mapping, for either family."""
    return {**config, **config.get("transformer_layer_config", {}), **config.get("eagle_config", {})}


def draft_tensors(config, taps=3, target_hidden=HIDDEN, seed=11):
    """Random tensors, including d2t and t2d, by the names common to both families (``layer.*`` for the layer)."""
    s = settings(config)
    hidden, inner, width = s["hidden_size"], s["intermediate_size"], taps * target_hidden
    q, kv = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    shapes = {
        "fc.weight": (hidden, width),
        "norm.weight": (hidden,),
        "lm_head.weight": (s["draft_vocab_size"], hidden),
        "layer.input_layernorm.weight": (hidden,),
        "layer.hidden_norm.weight": (hidden,),
        "layer.post_attention_layernorm.weight": (hidden,),
        "layer.self_attn.q_proj.weight": (q, 2 * hidden),
        "layer.self_attn.k_proj.weight": (kv, 2 * hidden),
        "layer.self_attn.v_proj.weight": (kv, 2 * hidden),
        "layer.self_attn.o_proj.weight": (hidden, q),
        "layer.mlp.gate_proj.weight": (inner, hidden),
        "layer.mlp.up_proj.weight": (inner, hidden),
        "layer.mlp.down_proj.weight": (hidden, inner),
    }
    if s.get("attention_bias"):
        shapes |= {f"layer.self_attn.{n}_proj.bias": (r,) for n, r in (("q", q), ("k", kv), ("v", kv), ("o", hidden))}
    if s.get("mlp_bias"):
        shapes |= {f"layer.mlp.{n}_proj.bias": (r,) for n, r in (("gate", inner), ("up", inner), ("down", hidden))}
    if s["model_type"] == "qwen3":
        shapes |= {f"layer.self_attn.{n}_norm.weight": (s["head_dim"],) for n in "qk"}
    if s.get("norm_before_fc"):
        shapes["input_norm.weight"] = (width,)
    if s.get("fc_norm"):
        shapes |= {f"fc_norm.{i}.weight": (target_hidden,) for i in range(taps)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            tensors[name] = torch.randn(shape, generator=generator) * 1.5 / math.sqrt(shape[1])
        else:
            tensors[name] = torch.rand(shape, generator=generator) + (0.5 if name.endswith("norm.weight") else -0.5)
    if s["draft_vocab_size"] != s["vocab_size"]:
        ids = torch.randperm(s["vocab_size"], generator=generator)[: s["draft_vocab_size"]].sort().values
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(s["vocab_size"], dtype=torch.bool)
        tensors["t2d"][ids] = True
    return tensors


def write_draft(folder, config, tensors, prefix=None, shards=1):
    """Writes a checkpoint; ``prefix`` names the layer (default: that of the config's family)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    prefix = prefix or ("layers.0." if "speculators_model_type" in config else "midlayer.")
    stored = {
        prefix + name.removeprefix("layer.") if name.startswith("layer.") else name: tensor.contiguous()
        for name, tensor in tensors.items()
    }
    if shards == 1:
        save_file(stored, folder / "model.safetensors")
        return folder
    names = sorted(stored)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: stored[name] for name in names[shard::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class ReferenceDraft:
    """EAGLE-3 as its paper and the checkpoints' flags define it, for a whole sequence at once, without a cache."""

    def __init__(self, config, tensors, embedding):
        self.s, self.t, self.rope_scale = settings(config), tensors, 1.0
        self.embedding = tensors.get("embed_tokens.weight", embedding)
        self.window = self.s.get("sliding_window") if self.s.get("layer_types") == ["sliding_attention"] else None

    def linear(self, x, name):
        return F.linear(x, self.t[f"{name}.weight"], self.t.get(f"{name}.bias"))

    def norm(self, x, name):
        return _norm(x, self.t[f"{name}.weight"], self.s["rms_norm_eps"])

    def fuse(self, taps):
        """Fuses hidden states [T, C_t] to features [T, C]."""
        if self.s.get("fc_norm"):
            taps = [self.norm(tap, f"fc_norm.{i}") for i, tap in enumerate(taps)]
        joined = torch.cat(list(taps), -1)
        return self.linear(self.norm(joined, "input_norm") if self.s.get("norm_before_fc") else joined, "fc")

    def frequencies(self):
        rope = self.s.get("rope_parameters") or self.s.get("rope_scaling") or {}
        theta = rope.get("rope_theta", self.s.get("rope_theta", 10000.0))
        d = self.s["head_dim"]
        frequencies = theta ** (-torch.arange(0, d, 2).double() / d)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "linear":
            frequencies /= rope["factor"]
        if kind == "llama3":
            # long wavelengths are scaled by the factor, short ones are not; there is a ramp between them
            turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            share = ((turns - low) / (high - low)).clamp(0, 1)
            frequencies = share * frequencies + (1 - share) * frequencies / rope["factor"]
        if kind == "yarn":
            # scaled from the dim pair that turns beta_slow times in the original length; unscaled up to beta_fast
            original = rope["original_max_position_embeddings"]
            low, high = (
                d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (rope["beta_fast"], rope["beta_slow"])
            )
            low, high = max(math.floor(low), 0), min(math.ceil(high), d - 1)
            slow = ((torch.arange(d // 2) - low) / (high - low)).clamp(0, 1).double()
            frequencies = slow * frequencies / rope["factor"] + (1 - slow) * frequencies
            self.rope_scale = 0.1 * math.log(rope["factor"]) + 1
        return frequencies

    def rotate(self, x):
        """Rotates x [T, H, D] for positions 0..T-1."""
        angles = torch.outer(torch.arange(len(x)).double(), self.frequencies())
        cos, sin = (self.rope_scale * f(angles).float()[:, None].repeat(1, 1, 2) for f in (torch.cos, torch.sin))
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def attention(self, x):
        h, hk, d = self.s["num_attention_heads"], self.s["num_key_value_heads"], self.s["head_dim"]
        q, k, v = (
            self.linear(x, f"layer.self_attn.{n}_proj").view(len(x), heads, d)
            for n, heads in zip("qkv", (h, hk, hk), strict=True)
        )
        if self.s["model_type"] == "qwen3":
            q, k = self.norm(q, "layer.self_attn.q_norm"), self.norm(k, "layer.self_attn.k_norm")
        q, k = self.rotate(q), self.rotate(k)
        k, v = (tensor.repeat_interleave(h // hk, 1) for tensor in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(d)
        age = torch.arange(len(x))[:, None] - torch.arange(len(x))
        seen = (age >= 0) if self.window is None else (age >= 0) & (age < self.window)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.linear(torch.einsum("hqk,khd->qhd", weights, v).flatten(1), "layer.self_attn.o_proj")

    def step(self, tokens, features):
        """Maps tokens [T] after features [T, C] of positions 0..T-1 to the last row's logits [V_d] and feature [C]."""
        e = self.norm(self.embedding[tokens], "layer.input_layernorm")
        f = self.norm(features, "layer.hidden_norm")
        h = (f if self.s.get("norm_before_residual") else features) + self.attention(torch.cat((e, f), -1))
        x = self.norm(h, "layer.post_attention_layernorm")
        x = F.silu(self.linear(x, "layer.mlp.gate_proj")) * self.linear(x, "layer.mlp.up_proj")
        g = h + self.linear(x, "layer.mlp.down_proj")
        n = self.norm(g, "norm")
        head = self.t.get("lm_head.weight", self.embedding)
        return (n @ head.T)[-1], (n if self.s.get("norm_output") else g)[-1]

    def chain(self, tokens, taps, count):
        """Proposals after a sequence, from its tokens [n] and the taps [n - 1, C_t] of all but the last token."""
        features, tokens, proposals = self.fuse(taps), tokens[1:].clone(), []
        for _ in range(count):
            logits, feature = self.step(tokens, features)
            proposal = int(logits.argmax())
            if "d2t" in self.t:
                proposal += int(self.t["d2t"][proposal])
            proposals.append(proposal)
            tokens = torch.cat((tokens, torch.tensor([proposal])))
            features = torch.cat((features, feature[None]))
        return proposals
