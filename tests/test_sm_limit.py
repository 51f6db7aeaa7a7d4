"""cuBLAS leaves SMs: told so within, not after, and the product is right."""

import contextlib
import ctypes
import types

import pytest
import torch

from maco_lib.overlap import sm_limit
from maco_lib.overlap.sm_limit import leaving, library


def target() -> int:
    value = ctypes.c_int(-1)
    assert library().cublasGetSmCountTarget(ctypes.c_void_p(torch.cuda.current_blas_handle()), ctypes.byref(value)) == 0
    return value.value


@pytest.mark.gpu(num_gpus=1)
def test_cublas_is_told_within_and_no_longer_after_even_an_error():
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).multi_processor_count
    with leaving(12, device):
        assert target() == total - 12
    assert target() == 0
    with pytest.raises(KeyError), leaving(4, device):
        raise KeyError("in the computation")
    assert target() == 0
    with leaving(12, device):
        with leaving(4, device):
            assert target() == total - 4
        assert target() == total - 12
    assert target() == 0
    for wrong in (-1, total):
        with pytest.raises(ValueError, match=f"num_sms = {wrong} .* of the {total}"), leaving(wrong, device):
            pass


@pytest.mark.gpu(num_gpus=1)
def test_a_matmul_that_leaves_most_sms_takes_longer_and_is_right():
    device = torch.device("cuda", 0)
    a, b = (torch.randn(4096, 4096, device=device).bfloat16() for _ in range(2))
    plain = a @ b

    def took(num_sms: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with leaving(num_sms, device):
            assert torch.equal(a @ b, plain) or float(((a @ b).double() - plain.double()).norm()) < 1e-2 * plain.norm()
            begin.record()
            for _ in range(20):
                a @ b
            end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    assert took(100) > 1.5 * took(0)


class FakeCublas:
    """cuBLAS's setting of one handle, without a GPU."""

    def __init__(self, num_sms: int):
        self.num_sms = num_sms

    def cublasGetSmCountTarget(self, handle, pointer) -> int:
        pointer._obj.value = self.num_sms
        return 0

    def cublasSetSmCountTarget(self, handle, num_sms) -> int:
        self.num_sms = num_sms.value
        return 0


@pytest.mark.parametrize("before", [0, 100])
def test_afterwards_as_many_sms_are_used_as_before(monkeypatch, before):
    cublas, gpu = FakeCublas(before), torch.device("cuda", 0)
    monkeypatch.setattr(sm_limit, "library", lambda: cublas)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(multi_processor_count=132)
    )
    with leaving(12, gpu):
        assert cublas.num_sms == 120
        with pytest.raises(KeyError), leaving(4, gpu):
            assert cublas.num_sms == 128
            raise KeyError("in the computation")
        assert cublas.num_sms == 120
    assert cublas.num_sms == before


def test_it_is_told_where_cublas_cannot_be_told(monkeypatch):
    def missing():
        raise OSError("libcublas.so.none: no such file")

    monkeypatch.setattr(sm_limit, "library", missing)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(multi_processor_count=132)
    )
    assert "libcublas.so.none" in sm_limit.unavailable(8, gpu)
    monkeypatch.setattr(sm_limit, "library", object)
    assert "cublasSetSmCountTarget" in sm_limit.unavailable(8, gpu)
    monkeypatch.setattr(sm_limit, "library", lambda: types.SimpleNamespace(cublasSetSmCountTarget=print))
    assert sm_limit.unavailable(131, gpu) == "" and "cuda:0 has 132 SMs" in sm_limit.unavailable(132, gpu)
