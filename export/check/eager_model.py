"""The eager Hugging Face model that an export came from, the reference of ``run-model --check``.

It is built from the config in the manifest and the checkpoint's weights or the seed of random ones. It uses no exported
program, and neither cache nor attention of flashpte.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashpte.export.common.errors import Option, ProgramError, wanted
from flashpte.export.files.dtypes import read_dtype

if TYPE_CHECKING:
    from flashpte.export.check.eager_draft import EagerDraft
    from flashpte.export.pipeline.draft_plan import DraftPlan
    from flashpte.export.state.layer_state import LayerState
    from flashpte.export.weights.origin import Origin


LayerStateOf = Callable[[nn.Module], "LayerState"]
"""Returns the state of a decoder layer, see ``TargetSpec.layer_state``."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of an eager model for one sequence of T tokens; all tensors are on the CPU.

    Attributes:
        logits: [R, V], of the requested rows.
        states: for each layer, what it holds after the sequence, by the names in its rules, such as keys and values
            [H_kv, T, D].
        features: [T, C], what a draft reads; ``None`` without a draft.
    """

    logits: torch.Tensor
    states: tuple[Mapping[str, torch.Tensor], ...] = ()
    features: torch.Tensor | None = None


class EagerModel:
    """A Hugging Face causal language model with its own attention and cache, without gradients.

    Args:
        model: the model.
        device: the device that it runs on.
        draft: a draft that reads its hidden states; ``None`` for none.
        layer_state: returns a decoder layer's state; ``None`` for Hugging Face attention.

    Attributes:
        draft: the eager draft; ``None`` without one.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str,
        draft: DraftPlan | None = None,
        layer_state: LayerStateOf | None = None,
    ):
        from flashpte.export.check.eager_draft import eager_draft
        from flashpte.export.models.build import attention_of, decoder_layers

        self.device = torch.device(device)
        self._model: Any = model.to(self.device).eval()
        self._states = [(layer_state or attention_of)(layer) for layer in decoder_layers(model)]
        self.draft: EagerDraft | None = None
        if draft is not None:
            untyped: Any = model
            self.draft = eager_draft(draft, untyped.get_input_embeddings().weight)

    def evaluate(self, tokens: Sequence[int], rows: Sequence[int], noise: int = 0) -> Evaluation:
        """One forward over a whole sequence; returns the logits at ``rows`` and the states of all layers.

        Args:
            tokens: the sequence.
            rows: positions in it.
            noise: a seed; each layer's output is then multiplied by 1 plus up to half an ulp (uniform), as if it had
                been rounded once more. 0 for none.
        """
        from flashpte.export.models.eagle3_methods import recorded_taps

        cache = self._cache()
        taps = () if self.draft is None else self.draft.taps
        features = None
        with torch.no_grad(), self._noise(noise), recorded_taps(self._model, taps) as tapped:
            output = self._model(
                input_ids=torch.tensor([list(tokens)], device=self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.tensor(list(rows), device=self.device),
            )
            if self.draft is not None:
                features = self.draft.fuse(tapped)[0].cpu()
        layers: Any = cache.layers
        return Evaluation(
            output.logits[0].cpu(),
            tuple(
                {name: held.cpu() for name, held in state.read_reference(layer).items()}
                for state, layer in zip(self._states, layers, strict=True)
            ),
            features,
        )

    @contextlib.contextmanager
    def _noise(self, seed: int) -> Iterator[None]:
        from flashpte.export.models.build import decoder_layers

        if not seed:
            yield
            return
        generator = torch.Generator(self.device).manual_seed(seed)

        def disturbed(hidden: torch.Tensor) -> torch.Tensor:
            unit = torch.rand(hidden.shape, generator=generator, device=hidden.device, dtype=torch.float64) * 2 - 1
            return (hidden.double() * (1 + unit * torch.finfo(hidden.dtype).eps / 2)).to(hidden.dtype)

        def after_layer(_module: nn.Module, _args: Any, output: Any) -> Any:
            return (disturbed(output[0]), *output[1:]) if isinstance(output, tuple) else disturbed(output)

        handles = [layer.register_forward_hook(after_layer) for layer in decoder_layers(self._model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _cache(self) -> Any:
        from transformers import Cache

        return Cache(layers=[state.reference() for state in self._states])

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Decodes ``count`` tokens greedily after a prompt."""
        cache, fed, tokens = self._cache(), list(prompt), []
        with torch.no_grad():
            for _ in range(count):
                ids = torch.tensor([fed], device=self.device)
                output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                tokens.append(int(output.logits[0, -1].argmax()))
                fed = tokens[-1:]
        return tokens


def rebuild(
    manifest: Mapping[str, Any], checkpoint: Path | None, gguf_file: Path | None = None, *, quantized: bool = True
) -> nn.Module:
    """The model that a manifest describes, in the dtype of the export, on the CPU.

    Args:
        manifest: the manifest of an ``export-model`` folder.
        checkpoint: the Hugging Face folder that was exported; ``None`` for another origin.
        gguf_file: the GGUF file that was exported; ``None`` for another origin.
        quantized: ``False`` keeps all weights dense.

    Raises:
        ExportError: the manifest does not say enough, or the checkpoint is missing or not the one exported.
    """
    from flashpte.export.models.build import cut_layers
    from flashpte.export.models.registry import get_target
    from flashpte.export.models.rope import fix_rope
    from flashpte.export.weights.origin import open_origin
    from flashpte.export.weights.random import RandomWeights
    from flashpte.export.weights.recipe import WeightSource, fill_weights, plan_weights, read_recipe

    described = manifest.get("model")
    if not isinstance(described, dict) or not isinstance(described.get("config"), dict) or "target" not in manifest:
        raise ProgramError(
            Option("check"), ": the manifest does not describe a model: export it again with this export-model"
        )
    weights = manifest.get("weights")
    kind = weights if isinstance(weights, str) else ""
    given = {"checkpoint": checkpoint, "gguf_file": gguf_file}
    what = {"checkpoint": ("a checkpoint", "the folder"), "gguf_file": ("a GGUF file", "the file")}
    if kind in given and given[kind] is None:
        origin_name, exported = what[kind]
        raise ProgramError(
            Option("check"), f": this is the export of {origin_name}: add ", wanted(kind), f", {exported} exported"
        )
    for name, value in given.items():
        if value is not None and kind != name:
            has = f"the weights of {what[kind][0]}" if kind in given else "random weights"
            raise ProgramError(Option(name), f": this export has {has}, not those of {what[name][0]}")
    origin = open_origin(checkpoint, gguf_file)
    if origin is not None:
        _check_same_config(origin, described["config"])
    model = get_target(str(manifest["target"])).build(described["config"])
    total, kept = int(described["total_layers"]), int(described["layers"])
    if kept < total:
        cut_layers(model, kept)
    fix_rope(model, int(described["max_seq_len"]))
    dtype = read_dtype(described["dtype"])
    source: WeightSource
    if origin is not None:
        source = origin.weights(model, total)
    elif isinstance(weights, dict) and isinstance(weights.get("random_seed"), int):
        source = RandomWeights(model, dtype, weights["random_seed"])
    else:
        raise ProgramError(Option("check"), ": the manifest does not say where its weights came from")
    recipe = read_recipe(manifest.get("weight_formats"), described["dtype"])
    if not quantized:
        recipe = recipe.dense()
    fill_weights(model, plan_weights(model, recipe), source)
    untyped: Any = model
    untyped.set_attn_implementation("sdpa" if _sdpa_serves(model) else "eager")
    return model.eval()


def _sdpa_serves(model: nn.Module) -> bool:
    """Whether transformers' SDPA attention computes what the model asks for.

    It ignores softcaps and sinks. Some models say that they have no SDPA attention, and others do not: Gemma 2 in
    transformers 5.17 does not, in 5.24 it does.
    """
    from flashpte.export.models.build import decoder_layers
    from flashpte.export.models.probe import attention_shape

    untyped: Any = model
    shapes = map(attention_shape, decoder_layers(model))
    return untyped._supports_sdpa and not any(shape is not None and shape.beyond_sdpa for shape in shapes)


def _check_same_config(origin: Origin, config: Mapping[str, Any]) -> None:
    found = origin.config()
    different = sorted(name for name in {*found, *config} if found.get(name) != config.get(name))
    if different:
        raise ProgramError(
            Option(origin.option, origin.given), f" is not what was exported: {different[0]} of its config differs"
        )


def why_no_dense_model(checkpoint: Path | None, gguf_file: Path | None) -> str | None:
    """Why there are no weights from before they were quantized; ``None`` if there are.

    Args:
        checkpoint: the Hugging Face folder that was exported; ``None`` for another origin.
        gguf_file: the GGUF file that was exported; ``None`` for another origin.
    """
    from flashpte.export.weights.origin import open_origin

    origin = open_origin(checkpoint, gguf_file)
    return None if origin is None or not origin.quantized else f"{origin.given.name} was quantized already"


def dense_model(
    manifest: Mapping[str, Any], checkpoint: Path | None, gguf_file: Path | None, like: EagerModel
) -> EagerModel:
    """The reference without quantized weights, in the wider dtype; on the device of ``like`` if it fits.

    Args:
        manifest: the manifest of an ``export-model`` folder with quantized weights.
        checkpoint: the Hugging Face folder that was exported; ``None`` for another origin.
        gguf_file: the GGUF file that was exported, of dense weights; ``None`` for another origin.
        like: the reference with quantized weights.

    Raises:
        ExportError: as :func:`rebuild`.
    """
    from flashpte.export.models.registry import get_target

    model = rebuild(manifest, checkpoint, gguf_file, quantized=False)
    model = model.to(reference_dtype(read_dtype(manifest["model"]["dtype"])))
    device = like.device
    if device.type == "cuda":
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        device = device if torch.cuda.mem_get_info()[0] > 1.5 * size else torch.device("cpu")
    return EagerModel(model, device, None, get_target(str(manifest["target"])).layer_state)


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    """The wider dtype of the reference: float32, or float64 for a float32 program."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def eager_pair(
    model: nn.Module, draft: DraftPlan | None = None, layer_state: LayerStateOf | None = None
) -> tuple[EagerModel, EagerModel]:
    """The model in its own dtype and, as the reference, in the wider dtype; on the GPU if both fit.

    Args:
        model: the target.
        draft: a draft with its weights; each model gets a copy. ``None`` for none.
        layer_state: returns a decoder layer's state; ``None`` for Hugging Face attention.
    """
    weights = model.state_dict().values()
    own = max((t.dtype for t in weights if t.is_floating_point()), key=lambda dtype: dtype.itemsize)
    size = sum(t.numel() * t.element_size() for t in weights)
    wider = reference_dtype(own)
    device = "cpu"
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        if free > 2 * (size + size * wider.itemsize // own.itemsize):
            device = "cuda"
    wide = copy.deepcopy(model).to(wider)
    return EagerModel(model, device, draft, layer_state), EagerModel(wide, device, draft, layer_state)
