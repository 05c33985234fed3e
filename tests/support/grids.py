"""The tiers of tests: which cases of a wide grid are marked ``sweep`` (``make test-sweep``), and which tests ``slow``.

A grid crosses shapes, archs or masks, and most of its cases repeat what others show. The remaining cases cover every
value of every axis, and each case that once found a fault. Run the sweep after a change to a kernel, a table of tiles
or a proof.
"""

from __future__ import annotations

import re

KEPT = {
    # Cubins of every tile: the arch with its own kernel, and the two ends of the others.
    "test_resources.py::test_no_spills_but_those_listed_and_no_more_shared_memory_than_there_is": (
        r"sm_90-(64|128|256|512)-(decode|verify 16|prefill)-positions|sm_90-(256|512)-verify 5-positions"
        r"|sm_90-320-|sm_90-192-verify of many|sm_90-128-prefill-tensor|sm_90-256-verify 16-tensor"
        r"|sm_80-(128|256)-(verify 16|prefill)-positions|sm_8[69]-512-prefill-positions|sm_120-512-decode-positions"
        r"|sm_(90|86)-576-(decode|prefill)-positions|sm_90-(80|160|192)-prefill-positions"
    ),
    "test_resources.py::test_softcaps_and_sinks_spill_no_more": (
        r"sm_90-(64|256|512)-(decode|verify 5|prefill)\]|sm_80-256-(verify 16|prefill)\]"
    ),
    "linear/test_resources.py::test_only_a_few_words_spill_and_shared_memory_suffices": (
        r"sm_90-1-4 bits(, zeros)?-b|sm_90-12-4 bits, groups of 128-b|sm_90-512-4 bits, zeros-b"
        r"|sm_90-40-8 bits, per channel-b|sm_80-512-4 bits, groups of 128, zeros|sm_120-1-8 bits, zeros"
    ),
    "linear/test_resources.py::test_tiles_of_few_rows_for_hopper": (
        r"4-32-False-(1|16)-(48|5376)|64-True-8-(8224|43008)|128-False-16-16384|8-\d+-False-(1|16)-(5376|43008)"
    ),
    "linear/test_resources.py::test_products_of_many_rows_for_hopper_run_side_by_side": (
        r"32-False-512|64-True-(40|128)"
    ),
    "linear/test_resources.py::test_float32_compiles": r"40",
    "linear/test_interpreted.py::test_float32_is_as_exact_as_a_plain_product": r"M3-|M40-|M33-",
    "linear/test_interpreted.py::test_few_rows_do_not_depend_on_tiles_and_splits": r"\(16, 4|\(32|\(64, 2",
    "linear/test_interpreted.py::test_many_rows_do_not_depend_on_tiles": r"\(64|\(32",
    "test_quantized_linear.py::test_a_program_of_dynamic_rows_lowers": r"none",
    "test_tuning.py::test_choices_compile_within_the_shared_memory_of_their_arch": r"(256|512)-.*-(sm_86|sm_90)",
    # Interpreted kernels take one second per program of a launch.
    "test_interpreted.py::test_dispatch_takes_one_kernel": (
        r"(True|False)-(bool_head|float_min_rows|is_causal)-(5|17)|True-(none|bool_context|bool_batch)-(16|40)"
        r"|True-none-1"
    ),
    "test_interpreted.py::test_split_k_does_not_depend_on_its_tiles": (
        r"16-16-True-(2|7)|16-64-False-3|32-32-True-(1|40)"
    ),
    "test_interpreted.py::test_tiled_with_intervals": r"gapped|ring|documents|batch|empty",
    "test_interpreted.py::test_split_k_with_intervals": r"\[5-|1-causal",
    "test_interpreted.py::test_split_k_with_the_tiles_of_a_dynamic_length": r"-5\]|bool_head-16|none-1\]",
    "test_interpreted.py::test_split_k_does_not_depend_on_what_edges_weigh": r"ring|documents-2|empty-7",
    "test_interpreted.py::test_tiled_does_not_depend_on_its_tiles": r"32-128|128-64",
    "test_scores_interpreted.py::test_tiled": (
        r"-M20-L70-.*-(none|is_causal|bool_ring|bool_empty_rows|float_min_rows|float_inf_context)-.*sinks_float16"
        r"|-M20-L77.*cap2|float32-bool_ring|-L1-"
    ),
    "test_scores_interpreted.py::test_split_k": (
        r"-M5-L130-.*-(none|bool_window|bool_ring|bool_all_empty|float_min_rows|float_bias)-.*sinks_float16"
        r"|-M5-.*-(none|bool_ring)-.*cap2|-M1-L(1|63)-|-M(3|2|16)-.*cap2"
    ),
    "test_scores_interpreted.py::test_a_sink_joins_once_whatever_the_splits": r"-7-|none-1",
    "test_scores_interpreted.py::test_intervals": r"\[(5|20)-(window|ring|empty)|1-(causal|gapped|documents)",
    # Rewritten programs.
    "test_fuse.py::test_q_k_v_and_gate_up_become_one_product_each": r"1-False-False|5-(True|False)-True",
    "test_mask_structure.py::test_proven_masks_are_computed_from_positions": r"5-False-False|40-True-True",
    "test_forms.py::test_ranks": r"-(5|40)-(True|False)",
    # Lowering takes half a minute.
    **{
        f"test_several_arches.py::{name}": r"side by side"
        for name in (
            "test_each_folder_is_an_export_of_its_own",
            "test_weights_are_on_the_disk_once",
            "test_the_folder_is_replaced_by_the_next_export_but_not_with_foreign_files",
            "test_running_the_whole_folder_names_its_parts",
        )
    },
    "test_softcap_and_sinks.py::test_all_three_lower": r"sm_90",
    # Families of models: one of each kind of layer.
    "test_families.py::test_a_session_gives_the_logits_of_transformers": (
        r"\[(cohere2|gemma2|gemma3_text|gpt_oss|gpt2|phi3|qwen3_moe)\]"
    ),
    # Models of 60 layers: tracing takes a minute.
    "test_models.py::test_executorch_gemma4_has_two_masks_in_all_layers": r"12",
    "test_models.py::test_hugging_face_gemma4_has_two_masks_in_all_layers": r"12",
    # Tests with their own processes.
    "test_endings.py::test_a_signal_in_the_middle": r"2-130|15-143",
}
"""By the end of the test's id without its case: a regular expression for the cases that stay in ``make test``."""

SLOW = (
    "examples/test_lowering_in_ci.py",
    "tests/benchmarks/test_measure.py",
    "tests/export/check/",
    "tests/export/cli/test_draft.py",
    "tests/export/cli/test_endings.py",
    "tests/export/cli/test_export_model.py",
    "tests/export/files/test_executorch_tables.py::test_reading_imports_no_compiler",
    "tests/export/files/test_tokenizer_json.py::test_a_run_imports_no_transformers",
    "tests/export/lowering/test_shared_names.py::test_names_of_lifted",
    "tests/export/models/test_build.py",
    "tests/export/models/test_equivalence.py",
    "tests/export/models/test_executorch_runners.py",
    "tests/export/models/test_families.py",
    "tests/export/models/test_methods.py",
    "tests/export/pipeline/test_fused_products.py::test_methods_share",
    "tests/export/runtime/test_profile.py::test_every_kernel",
    "tests/export/runtime/test_speculate.py::test_signatures",
    "tests/export/speculative/test_loop.py::test_samples_have",
    "tests/export/speculative/test_lossless.py",
    "tests/export/state/",
    "tests/export/weights/test_gguf.py::test_check_rebuilds",
    "tests/export/weights/test_gguf.py::test_gemma3",
    "tests/export/weights/test_recipe.py",
    "tests/kernels/linear/test_resources.py",
    "tests/kernels/test_resources.py",
    "tests/kernels/test_tuning.py::test_choices_compile",
    "tests/passes/linear/test_fuse.py::test_a_fused_program_decomposes",
    "tests/passes/test_dispatch.py",
    "tests/passes/test_edge_dialect.py::test_edge_programs",
    "tests/passes/test_mask_idioms.py",
    "tests/passes/test_mask_structure.py",
    "tests/passes/test_mask_traps.py",
    "tests/passes/test_models.py",
    "tests/passes/test_random_masks.py",
    "tests/passes/test_written_attention.py",
    "tests/test_packaging.py",
)
"""Beginnings of the ids of tests that are marked ``slow``, which ``make test-fast`` leaves out."""


def is_swept(test: str, case: str) -> bool:
    """Whether a case is left to ``make test-sweep``."""
    kept = next((pattern for name, pattern in KEPT.items() if test.endswith(name)), None)
    return kept is not None and re.search(kept, f"[{case}") is None  # cases are given without their bracket
