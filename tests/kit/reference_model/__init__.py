"""The whole model in NumPy float64, independent of the package: it reads config.json and safetensors by itself."""

from tests.kit.reference_model import formats
from tests.kit.reference_model.arithmetic import FLOAT32_UNIT_ROUNDOFF, ExactArithmetic, Float32Noise
from tests.kit.reference_model.checkpoint import read_safetensors
from tests.kit.reference_model.formats import Scaled
from tests.kit.reference_model.model import LayerTrace, Numbers, ReferenceModel, Run, Trace, Unrounded, in_format

__all__ = [
    "FLOAT32_UNIT_ROUNDOFF",
    "ExactArithmetic",
    "Float32Noise",
    "LayerTrace",
    "Numbers",
    "ReferenceModel",
    "Run",
    "Scaled",
    "Trace",
    "Unrounded",
    "formats",
    "in_format",
    "read_safetensors",
]
