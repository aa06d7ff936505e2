"""The presets: a configuration for every data set, and for every method on it.

The presets of the paper's data sets are UP-Person's (arXiv 2504.10084). Another method keeps the data and the backbone
of a preset, and applies its own recipe.
"""

from reprlib import repr as short

from upperson.config.configuration import Config, DataConfig, ModelConfig, TrainConfig, method_named
from upperson.methods import DEFAULT
from upperson.methods.up_person import UPPerson


def _vit(method: UPPerson | None = None, image_size: tuple[int, int] = (384, 128)) -> ModelConfig:
    """The paper's backbone."""
    return ModelConfig(
        model="ViT-B-16-quickgelu", pretrained="openai", image_size=image_size, method=method or UPPerson()
    )


_PAPER: dict[str, Config] = {
    "cuhk-pedes": Config(_vit(), DataConfig(dataset="cuhk-pedes")),
    "icfg-pedes": Config(_vit(UPPerson(prefix_length=14)), DataConfig(dataset="icfg-pedes")),
    "rstpreid": Config(
        _vit(UPPerson(prefix_length=2, lora_rank=16)),
        DataConfig(dataset="rstpreid"),
        TrainConfig(learning_rate=1e-4),
    ),
}
PRESETS: dict[str, Config] = {
    "embedded": Config(
        ModelConfig(method=UPPerson(prefix_length=4, lora_rank=8, adapter_reduction=2)),
        DataConfig(workers=0, mask_captions=False, embedded_identities=(3600, 100, 200)),
        TrainConfig(epochs=6, batch_size=64, warmup_epochs=1, learning_rate=3e-3, adam_epsilon=1e-8),
    ),
    **_PAPER,
    # The released code differs from the paper: λ starts at 100, and the best epoch on the test split is reported.
    **{f"{name}-released": config.replace(prefix_scale=100.0, selection="best-on-test")
       for name, config in _PAPER.items()},
    "flickr30k": Config(_vit(image_size=(224, 224)), DataConfig(dataset="flickr30k")),
    "mscoco": Config(_vit(image_size=(224, 224)), DataConfig(dataset="mscoco")),
}  # fmt: skip


def preset(name: str, method: str | None = None) -> Config:
    """The preset of a name, or this preset with another method and its recipe. Raises ValueError for other names."""
    if name not in PRESETS:
        raise ValueError(f"preset: {short(name)} is not allowed; expected one of {', '.join(PRESETS)}")
    return with_method(PRESETS[name], method)


def with_method(config: Config, method: str | None) -> Config:
    """A configuration with another method and its recipe. None and the configuration's own method change nothing.

    A recipe lists the differences from UP-Person's recipe. The configuration must therefore be one of UP-Person;
    otherwise ValueError is raised.
    """
    if method in (None, config.model.method.name):
        return config
    if config.model.method.name != DEFAULT:
        raise ValueError(
            f"method: a configuration of method {config.model.method.name} cannot be changed to method {method}; start "
            "from a preset"
        )
    return config.replace(method=method, **method_named(method).recipe(config.data.is_synthetic))
