"""SBoRA and MoRA as PEFT tuners; importing this package registers them.

A process that loads an adapter without the import gets PEFT's ``KeyError: 'SBORA'``: PEFT has no
entry point by which a saved adapter could name the package that it needs. `import sbora_diffusion`
is enough, before or after PEFT's own import.
"""

from typing import Any

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner

from sbora_diffusion.core.tuner.config import SboraConfig, SboraPeftType
from sbora_diffusion.core.tuner.layer import SboraLinear
from sbora_diffusion.core.tuner.model import SboraModel
from sbora_diffusion.core.tuner.mora import MoraConfig, MoraLinear, MoraModel, MoraPeftType

__all__ = [
    "MoraConfig",
    "MoraLinear",
    "MoraModel",
    "SboraConfig",
    "SboraLinear",
    "SboraModel",
    "SboraPeftType",
]


def _register(kind: Any, config: type[PeftConfig], model: type[BaseTuner]) -> None:
    # `peft.utils.register_peft_method` refuses names outside PEFT's own enum, so its tables are
    # filled here. Keys compare as strings, whichever enum they come from.
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = model
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = model.prefix


_register(SboraPeftType.SBORA, SboraConfig, SboraModel)
_register(MoraPeftType.MORA, MoraConfig, MoraModel)
