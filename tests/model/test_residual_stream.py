"""What 16 bits of the residual stream cost, for the decision in bench/README.md."""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("open_clip")
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from harness import paths  # noqa: E402

from upperson.model import block  # noqa: E402


@pytest.mark.slow
def test_features_in_16_bits_have_at_most_twice_the_error(capsys):
    """ViT-B/16 with random weights under autocast to bf16, against float32; 8 captions and 2 images."""
    model = paths.build(paths.Path({"backend": "torch"}), paths.full_size()).eval()
    (batch,) = paths.random_batches(paths.full_size(), model.tokenizer, model.context_length, 8, 1)

    def features(autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model.encode_text(batch.tokens), model.encode_image(batch.images[:2])

    exact, errors = features(False), {}
    for dtype in (torch.bfloat16, torch.float32):
        with patch.object(
            block, "in_autocast_dtype", lambda *parts, dtype=dtype: [p if p is None else p.to(dtype) for p in parts]
        ):
            found = features(True)
        errors[dtype] = [
            float((ours.float() - right).norm() / right.norm()) for ours, right in zip(found, exact, strict=True)
        ]
    with capsys.disabled():
        for dtype, (text, image) in errors.items():
            print(f"\nresidual stream in {dtype}: error of captions {text:.2%}, of images {image:.2%}", end="")
    for ours, others in zip(errors[torch.bfloat16], errors[torch.float32], strict=True):
        assert 0.5 * ours < others < ours < 0.015
