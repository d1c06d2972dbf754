"""Packed attention against a dense mask written out by hand."""

import math
import sys
import types

import pytest
import torch
from torch.profiler import profile

from tuner.errors import UserError
from tuner.model import attention, attention_cuda
from tuner.model.attention import BACKENDS, attention_name, packed_attention, resolve_backend
from tuner.model.attention_sdpa import MIN_BUCKET, TINY, Pack, group

ORDINARY = [5, 1, 33, 17]
TINY_ONES = [1 + i % TINY for i in range(3 * MIN_BUCKET)]
MIXED = [40, *TINY_ONES, 0, 9, *TINY_ONES[::-1]]


def edges(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make_qkv(num_tokens: int, heads: int = 4, kv_heads: int = 2, size: int = 16, dtype=torch.float64) -> list:
    generator = torch.Generator().manual_seed(7)
    shapes = [(1, h, num_tokens, size) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def dense(query, key, value, cu_seqlens, scale=None, window=None) -> torch.Tensor:
    """The definition: softmax over the tokens that a token may see, kv heads repeated, all T x T scores."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    position = torch.arange(query.shape[2])
    document = torch.bucketize(position, cu_seqlens[1:].long(), right=True)
    distance = position[:, None] - position[None]
    visible = (document[:, None] == document[None]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    scores = query @ key.mT * (scale or 1 / math.sqrt(query.shape[-1]))
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ value


def output_and_gradients(function, tensors) -> list[torch.Tensor]:
    output = function(*tensors)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), tensors)]


def assert_same(got, expected, tolerance: float) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [[7], ORDINARY, TINY_ONES, MIXED], ids=["one", "ordinary", "tiny", "mixed"])
def test_output_and_gradients_equal_a_dense_mask(lengths, heads, dtype, tolerance):
    cu_seqlens, tensors = edges(lengths), make_qkv(sum(lengths), *heads, dtype=dtype)
    got = output_and_gradients(
        lambda q, k, v: packed_attention(q, k, v, cu_seqlens, max(lengths), backend="sdpa"), tensors
    )
    assert_same(got, output_and_gradients(lambda q, k, v: dense(q, k, v, cu_seqlens), tensors), tolerance)


@pytest.mark.parametrize("window", [1, 3, 8, 16, 32, 33, 100])
def test_a_window_equals_a_dense_band_in_each_document(window):
    lengths = [*TINY_ONES, 33, 64, 5, 100]
    cu_seqlens, tensors = edges(lengths), make_qkv(sum(lengths))
    got = output_and_gradients(
        lambda q, k, v: packed_attention(q, k, v, cu_seqlens, 100, scale=0.3, window=window, backend="sdpa"),
        tensors,
    )
    assert_same(got, output_and_gradients(lambda q, k, v: dense(q, k, v, cu_seqlens, 0.3, window), tensors), 1e-12)


@pytest.mark.parametrize("window", [None, 6])
def test_not_even_a_nan_passes_between_documents(window):
    """Tiny documents too: padding that borrowed a neighbour's token would fail here."""
    lengths = [*TINY_ONES, 20]
    cu_seqlens, tensors = edges(lengths), make_qkv(sum(lengths), dtype=torch.float32)

    def attend(q, k, v):
        return packed_attention(q, k, v, cu_seqlens, 20, window=window, backend="sdpa")

    clean = output_and_gradients(attend, tensors)
    sick = 5
    start, end = int(cu_seqlens[sick]), int(cu_seqlens[sick + 1])
    for tensor in tensors:
        tensor.data[:, :, start:end] = math.nan
    for before, after in zip(clean, output_and_gradients(attend, tensors), strict=True):
        assert after[:, :, start:end].isnan().all()
        others = torch.tensor([i for i in range(before.shape[2]) if not start <= i < end])
        assert torch.equal(before[:, :, others], after[:, :, others])


def test_the_cpu_runs_its_flash_kernel_forward_and_backward_with_kv_heads_not_repeated():
    lengths = [*TINY_ONES, 64, 40]
    tensors = make_qkv(sum(lengths), dtype=torch.float32)
    with profile() as record:
        packed_attention(*tensors, edges(lengths), 64, window=32, backend="sdpa").sum().backward()
    names = {event.key for event in record.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert not names & {"aten::_scaled_dot_product_attention_math", "aten::repeat_interleave"}


def test_tiny_documents_of_near_lengths_share_a_bucket_and_no_document_is_lost():
    alone, together = group(MIXED, TINY)
    grouped = [i for members in together for i in members]
    assert sorted(alone + grouped) == [i for i, length in enumerate(MIXED) if length]
    assert len(together) == 2
    assert all(max(MIXED[i] for i in bucket) - min(MIXED[i] for i in bucket) < 4 for bucket in together)
    assert group([3] * (MIN_BUCKET - 1), TINY) == (list(range(MIN_BUCKET - 1)), [])


def test_the_result_lies_in_memory_as_the_model_reads_it_next():
    output = packed_attention(*make_qkv(56), edges(ORDINARY), 33, backend="sdpa")
    assert output.transpose(1, 2).is_contiguous()


def test_autocast_mixed_precisions_meet_in_the_lower_one():
    query, key, value = make_qkv(56, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = packed_attention(query, key, value.bfloat16(), edges(ORDINARY), 33, backend="sdpa")
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), dense(query, key, value, edges(ORDINARY)), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen", "words"),
    [
        ([0, 5, 9], 5, r"from 0 to the 10 tokens.*\[0, 5, 9\]"),
        ([0, 5, 11], 6, "from 0 to the 10 tokens"),
        ([1, 5, 10], 5, "from 0"),
        ([0, 7, 5, 10], 7, "go up"),
        ([0], 10, "from 0"),
        ([0, 10], 9, "max_seqlen=9.*10 tokens"),
    ],
)
def test_edges_that_do_not_fit_are_refused(cu_seqlens, max_seqlen, words):
    with pytest.raises(UserError, match=words):
        packed_attention(*make_qkv(10), torch.tensor(cu_seqlens), max_seqlen, backend="sdpa")


def test_a_batch_of_rows_or_a_cache_is_refused():
    query, key, value = make_qkv(10)
    with pytest.raises(UserError, match="one row and no KV cache"):
        packed_attention(query.expand(2, -1, -1, -1), key, value, edges([10]), 10, backend="sdpa")
    with pytest.raises(UserError, match="one row and no KV cache"):
        packed_attention(query[:, :, -1:], key, value, edges([1]), 10, backend="sdpa")


def test_auto_takes_what_runs_here_and_a_name_that_does_not_run_says_why():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert resolve_backend("auto") == resolve_backend("sdpa") == "sdpa"
    with pytest.raises(UserError, match=r"needs a CUDA GPU.*'auto'"):
        resolve_backend("flash")
    with pytest.raises(UserError, match=r"unknown. Choose auto, flash, varlen, sdpa"):
        resolve_backend("flsh")


def test_no_name_makes_transformers_believe_in_its_own_flash_attention():
    assert not [name for name in map(attention_name, BACKENDS) if "flash" in name or "eager" in name]


def test_a_hopper_with_flash_attention_3_prefers_torchs_kernels(monkeypatch):
    free = {name: backend._replace(missing=lambda: None) for name, backend in BACKENDS.items()}
    monkeypatch.setattr(attention, "BACKENDS", free)
    monkeypatch.setattr(attention, "activate_flash_attention_3", lambda: True)
    assert resolve_backend("auto") == "varlen"
    monkeypatch.setattr(attention, "activate_flash_attention_3", lambda: False)
    assert resolve_backend("auto") == "flash"


def reference_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size):
    """What both CUDA kernels promise, (T, H, D) in and out; window_size counts tokens left and right of a query."""
    assert (max_q, max_k) == (33, 33)
    assert torch.equal(cu_q, cu_k)
    left, right = window_size
    assert right == 0 or window_size == (-1, -1)
    window = None if left == -1 else left + 1
    output = dense(*(t.transpose(0, 1)[None] for t in (q, k, v)), cu_q, scale, window)
    return output[0].transpose(0, 1)


def fake_flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """The signature of flash-attn 2.7."""
    assert causal
    return reference_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window_size)


def fake_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """The signature of torch 2.13; (-1, -1) would be attention to the future."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size != (-1, -1)
    return reference_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_the_cuda_backends_hand_their_kernels_what_these_expect(backend, window, monkeypatch):
    """The kernels themselves need a GPU; here a reference with their signature stands in."""
    flash_attn = types.ModuleType("flash_attn")
    flash_attn.flash_attn_varlen_func = fake_flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen_attn)
    monkeypatch.setattr(attention_cuda, "HALF", (torch.float64,))
    tensors, cu_seqlens = make_qkv(56), edges(ORDINARY)
    got = packed_attention(*tensors, cu_seqlens, 33, scale=0.2, window=window, backend=backend)
    torch.testing.assert_close(got, dense(*tensors, cu_seqlens, 0.2, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_the_cuda_kernels_refuse_fp32_with_the_remedy(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=None))
    pack = Pack(*make_qkv(56, dtype=torch.float32), edges(ORDINARY), 33, None, None)
    with pytest.raises(UserError, match=r"bf16 or fp16.*'sdpa'"):
        BACKENDS[backend].attend(pack)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_the_cuda_kernels_equal_a_dense_mask_in_bf16(backend, window):
    if (missing := BACKENDS[backend].missing()) is not None:
        pytest.skip(missing)
    tensors = [t.detach().to("cuda", torch.bfloat16).requires_grad_() for t in make_qkv(56, size=64)]
    cu_seqlens = edges(ORDINARY).cuda()
    got = output_and_gradients(
        lambda q, k, v: packed_attention(q, k, v, cu_seqlens, 33, window=window, backend=backend), tensors
    )
    exact = [t.detach().cpu().double().requires_grad_() for t in tensors]
    expected = output_and_gradients(lambda q, k, v: dense(q, k, v, edges(ORDINARY), None, window), exact)
    assert_same([t.cpu().double() for t in got], expected, 3e-2)
