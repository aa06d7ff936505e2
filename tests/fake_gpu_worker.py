"""Runs training steps on tensors of a GPU that hold no values; prints the operators as JSON.

Whatever reads a value fails here: on a GPU it would wait. A process of its own for tests/test_fake_gpu.py, because the
tests' own process interprets the kernels: python fake_gpu_worker.py
"""

import json
import sys
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from harness import paths

from upperson.data.masking import masked_positions
from upperson.losses.names import NOT_MASKED
from upperson.losses.objective import Objective

with FakeTensorMode() as mode:  # before PyTorch believes in the GPU: the mode then does without its driver
    for device in ("cuda", "cuda:0"):
        torch.empty(1, device=device)
torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *_, **__: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.is_current_stream_capturing = lambda: False


def fake(value):
    """A tensor, or all tensors of a dataclass, on the GPU."""
    if is_dataclass(value):
        return replace(value, **{field.name: fake(getattr(value, field.name)) for field in fields(value)})
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def move(module: nn.Module) -> None:
    """Module.to, which cannot swap real for fake parameters."""
    moved = {id(p): nn.Parameter(fake(p), requires_grad=p.requires_grad) for p in module.parameters()}
    for part in module.modules():
        part._parameters = {name: p if p is None else moved[id(p)] for name, p in part._parameters.items()}
        part._buffers = {name: fake(buffer) for name, buffer in part._buffers.items()}


def differentiate(loss: Tensor) -> None:
    """loss.backward() by hand, as PyTorch's engine asks the driver for the GPU."""
    waiting, found = Counter(), [loss.grad_fn]
    for node in found:  # grows
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] += 1
                if waiting[following] == 1:
                    found.append(following)
    ready, incoming = [loss.grad_fn], {loss.grad_fn: {0: torch.ones_like(loss)}}
    while ready:
        node = ready.pop()
        given = incoming.pop(node, {})
        if hasattr(node, "variable"):
            node.variable.grad = given.get(0)
            continue
        given = [given.get(i) for i in range(len(node._input_metadata))]
        results = getattr(node, "apply", node)(*given) if any(g is not None for g in given) else None
        results = iter(results if isinstance(results, tuple) else (results,) * len(node.next_functions))
        if hasattr(node, "needs_input_grad"):  # of an autograd.Function, which also has results for what is no tensor
            results = iter([result for result, need in zip(results, node.needs_input_grad, strict=False) if need])
            results = iter([None if after is None else next(results) for after, _ in node.next_functions])
        for (following, position), result in zip(node.next_functions, results, strict=True):
            if following is None:
                continue
            if result is not None:
                expected, sums = following._input_metadata[position], incoming.setdefault(following, {})
                result = result.to(expected.dtype).sum_to_size(tuple(expected.shape))
                sums[position] = sums[position] + result if position in sums else result
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


class Operators(TorchDispatchMode):
    """Counts operators by the dtypes of their inputs; names those with a tensor elsewhere, and casts of `frozen`."""

    def __init__(self, frozen: list[Tensor]):
        super().__init__()
        self.frozen = {id(tensor.untyped_storage()) for tensor in frozen}
        self.dtypes, self.elsewhere, self.casts = Counter(), [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        dtypes = " ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
        self.dtypes[f"{func.overloadpacket} {dtypes}"] += 1
        for tensor in [*tensors, *(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))]:
            if tensor.device.type != "cuda" and tensor.dim():
                self.elsewhere.append(str(func))
        copies = func.overloadpacket is torch.ops.aten._to_copy
        self.casts += copies and id(args[0].untyped_storage()) in self.frozen
        return result


def step_of(name: str, frozen_weights: str) -> dict:
    config = paths.small().replace(backend="triton", frozen_weights=frozen_weights)
    path = paths.COUNTED[name]
    model = paths.build(path, config)
    (batch,) = paths.random_batches(config, model.tokenizer, model.context_length, 4, 1)
    prepared = [tuple(map(fake, parts)) for parts in paths.prepare(model, [batch], torch.device("cpu"))]
    move(model)
    with mode:
        step = paths.Step(model, prepared, "bf16", path.configuration(config).train)
        frozen = [parameter for parameter in model.clip_parameters().values() if not parameter.requires_grad]
        with Operators(frozen) as operators:
            features = step.image_features(), step.text_features()
            differentiate(step.loss())
            step.optimizer.step()
    return dict(
        dtypes=operators.dtypes,
        elsewhere=operators.elsewhere,
        casts=operators.casts,
        features=[str(tensor.dtype) for tensor in features],
        gradients=sorted({f"{p.grad.dtype} {p.grad.device.type}" for p in model.trained_parameters().values()}),
    )


def all_losses() -> dict:
    """The objective of all losses, whose masked language model reads as many tokens as captions have masked."""
    config = paths.small().replace(backend="triton")
    model = paths.build(paths.COUNTED["ours"], config)
    (batch,) = paths.random_batches(config, model.tokenizer, model.context_length, 4, 1)
    labels = torch.full_like(batch.tokens, NOT_MASKED)
    labels[:, 1:3] = batch.tokens[:, 1:3]
    objective = Objective("sdm+id+mlm", 0.02, model.embedding_width, 49408, range(2))
    captions = fake(model.pack_captions(batch.tokens))
    given = dict(images=batch.images, person_ids=batch.person_ids, mask_labels=labels)
    given |= dict(mask_positions=masked_positions(labels))
    move(model)
    move(objective)
    with mode, torch.autocast("cuda", torch.bfloat16), Operators([]) as operators:
        tensors = {name: fake(tensor) for name, tensor in given.items()}
        loss, losses = objective(model, tensors | dict(captions=captions, masked_captions=captions))
        differentiate(loss)
    return dict(losses=sorted(losses), dtype=str(loss.dtype), elsewhere=operators.elsewhere)


METHODS = ("ours", "full fine-tuning", "CSKT", "Prompt Decoupling, encoders")
kept = {name: step_of(name, "kept") for name in METHODS}
print(json.dumps(dict(kept=kept, cast=step_of("ours", "cast"), all_losses=all_losses())))
