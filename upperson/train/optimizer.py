"""The optimizer and the learning rate schedule (arXiv 2504.10084, Sec. IV-B, and the released code)."""

from collections.abc import Container, Iterable

from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from upperson.config import TrainConfig
from upperson.config.rates import parse_rates
from upperson.errors import MethodError


def build_optimizer(parameters: dict[str, nn.Parameter], settings: TrainConfig, prefixes: Container[str] = ()) -> Adam:
    """Adam with coupled weight decay, without decay of biases.

    Args:
        parameters: all trained parameters by name.
        settings: learning rates, also of biases, prefixes and by name, decay and ε.
        prefixes: the names of prefix parameters.

    On a GPU the fused implementation updates many parameters with one kernel. Raises MethodError for a learning rate of
    prefixes if no prefix is trained.
    """
    if settings.prefix_learning_rate is not None and not any(name in prefixes for name in parameters):
        raise MethodError("prefix_learning_rate: no prefix is trained")
    by_name = {} if settings.learning_rates is None else parse_rates(settings.learning_rates)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = settings.learning_rate
        if name in prefixes and settings.prefix_learning_rate is not None:
            rate = settings.prefix_learning_rate
        is_bias = name.endswith("bias")
        if is_bias and settings.bias_learning_rate is not None:
            rate = settings.bias_learning_rate
        for part, own in by_name.items():
            rate = own if part in name else rate
        decay = 0.0 if is_bias else settings.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return Adam(
        [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()],
        eps=settings.adam_epsilon,
        fused=True if all(parameter.is_cuda for parameter in parameters.values()) else None,
    )


def require_names(names: Iterable[str], settings: TrainConfig) -> None:
    """Raises MethodError if a part of a name in learning_rates is in no name of a trained parameter."""
    names = list(names)
    for part in parse_rates(settings.learning_rates) if settings.learning_rates is not None else ():
        if not any(part in name for name in names):
            raise MethodError(
                f"learning_rates: no trained parameter has {part!r} in its name; names are such as {names[0]} and "
                f"{names[-1]}; expected other rates, or none"
            )


def build_schedule(optimizer: Adam, settings: TrainConfig) -> LRScheduler:
    """The schedule by epoch: linear warm-up from warmup_factor, then a cosine to zero. Call `step` after each epoch."""
    cosine_epochs = settings.epochs - settings.warmup_epochs
    if not settings.warmup_epochs:
        return CosineAnnealingLR(optimizer, cosine_epochs)
    warmup = LinearLR(optimizer, settings.warmup_factor, total_iters=settings.warmup_epochs)
    return SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, cosine_epochs)], [settings.warmup_epochs])
