"""Calls the operators on a GPU that is not there, with batches of many sizes; prints what was launched as JSON.

A process of its own for tests/test_launches.py: python absent_gpu_worker.py CAPABILITY
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import torch
from harness import absent_gpu
from upperson_kernels import layernorm_adapter, prefix_attention, quick_gelu

absent_gpu.install(int(sys.argv[1]))
BF16 = torch.bfloat16


def parameter(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype).requires_grad_()


def attention(batch, length, heads, causal, offsets=None):
    shape = (batch, length) if offsets is None else (offsets[-1],)
    qkv = parameter(*shape, 3, heads, 64)
    packed = {}
    if offsets is not None:
        packed = dict(cu_seqlens=torch.tensor(offsets, dtype=torch.int32), max_seqlen=77)
    prefix = parameter(10, heads, 64), parameter(10, heads, 64), parameter(dtype=torch.float32)
    out = prefix_attention(qkv, *prefix, causal=causal, **packed)
    out.backward(torch.empty_like(out))


def adapter(rows, width, hidden):
    x, residual = parameter(rows, width), parameter(rows, width)
    weights = torch.empty(width), torch.empty(width), parameter(hidden, width), parameter(hidden, dtype=torch.float32)
    rest = parameter(width, hidden), parameter(width, dtype=torch.float32), parameter(dtype=torch.float32)
    y, stream = layernorm_adapter(x, *weights, *rest, residual=residual)
    torch.autograd.backward((y, stream), (torch.empty_like(y), torch.empty_like(y)))


def activation(rows, width, offset=0):
    x = torch.empty(rows * width + offset, dtype=BF16)[offset:].view(rows, width).requires_grad_()
    y = quick_gelu(x, torch.empty(width, dtype=BF16))
    y.backward(torch.empty_like(y))


CALLS = {
    "image": [lambda batch=batch: attention(batch, 193, 12, False) for batch in (128, 127, 64, 1)],
    "captions": [
        lambda lengths=lengths: attention(len(lengths), 0, 8, True, [sum(lengths[:i]) for i in range(len(lengths) + 1)])
        for lengths in ([26] * 128, [25, 27] * 64, [77, 8, 30], [12])
    ],
    "image adapter": [lambda rows=rows: adapter(rows, 768, 96) for rows in (128 * 193, 127 * 193, 64 * 193)],
    "caption adapter": [lambda rows=rows: adapter(rows, 512, 64) for rows in (3328, 3301, 2999, 77, 1)],
    "misaligned MLP": [lambda: activation(64, 3072, offset=1)],
    "image MLP": [lambda rows=rows: activation(rows, 3072) for rows in (128 * 193, 127 * 193, 5)],
}
found = {}
for name, calls in CALLS.items():
    found[name] = []
    for call in calls:
        absent_gpu.launches.clear()
        call()
        found[name].append(
            [dict(name=one.name, grid=one.grid, unaligned=one.unaligned, key=one.key) for one in absent_gpu.launches]
        )
print(json.dumps(found))
