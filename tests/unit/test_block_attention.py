"""Blocks of a ring: kernels and plain arithmetic agree, and merged blocks are the attention of the whole."""

import pytest
import torch

from tuner.parallel import block_attention
from tuner.parallel.block_attention import Inputs, Outcome, attend_block, attend_block_backward
from tuner.parallel.zigzag import Block, blocks_of

EDGES = [0, 11, 12, 30, 48]
SCALE = 0.3


def make_inputs(block: Block, dtype: torch.dtype, window: int | None = None, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(1)
    sizes = [(4, len(block.query_rows)), (2, len(block.key_rows)), (2, len(block.key_rows))]
    tensors = [torch.randn(1, *size, 8, generator=generator, dtype=torch.float64) for size in sizes]
    return Inputs(*(tensor.to(device, dtype) for tensor in tensors), SCALE, window)


def by_plain_arithmetic(inputs: Inputs, block: Block, grad: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Output, log-sum-exp and gradients by one dense mask and autograd."""
    query, key, value = (tensor.double().requires_grad_() for tensor in inputs[:3])
    lengths = [torch.tensor(edges).diff() for edges in (block.query_edges, block.key_edges)]
    document = [torch.arange(len(length)).repeat_interleave(length) for length in lengths]
    ago = block.query_position[:, None] - block.key_position[None]
    seen = (document[0][:, None] == document[1][None]) & (ago >= 0)
    if inputs.window is not None:
        seen &= ago < inputs.window
    scores = (query @ key.repeat_interleave(2, dim=1).mT * SCALE).masked_fill(~seen, -torch.inf)
    output = scores.softmax(-1).nan_to_num() @ value.repeat_interleave(2, dim=1)
    if grad is None:
        return [output, scores.logsumexp(-1)]
    return list(torch.autograd.grad(output, (query, key, value), grad.double()))


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("num_queries", [3, 1024])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_block_and_its_gradients_are_those_of_a_dense_mask(dtype, num_queries, window, monkeypatch):
    monkeypatch.setattr(block_attention, "QUERIES_AT_ONCE", num_queries)
    atol = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for block in blocks_of(EDGES, 4, 2):
        inputs = make_inputs(block, dtype, window)
        expected = by_plain_arithmetic(inputs, block)
        got = attend_block(inputs, block)
        grad = torch.randn_like(expected[0]).to(dtype)
        if window is not None:  # a row that sees nothing here sees something elsewhere: it needs a finite total
            expected[1] = expected[1].nan_to_num(neginf=torch.inf)
            got = Outcome(got.output, got.lse.nan_to_num(neginf=torch.inf))
        torch.testing.assert_close(got.output.double(), expected[0], rtol=0, atol=atol)
        torch.testing.assert_close(got.lse.double(), expected[1], rtol=0, atol=min(atol, 1e-5))
        total = Outcome(expected[0].to(dtype), got.lse)
        gradients = attend_block_backward(grad, inputs, total, block)
        wanted = by_plain_arithmetic(inputs, block, grad)
        for gradient, reference in zip(gradients, wanted):
            torch.testing.assert_close(gradient.double(), reference.nan_to_num(), rtol=0, atol=atol)


def test_the_kernel_of_a_gpu_binds_with_the_shapes_that_it_gives():
    """Without a GPU the call is checked as far as torch's own schema and shape functions go."""
    for block in blocks_of(EDGES, 4, 2):
        edges = tuple(torch.tensor(each, dtype=torch.int32, device="meta") for each in block[2:4])
        block = block._replace(edges_on_device=edges)
        inputs = make_inputs(block, torch.bfloat16, device="meta")
        outcome = block_attention._flash_cuda(inputs, block)
        assert outcome.output.shape == inputs.query.shape
        assert (outcome.lse.shape, outcome.lse.dtype) == (inputs.query.shape[:3], torch.float32)
        gradients = block_attention._flash_cuda_backward(outcome.output, inputs, outcome, block)
        assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in inputs[:3]]


class VarlenOnCpu:
    """The two kernels of a GPU, document by document, by those of the CPU: tokens first, edges given."""

    @staticmethod
    def _flash_attention_forward(q, k, v, q_edges, k_edges, q_max, k_max, dropout, causal, debug, *, scale):
        assert (dropout, debug) == (0.0, False)
        assert [q_max, k_max] == [int(edges.diff().max()) for edges in (q_edges, k_edges)]
        parts = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.0, causal, scale=scale)
            for tensors in VarlenOnCpu.documents((q, q_edges), (k, k_edges), (v, k_edges))
        ]
        output, lse = (torch.cat(tensors, dim=2)[0] for tensors in zip(*parts))
        return output.transpose(0, 1), lse, None, None, None

    @staticmethod
    def _flash_attention_backward(
        grad, q, k, v, out, lse, q_edges, k_edges, q_max, k_max, dropout, causal, rng, unused, *, scale
    ):
        tokens_first = ((grad, q_edges), (q, q_edges), (k, k_edges), (v, k_edges), (out, q_edges))
        lse = lse[None].split(q_edges.diff().tolist(), dim=2)
        parts = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *tensors, part, 0.0, causal, scale=scale
            )
            for tensors, part in zip(VarlenOnCpu.documents(*tokens_first), lse)
        ]
        return tuple(torch.cat(tensors, dim=2)[0].transpose(0, 1) for tensors in zip(*parts))

    @staticmethod
    def documents(*pairs):
        return zip(*(x.transpose(0, 1)[None].split(edges.diff().tolist(), dim=2) for x, edges in pairs))


def test_what_goes_to_the_kernel_of_a_gpu_means_the_same_as_on_the_cpu(monkeypatch):
    for block in blocks_of(EDGES, 4, 2):
        inputs = make_inputs(block, torch.float64)
        expected = attend_block(inputs, block)
        grad = torch.randn_like(expected.output)
        gradients = attend_block_backward(grad, inputs, expected, block)
        edges = tuple(torch.tensor(each, dtype=torch.int32) for each in block[2:4])
        block = block._replace(edges_on_device=edges)
        with monkeypatch.context() as patch:
            patch.setattr(block_attention, "aten", VarlenOnCpu)
            got = block_attention._flash_cuda(inputs, block)
            got_gradients = block_attention._flash_cuda_backward(grad, inputs, expected, block)
        for one, other in zip((*got, *got_gradients), (*expected, *gradients)):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
