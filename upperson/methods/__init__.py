"""The methods. Each file defines a method: the trained modules and the recipe. README.md shows how to add a method.

    method.py              the base class of all methods
    up_person.py           UP-Person: salable prefixes, LoRA, L-Adapters, and their variants
    cskt.py                CSKT: prompts coupled between the towers, adapters beside the MLP
    dm_adapter.py          DM-Adapter: a mixture of adapters beside the MLP
    prompt_decoupling.py   Prompt Decoupling: prompts first, then the encoders
    irra.py                IRRA: all of CLIP, with two losses that have their own parameters
    full_fine_tuning.py    all of CLIP
    zero_shot.py           nothing

The modules that the methods add to a CLIP are in upperson/petl/.
"""

from upperson.methods.cskt import CSKT
from upperson.methods.dm_adapter import DMAdapter
from upperson.methods.full_fine_tuning import FullFineTuning
from upperson.methods.irra import IRRA
from upperson.methods.method import SAVINGS, Method, Place, Stage
from upperson.methods.prompt_decoupling import PromptDecoupling
from upperson.methods.up_person import UPPerson
from upperson.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (UPPerson, CSKT, DMAdapter, PromptDecoupling, IRRA, FullFineTuning, ZeroShot)
}
DEFAULT = UPPerson.name
UNTRAINED = ZeroShot.name
BASELINES = (UNTRAINED, FullFineTuning.name)  # what every method is compared with

__all__ = ["BASELINES", "DEFAULT", "METHODS", "SAVINGS", "UNTRAINED", "Method", "Place", "Stage"]
