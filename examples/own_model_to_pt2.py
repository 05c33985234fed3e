"""The replace pass for plain AOTInductor: write a .pt2 anywhere, then run it from Python on a GPU.

python examples/own_model_to_pt2.py build model-folder     # needs no GPU
python examples/own_model_to_pt2.py run model-folder       # on a GPU, same torch version
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

BATCH, HEADS, HEAD_DIM = 2, 8, 128


class Encoder(torch.nn.Module):
    """Self-attention over a padded batch: a mask [B, 1, 1, L] says which tokens are real."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM, bias=False)

    def forward(self, x, real):
        """Takes x [B, L, H * D], real bool [B, L], returns [B, L, H * D]."""
        q, k, v = self.qkv(x).view(BATCH, -1, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
        return y.transpose(1, 2).flatten(2)


def model_and_inputs():
    """The module and inputs, the same for ``build`` and ``run``."""
    torch.manual_seed(0)
    model = Encoder().to(torch.bfloat16).eval().requires_grad_(False)
    x = torch.randn(BATCH, 300, HEADS * HEAD_DIM, dtype=torch.bfloat16)
    real = torch.arange(300) < torch.tensor([[300], [123]])
    return model, (x, real)


def build(folder: str) -> None:
    from flashpte.export.lowering import lower
    from flashpte.passes import format_table, replace_sdpa

    model, inputs = model_and_inputs()
    program, report = replace_sdpa(torch.export.export(model, inputs))
    print(format_table({"forward": report}))
    lower({"forward": program}, output_dir=folder, format="pt2")


def run(folder: str) -> None:
    model, inputs = model_and_inputs()
    compiled = torch._inductor.aoti_load_package(str(Path(folder) / "model.pt2"))
    inputs = [t.cuda() for t in inputs]
    out, expected = compiled(*inputs), model.cuda()(*inputs)
    print(f"largest difference from eager: {(out - expected).abs().max().item():.4f}")


if __name__ == "__main__":
    {"build": build, "run": run}[sys.argv[1]](sys.argv[2])
