"""SBoRA as a PEFT tuner; importing this package registers it.

A process that loads an adapter without the import gets PEFT's ``KeyError: 'SBORA'``: PEFT has no
entry point by which a saved adapter could name the package that it needs.
"""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from sbora_diffusion.core.tuner.config import SboraConfig, SboraPeftType
from sbora_diffusion.core.tuner.layer import SboraLinear
from sbora_diffusion.core.tuner.model import SboraModel

__all__ = ["SboraConfig", "SboraLinear", "SboraModel", "SboraPeftType"]

# `peft.utils.register_peft_method` refuses names outside PEFT's own enum, so its tables are filled
# here. Keys compare as strings, whichever enum they come from.
PEFT_TYPE_TO_CONFIG_MAPPING[SboraPeftType.SBORA] = SboraConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[SboraPeftType.SBORA] = SboraModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[SboraPeftType.SBORA] = SboraModel.prefix  # type: ignore[index]
