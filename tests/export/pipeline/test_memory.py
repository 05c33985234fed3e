"""An export's memory does not grow with its weights."""

import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import dataclasses, resource, sys
    from pathlib import Path
    from flashpte.export.common.options import ExportOptions
    from flashpte.export.models import registry
    from flashpte.export.models.gemma4 import TARGET
    from flashpte.export.pipeline import export_model, plan_export

    sys.path.insert(0, {support!r})
    from host_code import checked_host_code
    from kernel_cache import shared_kernels

    wide, output = int(sys.argv[1]), Path(sys.argv[2])
    sizes = dict(TARGET.small_config, intermediate_size=wide)
    small = dataclasses.replace(TARGET, small_config=sizes)
    known = registry._builtin_targets()
    registry._builtin_targets = lambda: {{**known, TARGET.name: small}}
    options = ExportOptions(TARGET.name, small=True, random_seed=0, layers=2, max_seq_len=64, method="decode")
    with checked_host_code(), shared_kernels():
        export_model(plan_export(options), output, arch="sm_90")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak(folder, wide):
    """Most bytes that an export had in memory, and those of its weights."""
    from pathlib import Path

    support = str(Path(__file__).parents[2] / "support")
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT.format(support=support)), str(wide), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]), (folder / "aoti_cuda_blob.ptd").stat().st_size


@pytest.mark.lowering
def test_most_of_the_weights_are_never_in_memory(tmp_path):
    small, small_weights = peak(tmp_path / "small", 512)
    large, large_weights = peak(tmp_path / "large", 160 * 1024)
    assert large_weights - small_weights > 450e6
    # Two weights of 84 MB are drawn and written at a time, one per processor.
    assert large - small < 250e6
