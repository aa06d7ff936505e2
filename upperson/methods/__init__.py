"""The methods: each a file that says what is trained in a CLIP and how. README.md tells how to add one.

    method.py              what a method is
    up_person.py           UP-Person: salable prefixes, LoRA, L-Adapters, and their variants
    cskt.py                CSKT: prompts coupled between the towers, adapters beside the MLP
    prompt_decoupling.py   Prompt Decoupling: prompts first, then the encoders
    full_fine_tuning.py    all of CLIP
    zero_shot.py           nothing

The modules that they put into a CLIP stand in upperson/petl/.
"""

from upperson.methods.cskt import CSKT
from upperson.methods.full_fine_tuning import FullFineTuning
from upperson.methods.method import Method, Place, Stage
from upperson.methods.prompt_decoupling import PromptDecoupling
from upperson.methods.up_person import UPPerson
from upperson.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (UPPerson, CSKT, PromptDecoupling, FullFineTuning, ZeroShot)
}
DEFAULT = UPPerson.name
BASELINES = (ZeroShot.name, FullFineTuning.name)  # what every method is compared with

__all__ = ["BASELINES", "DEFAULT", "METHODS", "Method", "Place", "Stage"]
