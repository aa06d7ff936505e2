"""Trains the small CLIP on synthetic scenes without people: `python -m upperson.embedded.pretrain`.

The training is contrastive, as in CLIP (arXiv 2103.00020). Every pair is used once. Scene i of an infinite series is
drawn for step i // batch, so the training data depend only on the seed. At the end, a few more spellings are learned,
which changes nothing else. The result is the same to the byte on one machine with the same number of threads.
"""

import argparse
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import normalize
from tqdm import tqdm

from upperson.embedded.scenes import draw_scene
from upperson.embedded.sentences import LATE_SPELLINGS
from upperson.embedded.weights import CLIP_WEIGHTS, build_embedded_clip, save_embedded_clip

WARMUP_STEPS = 100
LARGEST_SCALE = math.log(100)
TEXT_CHUNKS = 4
SPELLING_STEPS = 200
SPELLING_BATCH = 32


class Scenes(Dataset):
    """Scene i of a series: pixels [3, 128, 128] uint8 and token ids [77] int64."""

    def __init__(self, seed: int, count: int):
        self.seed, self.count = seed, count
        self.tokenizer = open_clip.SimpleTokenizer()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = draw_scene(self.seed, index)
        return torch.from_numpy(np.array(scene.draw())).permute(2, 0, 1), self.tokenizer(scene.caption)[0]


def encode_by_length(clip: Any, tokens: Tensor) -> Tensor:
    """encode_short_text for TEXT_CHUNKS parts of a batch, the shortest captions first, in the batch's order."""
    order = tokens.argmax(dim=-1).argsort(stable=True)
    parts = [encode_short_text(clip, tokens[part]) for part in order.chunk(TEXT_CHUNKS)]
    return torch.cat(parts)[order.argsort()]


def encode_short_text(clip: Any, tokens: Tensor) -> Tensor:
    """clip.encode_text without the padding behind the longest text, which does not affect a causal tower."""
    ends = tokens.argmax(dim=-1)
    length = int(ends.max()) + 1
    x = clip.token_embedding(tokens[:, :length]) + clip.positional_embedding[:length]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    return x[torch.arange(len(tokens)), ends] @ clip.text_projection


def pretrain(
    seed: int, steps: int, batch_size: int, learning_rate: float, workers: int
) -> tuple[open_clip.CLIP, set[int]]:
    """The trained CLIP, and the ids of the tokens in its training captions."""
    torch.manual_seed(seed)
    clip = build_embedded_clip().train()
    optimizer = AdamW(_groups(clip), lr=learning_rate, betas=(0.9, 0.98), eps=1e-6)
    warmup = min(WARMUP_STEPS, steps // 2)
    schedule = SequentialLR(
        optimizer,
        [LinearLR(optimizer, 0.01, total_iters=warmup), CosineAnnealingLR(optimizer, steps - warmup)],
        milestones=[warmup],
    )
    loss_of = ClipLoss()
    mean, std = list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD)
    tokens_seen: set[int] = set()
    loader = DataLoader(Scenes(seed, steps * batch_size), batch_size=batch_size, num_workers=workers)
    with tqdm(loader, desc="pretraining", unit="step") as progress:
        for pixels, tokens in progress:
            tokens_seen.update(tokens.unique().tolist())
            images = F.normalize(clip.encode_image(normalize(pixels / 255, mean, std)), dim=-1)
            texts = F.normalize(encode_by_length(clip, tokens), dim=-1)
            loss = loss_of(images, texts, clip.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                clip.logit_scale.clamp_(max=LARGEST_SCALE)
            progress.set_postfix(loss=f"{loss.item():.3f}")
    further = (draw_scene(seed, index).caption for index in itertools.count(steps * batch_size))
    tokens_seen |= learn_spellings(clip, further, tokens_seen, min(SPELLING_STEPS, steps))
    return clip.eval(), tokens_seen


def learn_spellings(clip: Any, captions: Iterable[str], known: set[int], steps: int) -> set[int]:
    """Trains the embeddings of the tokens of LATE_SPELLINGS that are not known, and returns these tokens.

    A caption with a late spelling gets the features of the caption as it was written. Nothing else changes, so that all
    other captions keep their features to the bit.
    """
    tokenizer = open_clip.SimpleTokenizer()
    new = {token for spelling in LATE_SPELLINGS.values() for token in tokenizer.encode(spelling)} - known
    weight = clip.token_embedding.weight
    is_new = torch.zeros(len(weight), 1).index_fill_(0, torch.tensor(sorted(new)), 1.0)
    optimizer = Adam([weight], lr=3e-3)  # whose step is zero where the gradient always was
    changed = (caption for caption in captions if respelt(caption) != caption)
    for _ in tqdm(range(steps), desc="spellings", unit="step"):
        batch = list(itertools.islice(changed, SPELLING_BATCH))
        written, spelt = tokenizer(batch), tokenizer([respelt(caption) for caption in batch])
        with torch.no_grad():
            target = encode_short_text(clip, written)
        loss = 1 - F.cosine_similarity(encode_short_text(clip, spelt), target).mean()
        (gradient,) = torch.autograd.grad(loss, [weight])
        weight.grad = gradient * is_new
        optimizer.step()
    return new


def respelt(caption: str) -> str:
    """The caption in the late spellings."""
    for word, spelling in LATE_SPELLINGS.items():
        caption = caption.replace(f" {word} ", f" {spelling} ")
    return caption


def _groups(clip: open_clip.CLIP) -> list[dict]:
    """Parameter groups with weight decay for matrices only, not for gains, biases and embeddings."""
    decayed, kept = [], []
    for name, parameter in clip.named_parameters():
        (kept if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--output", type=Path, default=CLIP_WEIGHTS)
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch; another number rounds differently")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clip, tokens = pretrain(options.seed, options.steps, options.batch_size, options.learning_rate, options.workers)
    save_embedded_clip(clip, tokens, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.2f} MB, {len(tokens)} trained tokens")


if __name__ == "__main__":
    main()
