"""Perplexity of a checkpoint in every weight format, on a CPU.

    python examples/perplexity.py CHECKPOINT TEXT [--window 1024] [--only int8,default-hqq] [--shuffle]

The checkpoint is a Hugging Face folder of target hf with a tokenizer. Weights are quantized as export-model does it,
and the Hugging Face model computes with what the codes stand for, in float32. Prints a Markdown table.

If the checkpoint's weights were quantized before, they lie on the grid of their old groups, and formats with the same
groups look too good. ``--shuffle`` reorders the channels of a Llama. The model computes the same, but other columns
share a group.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch

from flashpte.export.common.options import ExportOptions
from flashpte.export.pipeline import load_weights, plan_export
from flashpte.export.runtime.perplexity import measure
from flashpte.export.runtime.text import load_tokenizer

GROUPS = (32, 64, 128)
# name -> options of export-model
FORMATS = {
    "bfloat16": {},
    "int8": {"qlinear": "8w"},
    "int8-g32": {"qlinear": "8w", "qlinear_group_size": 32},
    **{f"int4-g{group}": {"qlinear": "4w", "qlinear_group_size": group} for group in GROUPS},
    **{f"int4-g{g}-hqq": {"qlinear": "4w", "qlinear_group_size": g, "qalgorithm": "hqq"} for g in GROUPS},
    **{name: {"qrecipe": name} for name in ("default", "sensitive")},
    **{f"{name}-hqq": {"qrecipe": name, "qalgorithm": "hqq"} for name in ("default", "sensitive")},
}


class Shuffled:
    """A Llama's weights with the channels of hidden states, MLPs and values in another order."""

    def __init__(self, source, config):
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.source, self.size = source, config.get("head_dim") or hidden // config["num_attention_heads"]
        generator = torch.Generator().manual_seed(0)
        self.hidden, self.inner, self.value = (
            torch.randperm(size, generator=generator) for size in (hidden, inner, self.size)
        )

    def read(self, name: str) -> torch.Tensor:
        weight, kind = self.source.read(name), name.split(".")[-2]
        heads = torch.arange(weight.shape[kind == "o_proj"] // self.size)[:, None] * self.size
        value = (heads + self.value).flatten()
        if kind.endswith("norm"):
            return weight[self.hidden]
        if kind in ("o_proj", "down_proj"):
            return weight[self.hidden][:, value if kind == "o_proj" else self.inner]
        weight = weight[:, self.hidden]
        return weight[value] if kind == "v_proj" else weight[self.inner] if kind in ("gate_proj", "up_proj") else weight


def quantized_model(checkpoint: Path, options: dict, shuffle: bool = False) -> tuple[torch.nn.Module, int]:
    """The model with quantized weights and float32 activations, and the bytes of its weights in a program."""
    plan = plan_export(ExportOptions("hf", checkpoint=checkpoint, **options))
    if shuffle:
        plan = dataclasses.replace(plan, source=Shuffled(plan.source, plan.config))
    load_weights(plan)
    size = sum(tensor.numel() * tensor.element_size() for tensor in plan.model.state_dict().values())
    plan.model.set_attn_implementation("sdpa")
    return plan.model.float().eval(), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--only", default=",".join(FORMATS))
    args = parser.parse_args()
    tokens = load_tokenizer(args.checkpoint)(args.text.read_text(encoding="utf-8"))["input_ids"]
    print("| weights | MB | perplexity | tokens predicted | s |\n|---|---|---|---|---|")
    for name in args.only.split(","):
        start = time.perf_counter()
        model, size = quantized_model(args.checkpoint, FORMATS[name], args.shuffle)
        with torch.no_grad():
            found = measure(
                tokens,
                args.window,
                lambda part: model(torch.tensor([part]), use_cache=False).logits[0],  # noqa: B023
            )
        took = time.perf_counter() - start
        print(f"| {name} | {size / 1e6:.1f} | {found.value:.3f} | {found.predicted} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main()
