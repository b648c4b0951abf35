"""Configs as YAML: the same fields as overrides, with a mapping for each section.

    preset: small
    model:
      layers: 6
    train:
      workers: 2,8
      lr: 3e-4

A scalar is parsed by the type of its field, as in an override. `no`, `off` and `3e-4` need no quotes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import yaml

from raymoe.config.checks import hint
from raymoe.config.model_section import ModelSection
from raymoe.config.overrides import KEYS, check_key, override
from raymoe.config.presets import preset
from raymoe.config.sections import SECTIONS, Config

LARGEST_YAML = 1 << 16
"""Maximum size in bytes of a config in YAML."""

DEPTH = 8
"""Maximum depth of nested collections. A valid config needs 2; errors of a few more levels name the field."""

NULL = "tag:yaml.org,2002:null"


def repeatable_yaml(config: Config) -> str:
    """Return YAML text that starts the same run again, under a new name.

    `run.name` and `train.resume` are empty: the folder of the first run exists already.
    """
    again = replace(config, run=replace(config.run, name=""), train=replace(config.train, resume=""))
    return f"# Repeat this run under a new name: raymoe train --config FILE\n{again.to_yaml()}"


def from_yaml(text: str) -> Config:
    """Return the config of YAML text: its preset (default `small`) with its fields applied. Raises ValueError."""
    name, assignments = parse_yaml(text)
    return override(preset(name or "small"), assignments)


def parse_yaml(text: str) -> tuple[str, list[str]]:
    """Return the preset's name (empty if not given) and the overrides that are equal to YAML text.

    Raises ValueError for unknown or repeated keys, anchors, aliases, tags, lists where a value is expected, and
    more than LARGEST_YAML bytes.
    """
    name, sections = "", {}
    for key, node in pairs(compose(text), "the YAML config"):
        if key == "preset":
            name = scalar(node, key)
            preset(name)
        else:
            sections[key] = node
    return name, assignments(sections, ("preset", *SECTIONS))


def assignments(sections: Mapping[str, yaml.Node], known: Iterable[str] = SECTIONS) -> list[str]:
    """Return the overrides that are equal to the nodes of config sections, by section.

    `known`: the keys that are allowed where the sections are, for the hint of an error. Raises ValueError.
    """
    values = {}
    for section, node in sections.items():
        if section not in SECTIONS:
            raise ValueError(f"unknown config section {section!r}" + hint(section, known))
        for field, value in pairs(node, section):
            check_key(f"{section}.{field}")
            values[f"{section}.{field}"] = scalar(value, f"{section}.{field}")
    values = earlier_defaults(values) | values
    # In the order of the fields: train.workers resets train.max_workers, so it comes first.
    return [f"{key}={values[key]}" for key in KEYS if key in values]


ADDED = ("model.expert_kind", "model.expert_width", "model.base_width", "model.gate", "model.router_std")
"""Fields that version 0.1 did not have, and that presets set."""


def earlier_defaults(values: Mapping[str, str]) -> dict[str, str]:
    """Return the values of `ADDED` that were in effect in version 0.1, if `values` is the whole model of such a config.

    The config.yaml of a run lists all fields of its version. One that it lacks must not get the value of today's preset.
    """
    model = {key for key in KEYS if key.startswith("model.")}
    if not model - set(ADDED) <= values.keys():
        return {}
    defaults = ModelSection()
    return {key: str(getattr(defaults, key.partition(".")[2])).lower() for key in ADDED if key not in values}


def compose(text: str) -> yaml.Node | None:
    """Return the root node of one YAML document of at most LARGEST_YAML bytes, without anchors, aliases and tags.

    Raises ValueError.
    """
    if len(text.encode(errors="surrogatepass")) > LARGEST_YAML:
        raise ValueError(f"the YAML config is larger than {LARGEST_YAML >> 10} KiB: give only the fields of a config")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 0
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                raise ValueError(
                    f"line {line} of the YAML config is nested too deeply: write section: {{field: value}}"
                )
            if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
                raise ValueError(f"line {line} of the YAML config has an anchor or alias: write the value itself")
            if (tag := getattr(event, "tag", None)) is not None:
                raise ValueError(f"line {line} of the YAML config has the tag {tag!r}: remove it")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"the config is not valid YAML: {' '.join(str(error).split())}") from None


def pairs(node: yaml.Node | None, name: str) -> Iterator[tuple[str, yaml.Node]]:
    """Yield the keys and value nodes of a mapping. Raises ValueError for another node or a repeated key."""
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{name} must be a mapping" + (f" (line {node.start_mark.line + 1})" if node else ""))
    seen = set()
    for key_node, value in node.value:
        key = scalar(key_node, f"a key of {name}")
        if key in seen:
            raise ValueError(f"{name} has the key {key!r} twice (line {key_node.start_mark.line + 1}): remove one")
        seen.add(key)
        yield key, value


def scalar(node: yaml.Node, name: str) -> str:
    """Return the text of a scalar node, empty for null. Raises ValueError for a list or a mapping."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{name} must be one value, not a list or a mapping (line {node.start_mark.line + 1})")
    return "" if node.tag == NULL else node.value
