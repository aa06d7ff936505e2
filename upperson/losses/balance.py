"""The balance loss of blocks whose tokens choose among experts (as arXiv 2101.03961, Eq. 4, without its factors).

    P_e = the mean over all tokens of softmax(g)_e        c_e = the number of choices of e / the number of tokens
    loss = Σ over the blocks of Σ_e P_e · c_e

The loss of a block is k / E if all E experts are chosen alike and each token chooses k. The tokens of a block are all
tokens of its tower, padding included. The choices have no gradient.
"""

import torch
from torch import Tensor


def balance_loss(tallies: Tensor, chosen: int) -> Tensor:
    """The loss, a scalar, of blocks with the same numbers of experts and of choices.

    Args:
        tallies: (blocks, 2, E), the sums of softmax(g) over the tokens, and the numbers of choices.
        chosen: k, the number of choices of a token.
    """
    probabilities, choices = tallies.unbind(1)
    tokens = choices.sum(1, keepdim=True) / chosen
    return torch.sum(probabilities * choices / tokens.square())
