"""The config of a run: frozen dataclasses, presets, strict overrides, and YAML. Imports neither torch nor ray.

A bad value raises ValueError with the field, the value and the allowed values. An unknown key is an error that
names the nearest known key.
"""

from raymoe.config.checks import check_field, hint
from raymoe.config.home import default_root, expand
from raymoe.config.overrides import from_dict, override
from raymoe.config.presets import PRESETS, preset
from raymoe.config.reference import describe
from raymoe.config.sections import (
    SECTIONS,
    CheckpointSection,
    Config,
    DataSection,
    ModelSection,
    RegroupSection,
    RunSection,
    TrainSection,
)
from raymoe.config.yaml_text import LARGEST_YAML, from_yaml, parse_yaml, repeatable_yaml

__all__ = [
    "LARGEST_YAML", "PRESETS", "SECTIONS", "CheckpointSection", "Config", "DataSection", "ModelSection",
    "RegroupSection", "RunSection", "TrainSection", "check_field", "default_root", "describe", "expand", "from_dict",
    "from_yaml", "hint", "override", "parse_yaml", "preset", "repeatable_yaml",
]  # fmt: skip
