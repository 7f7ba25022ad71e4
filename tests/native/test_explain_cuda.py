"""What `explain` says of GPUs that nobody needs to have."""

import pytest
import torch

import bnext.introspect
from native.test_plan_cuda import GPUS, plan


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gpu", GPUS)
def test_explain_without_a_gpu(gpu, memory_format, training) -> None:
    shape, last = (32, 64, 56, 56), memory_format is torch.channels_last
    e = bnext.explain(shape, torch.bfloat16, memory_format, training, GPUS[gpu], "relu", True)
    stage = "train" if training else "eval"
    for p, direction in ((e.forward, "forward"), (e.backward, "backward")):
        assert p == plan(32, 64, 56 * 56, f"{stage}_{direction}", channels_last=last, act="relu",
                         residual=True, gpu=gpu)  # fmt: skip
        blocks = f"{p.team_blocks} blocks" if p.team != "block" else "one block"
        for word in (p.family, p.index_map, blocks, f"launches: {p.launches}"):
            assert word in str(e)
    assert f"{GPUS[gpu].sms} SMs" in str(e)
    known = gpu in bnext.introspect.GPUS
    assert str(e).count("predicted, not measured") == 2 * known
    for prediction in e.predicted:
        assert (prediction is not None) == known
        if prediction:
            assert 0 < prediction.copy_share < 1 and prediction.seconds > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers")
def test_explain_says_what_to_give_it_where_there_is_no_gpu() -> None:
    for device in ("cuda", "cuda:0", torch.device("cuda", 1)):
        with pytest.raises(ValueError, match=r"cannot be asked|built without CUDA") as error:
            bnext.explain((2, 3, 4, 5), device=device)
        assert 'bnext.introspect.GPUS["H200"]' in str(error.value)
    with pytest.raises(ValueError, match="not for xpu"):
        bnext.explain((2, 3, 4, 5), device="xpu")


def test_explain_of_the_gpu_that_is_there() -> None:
    if not (torch.cuda.is_available() and bnext.build_info()["cuda"]):
        pytest.skip("needs a GPU and CUDA kernels in bnext._C")
    e = bnext.explain((2, 3, 4, 5), device="cuda")
    properties = torch.cuda.get_device_properties(0)
    assert e.device.sms == properties.multi_processor_count
    assert e.device.capability == 10 * properties.major + properties.minor
    assert e.device.l2_bytes == properties.L2_cache_size
