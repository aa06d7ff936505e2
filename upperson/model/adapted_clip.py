"""The model: a frozen open_clip CLIP, whose blocks contain a method's trained modules."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from upperson_kernels import TilesError, resolve_backend, tiles, unpack_sequences
from upperson_kernels.backend import in_transform

from upperson.config import ModelConfig
from upperson.data import Preprocess
from upperson.errors import MethodError, RunError
from upperson.methods import Place
from upperson.model.backbone import (
    CLIP_VOCABULARY,
    Clip,
    build_clip,
    fit_image_size,
    pooling,
    require_transformers,
    text_tower,
)
from upperson.model.block import KINDS, Block, Sequences, Stream, rows_of
from upperson.model.captions import CaptionPacker, PackedCaptions
from upperson.model.inputs import check_captions, check_images
from upperson.model.prepared import keep_frozen_weights, prepare
from upperson.model.prompts import run_captions, run_images
from upperson.model.turns import Turns, takes_turns
from upperson.model.weights import fingerprint
from upperson.petl import Mixture
from upperson.petl.mixture import tallied

GRAPHS = 64  # limit of compiled graphs of a block, one for each kind of input; a training needs about 20


class AdaptedCLIP(nn.Module):
    """CLIP, adapted to text-based person retrieval by the method of `config`.

    Args:
        config: the backbone and the method; see ModelConfig.
        clip: an open_clip model to adapt and freeze in place, instead of the backbone of `config`.

    Only the parameters of the method's modules require gradients, and CLIP's parameters if the method trains them.
    There is no dropout: train() and eval() compute the same.

    Raises BackboneError for a backbone that cannot be built, loaded or adapted, and MethodError for a method that does
    not fit the backbone.
    """

    def __init__(self, config: ModelConfig, clip: nn.Module | None = None):
        super().__init__()
        if not isinstance(config, ModelConfig):
            found = type(config).__name__
            raise TypeError(f"config: expected a ModelConfig, such as Config().model, found a {found}")
        self.config = config
        self.clip: Clip = build_clip(config) if clip is None else clip
        require_transformers(config.model, self.clip)
        self.clip.eval().requires_grad_(False)
        self.fingerprint = fingerprint(self.clip.state_dict())  # of the published weights, before they are adapted
        fit_image_size(self.clip.visual, config.image_size)
        self.clip.visual.patch_dropout = nn.Identity()
        text = text_tower(self.clip)
        self.text_causal = text.attn_mask is not None
        backend = None if config.backend == "auto" else config.backend
        options = dict(backend=backend, low_rank_gradients=config.low_rank_gradients)
        self.image_blocks = replace_blocks(self.clip.visual.transformer, causal=False, **options)
        self.text_blocks = replace_blocks(text.transformer, causal=self.text_causal, **options)
        self.context_length: int = text.context_length
        self.embedding_width: int = self.clip.visual.output_dim  # E
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)
        self.frozen_dtype: torch.dtype | None = None
        self.projections: dict[str, Tensor | None] = {}  # packed, of all blocks of a tower; see keep_frozen_weights
        self.computes_losses = False
        self.turns = Turns()
        self.put_modules(self.new_modules(config))
        if config.method.trains_clip:
            for parameter in self.clip_parameters().values():
                parameter.requires_grad_()
        preprocessing = open_clip.get_model_preprocess_cfg(self.clip)
        self.preprocess = Preprocess(
            config.image_size,
            tuple(preprocessing.get("mean", open_clip.OPENAI_DATASET_MEAN)),
            tuple(preprocessing.get("std", open_clip.OPENAI_DATASET_STD)),
        )

    # -------------------------------------------------------------------------------- images

    @takes_turns
    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (B, E), not normalised, of images (B, 3, H, W), preprocessed by `preprocess`.

        Raises TypeError for another dtype than the weights', outside of autocast, and ValueError for images that are
        not of config.image_size. NaN and infinity raise ValueError on a CPU; on a GPU, and in compiled, exported and
        traced models, the embeddings of such images are NaN.
        """
        visual = self.clip.visual
        if self.saves("skip_unread") and visual.attn_pool is None and visual.pool_type == "tok":
            pooled = visual.ln_post(self.image_stream(images, class_token_only=True))
        else:
            pooled, _ = visual._pool(self.image_stream(images))
        return pooled if visual.proj is None else pooled @ visual.proj

    @takes_turns
    def encode_image_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The result of encode_image, and all tokens of the image, normalised and projected alike, (B, N, E)."""
        visual = self.clip.visual
        x = self.image_stream(images)
        return visual._pool(x)[0] @ visual.proj, visual.ln_post(x) @ visual.proj

    def image_stream(self, images: Tensor, class_token_only: bool = False) -> Tensor:
        """The output of the image tower's last block: all tokens (B, N, C), or the class tokens (B, C)."""
        weight = getattr(self.clip.visual.conv1, "weight", None)
        check_images(images, self.config.image_size, weight.dtype if isinstance(weight, Tensor) else None)
        read = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device) if class_token_only else None
        x = self.clip.visual._embeds(images)
        if not prompted(self.image_blocks):
            return run(self.ready("image"), x, None, read)
        first, *others = self.prompts("image")  # the prompts of layer 0 come before ln_pre
        return run_images(self.ready("image"), x, [self.clip.visual.ln_pre(first), *others], read)

    # -------------------------------------------------------------------------------- captions

    @takes_turns
    def encode_text(self, captions: Tensor | PackedCaptions) -> Tensor:
        """Embeddings (B, E), not normalised, of token ids (B, L) int64 or of packed captions.

        Token ids are first passed to `pack_captions`, and raise its errors.
        """
        captions = self.pack_captions(captions)
        if isinstance(captions, PackedCaptions):
            read = captions.cu_seqlens[1:].long() - 1
        else:
            captions = self.caption_packer().words_seen(captions)
            read = self.pooled_positions(captions)
        if self.saves("skip_unread"):
            return self.project_text(self.text_stream(captions, read)[0])
        return self.project_text(rows_of(self.text_stream(captions)[0], read))

    @takes_turns
    def encode_text_tokens(self, captions: Tensor | PackedCaptions) -> tuple[Tensor, Tensor, Tensor]:
        """The result of encode_text; all tokens, projected alike, (B, L, E), where L is at least the longest caption's
        length; and the position of each caption's end token among them, (B,) int64.
        """
        captions = self.pack_captions(captions)
        if not isinstance(captions, PackedCaptions):
            captions = self.caption_packer().words_seen(captions)
        x, start = self.text_stream(captions)
        if isinstance(captions, PackedCaptions):
            x, *_ = unpack_sequences(x, captions.cu_seqlens, captions.longest)
            read = end = captions.cu_seqlens.diff().long() - 1
        else:
            read, end = self.pooled_positions(captions), captions.argmax(1)
        if start is not None:
            x, read, end = torch.cat([start.expand(x.shape[0], 1, -1), x], 1), read + 1, end + 1
        x = self.project_text(x)
        return rows_of(x, read), x, end

    def pack_captions(self, captions: Tensor | PackedCaptions) -> Tensor | PackedCaptions:
        """Packs token ids (B, L) for the text tower, unless padding affects its result or the option is off.

        Under torch.compile, torch.export, torch.jit.trace and torch.func token ids stay padded, since neither a graph
        nor vmap can depend on their values. The padding is then also computed, which does not change the result.

        Raises TypeError for another dtype than int64 or int32, ValueError for another shape, and ValueError for
        captions packed for other prompts. On a CPU, an id outside of the vocabulary and a caption without an end token
        raise ValueError. On a GPU, and in compiled, exported and traced models, an id outside of the vocabulary is an
        error of PyTorch, and a caption without an end token has a meaningless embedding.
        """
        pool_type, end_id = pooling(self.clip)
        end = {"argmax": CLIP_VOCABULARY - 1, "eos": end_id}.get(pool_type)
        check_captions(captions, self.context_length, CLIP_VOCABULARY, end)
        if isinstance(captions, PackedCaptions):
            if captions.first_position != self.first_position:
                raise ValueError(
                    f"captions were packed for a first token at position {captions.first_position}; expected position "
                    f"{self.first_position} with the model's current prompts"
                )
            return captions
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or in_transform()
        return captions if traced else self.caption_packer()(captions)

    def caption_packer(self) -> CaptionPacker:
        """The object with which a loader packs captions for the current state of this model.

        That of a training is asked for where gradients are computed, that of an evaluation where they are not; see
        `saves`.
        """
        packs = self.text_causal and pooling(self.clip)[0] == "argmax" and self.saves("pack_captions")
        return CaptionPacker(packs, self.first_position, self.context_length - self.first_position)

    @property
    def caption_length(self) -> int:
        """The maximum number of a caption's tokens beside the prompts, including start and end tokens."""
        return self.context_length - self.config.method.positions_taken

    @property
    def first_position(self) -> int:
        """The position of each caption's first computed token: 0, or the position behind the prompts."""
        return 1 + self.config.method.positions_taken if prompted(self.text_blocks) else 0

    def text_stream(
        self, captions: Tensor | PackedCaptions, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The output of the text tower's last block: all tokens, (B, L, C) or packed (T, C), or the tokens at `read`.

        With prompts, the captions have no start tokens. The second result is then the output of the start token,
        (1, C), if all tokens are returned, else None.
        """
        text, sequences = text_tower(self.clip), None
        if isinstance(captions, PackedCaptions):
            x = text.token_embedding(captions.token_ids) + text.positional_embedding[captions.positions]
            sequences = Sequences(captions.cu_seqlens, captions.longest)
        else:
            first = self.first_position
            x = text.token_embedding(captions) + text.positional_embedding[first : first + captions.shape[1]]
        if not prompted(self.text_blocks):
            return run(self.ready("text"), x, sequences, read), None
        start = text.token_embedding.weight[self.tokenizer.sot_token_id] + text.positional_embedding[0]
        rows = self.prompts("text")
        if taken := self.config.method.positions_taken:
            rows[0] = rows[0] + text.positional_embedding[1 : 1 + taken]
        return run_captions(self.ready("text"), start.unsqueeze(0), x, rows, sequences, read)

    def pooled_positions(self, tokens: Tensor) -> Tensor:
        """The position (B,) of the token that represents each caption of (B, L)."""
        pool_type, end_id = pooling(self.clip)
        if pool_type == "argmax":  # the end token has the largest id
            return tokens.argmax(1)
        if pool_type == "eos":
            return (tokens == end_id).int().argmax(1)
        return torch.full_like(tokens[:, 0], {"first": 0, "last": tokens.shape[1] - 1}[pool_type])

    def project_text(self, x: Tensor) -> Tensor:
        """The final LayerNorm and projection of tokens (…, C) -> (…, E)."""
        text = text_tower(self.clip)
        x, projection = text.ln_final(x), text.text_projection
        return projection(x) if isinstance(projection, nn.Module) else x @ projection

    # -------------------------------------------------------------------------------- what a loss reads

    def saves(self, switch: str) -> bool:
        """Whether a switch of ModelConfig is on: one of upperson.methods.SAVINGS.

        Where gradients or losses are computed, the method must allow it: its losses may read what the features do not
        depend on.
        """
        trains = torch.is_grad_enabled() or self.computes_losses
        return getattr(self.config, switch) is not False and (switch in self.config.method.savings or not trains)

    @contextmanager
    def computing_losses(self, tally: bool = True) -> Iterator[list[Mixture]]:
        """A context in which all is computed that the losses read.

        `tally`: whether the mixtures of all blocks, which are yielded, tally their routes.
        """
        mixtures = self.mixtures() if tally else []
        self.computes_losses = True
        try:
            with tallied(mixtures):
                yield mixtures
        finally:
            self.computes_losses = False

    def mixtures(self) -> list[Mixture]:
        """The mixtures of all blocks."""
        return [module for module in self.trained_modules().values() if isinstance(module, Mixture)]

    # -------------------------------------------------------------------------------- trained parameters

    def adaptation(self) -> dict[str, nn.Parameter]:
        """All parameters that the method changes, by name. They are the content of a checkpoint.

        The names are {image,text}.blocks.{i}.{kind}.…, and open_clip's names for CLIP's own parameters if the method
        trains them.
        """
        parameters = parameters_of(self.trained_modules())
        return parameters | self.clip_parameters() if self.config.method.trains_clip else parameters

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the adaptation that are not frozen."""
        return {name: parameter for name, parameter in self.adaptation().items() if parameter.requires_grad}

    def parameters_by_kind(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters of the adaptation by kind (one of upperson.model.block.KINDS, or "clip"), then by name."""
        kinds: dict[str, dict[str, nn.Parameter]] = {}
        if self.config.method.trains_clip:
            kinds["clip"] = self.clip_parameters()
        for place, module in self.trained_modules().items():
            kinds.setdefault(place.kind, {}).update(parameters_of({place: module}))
        return {kind: parameters for kind, parameters in kinds.items() if parameters}

    def freeze(self, kinds: str | None) -> None:
        """Freezes the parameters of these kinds, joined by +: upperson.model.block.KINDS, or clip.

        Raises MethodError for a kind that the method does not train.
        """
        known = self.parameters_by_kind()
        for kind in kinds_in(kinds):
            if kind not in known:
                raise MethodError(
                    f"freeze: method {self.config.method.name} with these options does not train {kind!r}; expected "
                    f"kinds of {', '.join(known) or 'none'}, joined by +"
                )
            for parameter in known[kind].values():
                parameter.requires_grad_(False)

    def trained_modules(self) -> dict[Place, nn.Module]:
        """The trained modules by their places."""
        return {
            Place(tower, i, kind): module
            for tower, blocks in self.towers.items()
            for i, block in enumerate(blocks)
            for kind, module in block.trained_modules().items()
        }

    def new_modules(self, config: ModelConfig) -> dict[Place, nn.Module]:
        """New modules of the method of `config`, by their places. The model is not changed."""
        method, modules = config.method, config.method.modules(self.towers)
        for place in modules:
            if (
                place.tower not in self.towers
                or place.kind not in KINDS
                or not 0 <= place.block < len(self.towers[place.tower])
            ):
                raise MethodError(
                    f"{method.name}: no block takes a module at {place}; expected a block of the image or text tower, "
                    f"and a kind of {', '.join(KINDS)}"
                )
        for tower in self.towers:
            prompts, prefixes = (
                sorted(place.block for place in modules if place.tower == tower and place.kind == kind)
                for kind in ("prompt", "prefix")
            )
            if prompts and (prefixes or prompts != list(range(len(prompts)))):
                raise MethodError(
                    f"{method.name}: expected prompts in layers 0, 1, … of the {tower} tower, without a prefix; "
                    f"found prompts in {prompts}, a prefix in {prefixes}"
                )
        if any(place.kind == "prompt" for place in modules):
            if not self.text_causal or pooling(self.clip)[0] != "argmax":
                raise MethodError(
                    f"{method.name}: prompts need a causal text tower whose embedding is the end token, as CLIP's; the "
                    f"text tower of {config.model} differs"
                )
            taken = method.positions_taken
            if self.context_length - taken < 3:
                raise MethodError(
                    f"{method.name}: prompts would take {taken} of the {self.context_length} positions of a caption; "
                    f"expected at most {self.context_length - 3}, or prompts without positions"
                )
        return modules

    def require_trainable(self, config: ModelConfig, freeze: str | None) -> None:
        """Raises MethodError or RunError if `config` cannot be trained on this backbone with these kinds frozen.

        The model and the state of the random generators are not changed.
        """
        with torch.random.fork_rng(devices=[]):
            kinds = {place.kind for place in self.new_modules(config)}
        kinds |= {"clip"} if config.method.trains_clip else set()
        if not kinds - set(kinds_in(freeze)):
            raise RunError(nothing_to_train(config, freeze))

    def set_modules(self, config: ModelConfig, modules: dict[Place, Any]) -> None:
        """Replaces the trained modules by `modules`, those of `config`. The backbone must be that of `config`.

        Raises RunError if another thread is computing. A thread that has called this method may only compute until
        another thread does; a thread that has not computes with the modules of the last call.
        """
        with self.turns.switch():
            self.config = config
            self.put_modules(modules)

    def put_modules(self, modules: dict[Place, Any]) -> None:
        for tower, blocks in self.towers.items():
            for i, block in enumerate(blocks):
                block.set_modules(**{kind: modules.get(Place(tower, i, kind)) for kind in KINDS})

    def prompts(self, tower: str) -> list[Tensor]:
        """The prompts (m, C) of layers 0, 1, … of a tower."""
        own, other = self.image_blocks, self.text_blocks
        if tower == "text":
            own, other = other, own
        partners = [block.prompt for block in other] + [None] * len(own)  # the other tower may be shallower
        return [
            block.prompt.rows(partner)
            for block, partner in zip(own, partners, strict=False)
            if block.prompt is not None
        ]

    def keep_frozen_weights(self, dtype: torch.dtype) -> None:
        """Keeps the frozen weights of products in `dtype`, that of later passes under autocast, instead of casting them
        in every pass. What the blocks compute from their trained modules is then computed for a tower at once.

        Weights that are trained, all LayerNorms and the embeddings of captions stay in float32. The embeddings of the
        class token and of image positions do not: open_clip casts them to the dtype of the first product.
        """
        self.frozen_dtype = dtype
        self.projections = {tower: keep_frozen_weights(blocks, dtype) for tower, blocks in self.towers.items()}
        visual = self.clip.visual
        others = [visual.conv1.weight, visual.class_embedding, visual.positional_embedding, visual.proj]
        for parameter in (*others, text_tower(self.clip).text_projection):
            if isinstance(parameter, nn.Parameter) and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def ready(self, tower: str) -> list[Callable[..., Stream]]:
        """The blocks of a tower as functions of the stream, with what is computed for all of them at once."""
        blocks = self.towers[tower]
        if self.frozen_dtype is None:
            return list(blocks)
        prepared = prepare(blocks, self.projections[tower], self.frozen_dtype)
        return [functools.partial(block, prepared=own) for block, own in zip(blocks, prepared, strict=True)]

    @property
    def towers(self) -> dict[str, list[Block]]:
        """The blocks of the image and text towers."""
        return {"image": self.image_blocks, "text": self.text_blocks}

    def blocks(self) -> list[Block]:
        """All blocks of both towers."""
        return [*self.image_blocks, *self.text_blocks]

    def clip_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of CLIP that affect its features: all but the temperature of CLIP's loss."""
        added = {id(parameter) for module in self.trained_modules().values() for parameter in module.parameters()}
        return {
            name: parameter
            for name, parameter in self.clip.named_parameters()
            if name not in ("logit_scale", "logit_bias") and id(parameter) not in added
        }

    def compile_blocks(self, **options: Any) -> None:
        """Compiles every block at its next call; `options` are those of torch.compile.

        Similar blocks share a graph. Separate graphs exist for the first, last and other blocks of each tower, with and
        without gradients, for the first and for later batch sizes. PyTorch's default limit of graphs is too small.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        for block in self.blocks():
            block.compile(**options)

    @contextmanager
    def zero_shot(self) -> Iterator[None]:
        """A context in which the model computes only the backbone, with its current weights.

        It applies to all threads. Raises RunError if another thread is computing; within the context, the methods that
        compute raise RunError in other threads.
        """
        with self.turns.change("zero_shot()"):
            before = [block.adapted for block in self.blocks()]
            for block in self.blocks():
                block.adapted = False
            try:
                yield
            finally:
                for block, adapted in zip(self.blocks(), before, strict=True):
                    block.adapted = adapted


def replace_blocks(transformer: Any, **options: Any) -> list[Block]:
    """Replaces the blocks of an open_clip Transformer, and returns the new blocks; `options` are those of Block."""
    for i, frozen in enumerate(transformer.resblocks):
        transformer.resblocks[i] = Block(frozen, **options)
    return list(transformer.resblocks)


def require_backend(backend: str, device: torch.device) -> None:
    """Raises RunError if a backend of ModelConfig cannot run on a device."""
    try:
        if resolve_backend(None if backend == "auto" else backend, torch.empty(0, device=device)) == "triton":
            tiles.load_named_in_environment()
    except (RuntimeError, TilesError) as error:
        raise RunError(f"backend: {error}") from error


def parameters_of(modules: dict[Place, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of several modules, each named by its module's place and its own name."""
    return {
        f"{place}.{name}": parameter
        for place, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def kinds_in(text: str | None) -> list[str]:
    """The kinds of parameters that are joined by + in `text`."""
    return [] if text is None else [kind.strip() for kind in text.split("+")]


def nothing_to_train(config: ModelConfig, freeze: str | None) -> str:
    """The error for a training without parameters."""
    return (
        f"nothing to train: the options of --method {config.method.name}{' and --freeze' if freeze else ''} leave no "
        "parameter"
    )


def prompted(blocks: list[Block]) -> bool:
    """Whether a tower has prompts that are currently computed."""
    return blocks[0].prompt is not None and blocks[0].adapted


def run(blocks: list[Callable[..., Stream]], x: Tensor, sequences: Sequences | None, read: Tensor | None) -> Tensor:
    """The output tokens of the last of `blocks`; see Block.forward."""
    stream = Stream(x)
    for block in blocks[:-1]:
        stream = block(stream, sequences)
    return blocks[-1](stream, sequences, read).total()
