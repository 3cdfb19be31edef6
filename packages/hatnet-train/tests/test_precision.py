from pathlib import Path

import pytest
import torch

from hatnet_train.precision import fast_precision


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_a_cpu_computes_in_bf16_if_the_kernel_lists_instructions_for_it():
    words = set(Path("/proc/cpuinfo").read_text().split())
    precision, reason = fast_precision(torch.device("cpu"))
    assert precision == ("bf16" if words & {"amx_bf16", "avx512_bf16", "bf16"} else "fp32")
    assert reason


def test_another_kind_of_device_computes_in_fp32():
    assert fast_precision(torch.device("meta"))[0] == "fp32"
