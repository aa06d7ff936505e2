"""What one of several processes computes for tests/test_distributed.py; started by it, by way of torchrun's variables.

python distributed_worker.py FOLDER    reads inputs from FOLDER, and leaves rank-0.pt, rank-1.pt there
"""

import sys
from pathlib import Path

import torch

from upperson.config import ModelConfig
from upperson.data import Sample
from upperson.data.masking import masked_positions
from upperson.evaluate.embed import embed
from upperson.losses.objective import LossesOfModel, Objective
from upperson.machine import Group, data_parallel, process_group
from upperson.model import AdaptedCLIP

PEOPLE = (4, 4, 9, 2, 7, 2, 9)
# Losses, and pairs of a batch: even shares, uneven ones, and an empty one where the loss does not compare pairs.
CASES = [(losses, size) for losses in ("sdm", "itc", "cmpm", "id", "mlm", "sdm+0.5*id+mlm") for size in (6, 5)]
CASES += [("id", 1), ("mlm", 1)]
CASES += [("sdm+0.5*balance", 6), ("sdm+0.5*balance", 5), ("id+balance", 1)]


def losses_and_gradients(
    config: ModelConfig, losses: str, batch: dict[str, torch.Tensor], group: Group
) -> dict[str, torch.Tensor]:
    """The losses of a batch and the gradients of all trained parameters, by name, of one and the same model."""
    torch.manual_seed(0)
    model = AdaptedCLIP(config.replace(method="dm-adapter") if "balance" in losses else config)
    objective = Objective(losses, 0.1, model.embedding_width, model.tokenizer.vocab_size, PEOPLE, group=group)
    module = data_parallel(LossesOfModel(objective, model).double(), group)
    parameters = model.trained_parameters() | objective.trained_parameters()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():  # what starts at zero hides the gradients of others
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    pairs = len(batch["person_ids"])
    own = {name: group.own(tensor) if len(group.share_of(pairs)) else tensor[:1] for name, tensor in batch.items()}
    own["mask_positions"] = masked_positions(own["mask_labels"])
    loss, parts = module(own, pairs)
    loss.backward()
    return {
        "loss": loss.detach(),
        **{f"loss_{name}": part.detach() for name, part in parts.items()},
        **{name: parameter.grad for name, parameter in parameters.items()},
    }


def compute(config: ModelConfig, batch: dict[str, torch.Tensor], samples: list[Sample], group: Group) -> dict:
    """The numbers of every sum of losses and number of pairs, and the embeddings of a data set."""
    found = {}
    for losses, size in CASES:
        part = {name: tensor[:size] for name, tensor in batch.items()}
        found[losses, size] = losses_and_gradients(config, losses, part, group)
    torch.manual_seed(0)
    model = AdaptedCLIP(config)
    for count in (len(samples), 1):  # a single sample leaves a process without any
        embeddings = embed(model, samples[:count], batch_size=4, progress=False, group=group)
        found["embed", count] = {"images": embeddings.image_features, "captions": embeddings.text_features}
    return found


if __name__ == "__main__":
    folder, group = Path(sys.argv[1]), Group.from_environment()
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    with process_group(group, torch.device("cpu")):
        torch.save(compute(*inputs, group), folder / f"rank-{group.rank}.pt")
