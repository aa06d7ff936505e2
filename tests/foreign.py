"""Checkpoints as other programs write them, made from this project's parameters.

The keys of the released trainings are those of the tables in tests/golden: README.md of the folder, and
of cskt, dm_adapter and irra.
Those of Hugging Face are the names of transformers' CLIPModel.
"""

import re

import torch

LAYER = re.compile(r"(image|text)\.blocks\.(\d+)\.(.+)")


def up_person(name):
    tower, block, rest = LAYER.fullmatch(name).groups()
    learner = {"image": "vit", "text": "text"}[tower]
    if found := re.fullmatch(r"prefix\.(key|value)(_scale)?", rest):
        part = {"key": "key", "value": "val"}[found[1]]
        return f"{learner}_prefix_learner.{learner}_prefix.{block}.{part}." + ("scaler.scale" if found[2] else "tokens")
    if rest == "prefix.scale":
        return f"{learner}_prefix_learner.{learner}_prefix.{block}.scale_to_grad"
    if found := re.fullmatch(r"lora\.(key|value)_(down|up|scale)", rest):
        number = ("key", "value").index(found[1])
        what = {"down": f"lora_A.{number}", "up": f"lora_B.{number}", "scale": f"scale.{number}.scale"}[found[2]]
        return f"LORA_learner.lora_{tower}.{block}.{what}"
    found = re.fullmatch(r"adapter_(attn|mlp)\.(down|up)_(weight|bias)|adapter_(attn|mlp)\.scale", rest)
    layer = f"base_model{'.visual' if tower == 'image' else ''}.transformer.resblocks.{block}"
    if found[4]:
        return f"{layer}.scale_{1 if found[4] == 'attn' else 2}"
    return f"{layer}.adapter_ln_{'msa' if found[1] == 'attn' else 'mlp'}.{found[2]}.{found[3]}"


def cskt(name):
    tower, block, rest = LAYER.fullmatch(name).groups()
    layer = f"base_model{'.visual' if tower == 'image' else ''}.transformer.resblocks.{block}"
    before = int(block) - 1
    if rest == "prompt.tokens":
        first, later = {"text": ("ctx", "text"), "image": ("vision", "vision")}[tower]
        return f"prompt_learner.{first if before < 0 else f'compound_prompts_{later}.{before}'}"
    if found := re.fullmatch(r"prompt\.projection\.(weight|bias)", rest):
        first, later = {"text": ("tmap", ""), "image": ("vmap", "_vision")}[tower]
        place = first if before < 0 else f"compound_prompt_projections{later}.{before}"
        return f"prompt_learner.{place}.{found[1]}"
    if found := re.fullmatch(r"adapter_mlp\.norm_(weight|bias)", rest):
        return f"{layer}.ln_3.{found[1]}"
    found = re.fullmatch(r"adapter_mlp\.(down|up)_(weight|bias)", rest)
    return f"{layer}.adapter_mlp.{found[1]}.{found[2]}"


def dm_adapter(name):
    tower, block, rest = LAYER.fullmatch(name).groups()
    layer = f"base_model{'.visual' if tower == 'image' else ''}.transformer.resblocks.{block}"
    rest = re.sub(r"^(mixture|adapter_mlp)\.", "", rest)
    if found := re.fullmatch(r"norm_(weight|bias)", rest):
        return f"{layer}.ln_3.{found[1]}"
    if found := re.fullmatch(r"experts\.(\d+)\.(down|up)_(weight|bias)", rest):
        return f"{layer}.feed_forward.experts.{found[1]}.{found[2]}.{found[3]}"
    gates = {name: f"feed_forward.{name}.weight" for name in ("input_gate", "task_gate")}
    return f"{layer}.{({'task': 'task_param', 'alpha': 'feed_forward.alpha'} | gates)[rest]}"


def expert_by_expert(adaptation):
    """The parameters of a mixture, of which this project stacks those of all experts."""
    apart = {}
    for name, tensor in adaptation.items():
        place, _, last = name.rpartition(".")
        if last.startswith(("down", "up")):
            apart |= {f"{place}.experts.{number}.{last}": part.clone() for number, part in enumerate(tensor)}
        else:
            apart[name] = tensor
    return apart


KEYS = {"up-person": up_person, "cskt": cskt, "dm-adapter": dm_adapter}


def released_state(form, clip, adaptation=None, heads=None):
    """The state dict of a released model from CLIP's by open_clip's names, the adaptation's by ours, and the heads'."""
    state = {f"base_model.{name}": tensor for name, tensor in clip.items() if name != "logit_scale"}
    state |= {KEYS[form](name): tensor for name, tensor in (adaptation or {}).items()}
    return state | (heads or {})


def save_released(path, state):
    """As the released trainings save: the model, the optimizer, the scheduler and the epoch."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    scheduler = {"milestones": (20, 50), "base_lrs": [1e-3], "last_epoch": 3}
    content = {"model": state, "optimizer": optimizer, "scheduler": scheduler, "epoch": 3, "iteration": 0}
    torch.save(content | {"num_epoch": 60}, path)
    return path


def hugging_face_state(clip):
    """The state dict of transformers' CLIPModel from CLIP's by open_clip's names."""
    state = {}
    for name, tensor in clip.items():
        if name in ("visual.proj", "text_projection"):
            state["visual_projection.weight" if "visual" in name else "text_projection.weight"] = (
                tensor.t().contiguous()
            )
            continue
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        rest = name.removeprefix("visual.")
        if found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", rest):
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{tower}.encoder.layers.{found[1]}.self_attn.{part}_proj.{found[2]}"] = chunk.clone()
            continue
        for ours, theirs in (
            ("transformer.resblocks.", "encoder.layers."), ("attn.out_proj", "self_attn.out_proj"),
            ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
            (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."),
            ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"), ("ln_final", "final_layer_norm"),
            ("class_embedding", "embeddings.class_embedding"), ("conv1", "embeddings.patch_embedding"),
            ("token_embedding", "embeddings.token_embedding"),
        ):  # fmt: skip
            rest = rest.replace(ours, theirs)
        if rest == "positional_embedding":
            rest = "embeddings.position_embedding.weight"
        state["logit_scale" if name == "logit_scale" else f"{tower}.{rest}"] = tensor
    for tower, key in (("vision_model", "visual.positional_embedding"), ("text_model", "positional_embedding")):
        state[f"{tower}.embeddings.position_ids"] = torch.arange(len(clip[key]))[None]
    return state
