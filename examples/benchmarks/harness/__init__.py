"""The attention benchmark in parts: what is measured, who is measured, how, and what is made of the numbers.

============ ==================================================================
module       holds
============ ==================================================================
cases        shapes and cases of each suite, floors (data; no GPU)
inputs       tensors of a case, masks, the float32 reference
timing       CUDA-graph and plain timing, ceilings
ours         the operators as the pass emits them
peers        PyTorch's backends, FlexAttention, ExecuTorch
external     FlashInfer, FlashAttention 3
programs     attention in a program that AOTInductor compiled
runners      all of them by name
prepare      compiles everything beforehand, in processes side by side
measure      one case: check, then time
sweep        all tiles of a shape against the table's
schema       the result files: header, flat rows, what is wrong with one
results      what the attention suites measure, in memory and as result files
options      flags that all benchmarks share: --results, --from-json, --summary
targets      what is wanted of the numbers, and whether it is met
tables       the Markdown printer, and the marked tables of the docs
doc_tables   those tables by name
report       results of attention as text
plots        and as pictures
models       profiles of whole models as rows and tables
============ ==================================================================
"""
