"""Tables of every name in PyTorch, Triton and ExecuTorch that cross-compiling replaces.

Lowering for a GPU needs one only for incidental reasons: to ask for its limits, to hold the weights, to time kernels.
:data:`TABLE` lists each replacement, its reason, and the PyTorch versions whose source was read for it. A missing name
stops the lowering with a message that names it. Every name is restored on exit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from flashpte.export.common.gc_tuning import return_freed_memory
from flashpte.export.lowering.cross_compile import (
    compile_kernels,
    dependent_launch,
    edge_passes,
    gluon,
    host_weights,
    kernel_code,
    lifted_constants,
    methods,
    plain_products,
    reductions,
    scratch,
)
from flashpte.export.lowering.cross_compile.device_interface import device_properties, make_interface
from flashpte.export.lowering.cross_compile.memory_layouts import (
    check_outputs,
    keep_old_values,
    pin_cond_operands,
    realise_once,
    whole_outputs,
)
from flashpte.export.lowering.cross_compile.override_table import Make, Override, Target
from flashpte.export.lowering.cross_compile.toolchain import embed_cubin
from flashpte.export.lowering.cross_compile.triton_driver import make_driver


def _answer(value: Callable[[Target], Any]) -> Make:
    """A function that ignores its arguments and returns a fact about the target."""
    return lambda target, original: lambda *args, **kwargs: value(target)


def _inside_codegen(target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        target.compiling += 1
        try:
            return original(*args, **kwargs)
        finally:
            target.compiling -= 1

    return run


def _with_original(function: Callable[..., Any]) -> Make:
    """Binds the original as the first argument of ``function``."""
    return lambda target, original: functools.partial(function, original)


def _triton_backend(target: Target, original: Any) -> Any:
    return type(original)(compiler=original.compiler, driver=make_driver(target.arch))


def _compile_command(target: Target, original: Callable[[str, str], None]) -> Callable[[str, str], None]:
    return lambda cmd_line, cwd: original(target.flags.rewrite(cmd_line), cwd)


def _compile_wrapper(target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    def compile_(graph: Any, wrapper_code: str, *args: Any, **kwargs: Any) -> Any:
        if target.on_wrapper is not None:
            target.on_wrapper(wrapper_code)
        # Fix the seed: a package that maps its weights into memory contains a random number.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return original(graph, wrapper_code, *args, **kwargs)

    return compile_


def _custom_passes(target: Target, original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    from flashpte.export.lowering.cross_compile.restore_views import RestoreViews

    # Last, because one of ExecuTorch's passes validates the program, and a view is not an edge operator.
    last = [RestoreViews()] if target.restore_views else []
    return lambda compile_specs: [*original(compile_specs), *last]


def _stable_int_arrays(target: Target, original: Callable[..., str]) -> Callable[..., str]:
    """Keeps alive the writers that Inductor tells apart by address, so that no address is used twice."""

    def codegen_int_array_var(self: Any, int_array: str, writeline: Any, *args: Any, **kwargs: Any) -> str:
        writers = vars(self).setdefault("_flashpte_writers", {})
        key = (id(getattr(writeline, "__self__", writeline)), getattr(writeline, "__name__", ""))
        return original(self, int_array, writers.setdefault(key, writeline), *args, **kwargs)

    return codegen_int_array_var


def _package(target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    from flashpte.export.lowering.cross_compile.package_files import tidy_package_files

    return lambda archive_file, aoti_files: original(archive_file, tidy_package_files(aoti_files))


def _write_storage(target: Target, original: Callable[[torch.Tensor, str], bytes]) -> Callable[..., bytes]:
    files = host_weights.StorageFiles(target.work_dir)
    return lambda tensor, path: files.write(original, tensor, path)


_QUESTION = "asked for by Inductor, by templates and by our own kernels' tile choice"
_NO_RUNTIME = "would initialize the CUDA runtime"

TABLE: tuple[Override, ...] = (
    # Questions about the device.
    Override("torch.cuda:get_device_properties", _QUESTION, _answer(lambda t: device_properties(t.arch))),
    Override("torch.cuda:get_device_capability", _QUESTION, _answer(lambda t: t.arch.capability)),
    Override("torch.cuda:get_device_name", _QUESTION, _answer(lambda t: t.arch.product)),
    Override("torch.cuda:current_device", _QUESTION, _answer(lambda t: 0)),
    Override("torch.cuda:is_tf32_supported", _QUESTION, _answer(lambda t: t.arch.capability[0] >= 8)),
    Override(
        "torch.cuda:is_available",
        "code generation takes its CUDA branches only when this is true; all other code must not touch a GPU, so that "
        "the result is the same with and without one",
        _answer(lambda t: t.compiling > 0),
    ),
    Override("torch._inductor.graph:GraphLowering.run", "marks code generation for is_available", _inside_codegen),
    Override(
        "torch._inductor.graph:GraphLowering.codegen_with_cpp_wrapper",
        "marks code generation for is_available",
        _inside_codegen,
    ),
    Override("torch.cuda:_exchange_device", _NO_RUNTIME, _answer(lambda t: 0)),
    Override("torch.cuda:_maybe_exchange_device", _NO_RUNTIME, _answer(lambda t: 0)),
    Override("torch.cuda:synchronize", _NO_RUNTIME, _answer(lambda t: None)),
    Override("torch.cuda:get_rng_state", _NO_RUNTIME, _answer(lambda t: torch.zeros(16, dtype=torch.uint8))),
    Override("torch.cuda:set_rng_state", _NO_RUNTIME, _answer(lambda t: None)),
    Override("torch._subclasses.fake_tensor:init_gpu_context", _NO_RUNTIME, _answer(lambda t: None)),
    Override(
        "torch._dynamo.device_interface:device_interfaces[cuda]",
        "Inductor asks here for properties, streams and whether Triton works",
        lambda target, original: make_interface(target.arch),
    ),
    Override(
        "torch._dynamo.device_interface:device_interfaces[cuda:0]",
        "the same, by index",
        lambda target, original: make_interface(target.arch),
        adds=True,
    ),
    Override(
        "torch._inductor.choices:InductorChoices.should_use_persistent_reduction",
        "the norms of a decoder layer would read a row of 5,376 elements three times",
        _with_original(reductions.is_persistent),
        checked=("2.11", "2.13"),
    ),
    # Triton.
    Override("triton.backends:backends[nvidia]", "its driver loads libcuda", _triton_backend),
    Override(
        "triton.runtime:driver._active",
        "the driver in use; Triton's own needs a GPU",
        lambda target, original: make_driver(target.arch)(),
    ),
    # Weights stay on the host.
    Override(
        "torch.export.passes:move_to_device_pass",
        "copies the weights to the GPU",
        _with_original(host_weights.move_program),
    ),
    Override(
        "torch.export:ExportedProgram.__deepcopy__",
        "ExecuTorch copies each program several times; a copy of the weights per method would not fit in memory",
        lambda target, original: host_weights.deepcopy_sharing_tensors,
        adds=True,
    ),
    Override(
        "torch._inductor.graph:GraphLowering.get_original_value_of_constant",
        "reads the values to be written into the package",
        lambda target, original: lambda self, name: host_weights.host_value(name, original(self, name)),
    ),
    Override(
        "torch._inductor.graph:is_same_tensor",
        "compares addresses, and fake tensors have none: all constants of a shape would be merged",
        _with_original(host_weights.is_same_weight),
    ),
    Override(
        "torch._inductor.compile_fx:clone_preserve_strides",
        "clones mutated buffers to remember their initial value",
        _with_original(host_weights.clone_with_host),
    ),
    # Kernels are compiled and saved, never launched.
    Override(
        "torch._inductor.codegen.wrapper:PythonWrapperCodegen.generate_and_run_autotune_block",
        "launches every kernel to compile and time it",
        compile_kernels.compile_and_save,
    ),
    Override(
        "torch._inductor.runtime.triton_heuristics:CachingAutotuner.precompile",
        "compiles each kernel where it is defined, before the other kernels are known",
        compile_kernels.hold_back,
        checked=("2.11", "2.13", "2.14"),
    ),
    # Kernels that use more than plain Triton: Gluon and assembly.
    Override(
        "flashpte.kernels.launch:INDUCTOR_IS_TAUGHT",
        "without the entries below, a program can only hold kernels that Inductor understands",
        lambda target, original: True,
    ),
    Override(
        "torch._inductor.codegen.wrapper:user_defined_triton_kernel_transitive_closure_source_code",
        "writes out all of a kernel's functions as Triton's, without the modules that they use",
        lambda target, original: gluon.source_code(original),
    ),
    Override(
        "torch._inductor.runtime.triton_heuristics:ASTSource",
        "compiles every kernel as Triton",
        lambda target, original: gluon.ast_source(original),
    ),
    Override(
        "torch._higher_order_ops.triton_kernel_wrap:generate_ttir",
        "cannot make intermediate code for Gluon or understand assembly, so all arguments would count as written and "
        "be copied; also makes it anew for every launch",
        lambda target, original: kernel_code.remember(dependent_launch.generate_ttir(gluon.generate_ttir(original))),
    ),
    Override(
        "torch._higher_order_ops.triton_kernel_wrap:ttir_to_functions",
        "reads the intermediate code anew for every launch: a fifth of Inductor's time for 30 layers",
        lambda target, original: kernel_code.remember_functions(original),
        checked=("2.11", "2.13"),
    ),
    Override(
        "torch._inductor.fx_passes.post_grad:decompose_triton_kernel_wrapper_functional",
        "traces every launch twice more: an eighth of Inductor's time for 30 layers",
        lambda target, original: kernel_code.write_in_place(original),
        checked=("2.11", "2.13"),
    ),
    # Kernels that wait for their predecessors themselves.
    Override(
        "torch._inductor.codegen.triton:TritonScheduling.define_kernel",
        "writes kernels that do not wait, so that each starts 0.7 us after the end of the previous one",
        lambda target, original: dependent_launch.define_kernel(original, target.arch.capability),
        checked=("2.11", "2.13"),
    ),
    Override(
        "torch._inductor.codegen.cuda.device_op_overrides:CUDADeviceOpOverrides.kernel_driver",
        "has no helper that launches a kernel before the previous one ends",
        lambda target, original: dependent_launch.kernel_driver(original),
        checked=("2.11", "2.13", "2.14"),
    ),
    Override(
        "torch._inductor.codegen.cpp_wrapper_gpu:DeferredTritonCallWrapper.generate_launch_kernel",
        "launches every kernel after the end of the previous one: an attention kernel waits 0.5 to 1 us too long",
        lambda target, original: dependent_launch.generate_launch_kernel(original),
        checked=("2.11", "2.13", "2.14"),
    ),
    Override(
        "torch._inductor.codegen.cuda.device_op_overrides:CUDADeviceOpOverrides.cpp_scratch",
        "2.11 allocates for all programs of a launch what one program needs: they would write past its end",
        lambda target, original: scratch.cpp_scratch(original),
        checked=("2.11", "2.13", "2.14"),
    ),
    # Dynamic sizes.
    Override(
        "torch.fx.experimental.symbolic_shapes:ShapeEnv._refine_ranges",
        "a test on the example's sizes, such as whether 8 rows fit one tile of 128, would narrow the range that the "
        "method declares, and indices would have 32 bits where longer calls need 64",
        lambda target, original: lambda self, expr: None,
    ),
    # Layouts.
    Override(
        "torch._inductor.lowering:constrain_to_fake_tensor",
        "writes an argument of Triton kernels that is not in memory yet once for every kernel that reads it, such as a "
        "mask once per layer",
        lambda target, original: realise_once(original),
    ),
    Override(
        "torch._inductor.graph:GraphLowering.call_function",
        "a Triton kernel in a branch of torch.cond gets the strides that its arguments had when the branch was traced, "
        "but Inductor may lay them out differently: the kernel would read other elements",
        lambda target, original: pin_cond_operands(original),
    ),
    # Host code.
    Override(
        "torch._inductor.codegen.cpp_wrapper_cpu:CppWrapperCpu.codegen_int_array_var",
        "2.11 and 2.13 cache by the address of freed objects: names vary, and at worst declarations",
        _stable_int_arrays,
    ),
    Override(
        "torch._inductor.cpp_builder:_run_compile_cmd",
        "compiles for the build machine's CPU and writes its paths into the binary",
        _compile_command,
    ),
    Override(
        "torch._inductor.cpu_vec_isa:valid_vec_isa_list",
        "probes the build machine's vector instructions and compiles host code with them",
        _answer(lambda t: []),
    ),
    Override(
        "torch._dynamo.repro.after_aot:save_graph_repro",
        "writes every program out as text for TORCH_TRACE, which is rarely set: 6 s for a method of 60 layers",
        lambda target, original: original if os.environ.get("TORCH_TRACE") else lambda *args, **kwargs: None,
        checked=("2.11", "2.13"),
    ),
    Override(
        "torch._inductor.fx_passes.post_grad:remove_noop_ops",
        "removes copies of buffers that the program writes later",
        lambda target, original: keep_old_values(original),
        checked=("2.11", "2.13"),
    ),
    Override("torch._inductor.codecache:AotCodeCompiler.compile", "draws a random number", _compile_wrapper),
    Override(
        "torch._inductor.codecache:convert_cubin_to_obj",
        "orders symbols by a hash of temporary paths (2.11 uses it; later versions fall back on it)",
        lambda target, original: lambda cubin_file, kernel_name, ld, objcopy: embed_cubin(cubin_file, kernel_name),
    ),
    Override("torch.utils.cpp_extension:CUDA_HOME", "no CUDA toolkit is needed", lambda t, original: t.cuda_home),
)

EXECUTORCH_TABLE: tuple[Override, ...] = (
    Override(
        "torch._inductor.graph:GraphLowering.output",
        "returns views, which ExecuTorch's runtime refuses when the program is called",
        lambda target, original: whole_outputs(original),
        checked=("2.11", "2.13"),
    ),
    Override(
        "torch._inductor.graph:GraphLowering.codegen",
        "the first point where the layouts of all outputs are known and can be checked",
        lambda target, original: check_outputs(original),
        checked=("2.11", "2.13"),
    ),
    Override(
        "torch._inductor.fx_passes.quantization:L",
        "turns products with int8 weights into calls of libtorch, which ExecuTorch does not have",
        lambda target, original: plain_products.int8_by_templates(original),
        checked=("2.11", "2.13"),
    ),
    Override(
        "executorch.exir.program._program:lift_constant_tensor_pass",
        "numbers constants in each method separately, but methods share tensors by name",
        _with_original(lifted_constants.lift_by_value),
    ),
    Override(
        "executorch.exir.passes.normalize_transpose_pass:NormalizeTransposePass.call",
        "interprets the program to look for an operator that it does not have",
        lambda target, original: edge_passes.only_with(edge_passes.is_transpose, original),
        adds=True,
        checked=("2.11", "2.13"),
    ),
    Override(
        "executorch.exir.passes.replace_broken_ops_with_function_ops_pass:ReplaceBrokenOpsWithFunctionalOpsPass.call",
        "interprets the program to look for views, which it does not have",
        lambda target, original: edge_passes.only_with(edge_passes.is_view, original),
        adds=True,
        checked=("2.11", "2.13"),
    ),
    Override(
        "executorch.backends.aoti.aoti_backend:move_to_device_pass",
        "copies the weights to the GPU",
        _with_original(host_weights.move_program),
    ),
    Override(
        "executorch.backends.cuda.cuda_backend:CudaBackend._setup_cuda_environment_for_fatbin",
        "asks for fat binaries when PyTorch was built with CUDA 12.9 or newer; they need nvcc, and a build "
        "must not depend on how PyTorch was built",
        _answer(lambda t: False),
    ),
    Override(
        "executorch.backends.cuda.cuda_backend:CudaBackend.preprocess_multimethod",
        "compiles one method after the other on one core",
        methods.compile_beside,
        checked=("2.11", "2.13"),
    ),
    Override(
        "executorch.backends.cuda.cuda_weight_collector:trim_host_memory",
        "collects garbage twice per method among all objects of all programs: 7 s each time for 60 layers",
        lambda target, original: return_freed_memory,
        checked=("2.11", "2.13"),
    ),
    Override(
        "executorch.backends.cuda.cuda_weight_collector:_write_tensor_storage",
        "writes all weights once per method",
        _write_storage,
    ),
    Override(
        "executorch.backends.cuda.cuda_backend:CudaBackend.get_custom_passes",
        "restores only slice, select and split of the edge dialect's view copies; the others would copy caches",
        _custom_passes,
    ),
)

PT2_TABLE: tuple[Override, ...] = (
    Override("torch._inductor.package:package_aoti", "packages sources that name the build machine", _package),
)
