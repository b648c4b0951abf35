"""Write `tests/golden/kuberay_v1.6.2.json`: the part of KubeRay's CRDs that describes the shipped manifests.

    git clone --branch v1.6.2 https://github.com/ray-project/kuberay
    python -m tests.support.kuberay_schema kuberay/ray-operator/config/crd/bases

A field that the manifests do not use is not in the file, and the test refuses it: run this again after a manifest
gains a field.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import REPO_ROOT

FILE = REPO_ROOT / "tests" / "golden" / "kuberay_v1.6.2.json"
SOURCE = "https://github.com/ray-project/kuberay, tag v1.6.2, ray-operator/config/crd/bases (Apache-2.0), fields in use"
MANIFESTS = {"RayJob": "jobs/rayjob.yaml", "RayService": "services/rayservice.yaml"}
KEYWORDS = ("type", "required", "enum", "minimum", "maximum", "pattern", "minLength", "maxLength", "anyOf")


def in_use(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """Return `schema` as strict JSON Schema, with the properties that occur in `values`."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept: dict[str, Any] = {key: schema[key] for key in KEYWORDS if key in schema}
    mappings = [value for value in values if isinstance(value, dict)]
    if "properties" in schema:
        names = sorted({name for value in mappings for name in value if name in schema["properties"]})
        kept["properties"] = {
            name: in_use(schema["properties"][name], [value[name] for value in mappings if name in value])
            for name in names
        }
        kept["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    elif isinstance(schema.get("additionalProperties"), dict):
        inner = [entry for value in mappings for entry in value.values()]
        kept["additionalProperties"] = in_use(schema["additionalProperties"], inner)
    if "items" in schema:
        entries = [entry for value in values if isinstance(value, list) for entry in value]
        kept["items"] = in_use(schema["items"], entries)
    return kept


def manifest(kind: str) -> dict[str, Any]:
    """Return the shipped manifest of a kind."""
    text = (REPO_ROOT / MANIFESTS[kind]).read_text()
    return next(document for document in yaml.safe_load_all(text) if document["kind"] == kind)


def main() -> None:
    written: dict[str, Any] = {"source": SOURCE}
    for kind in MANIFESTS:
        crd = yaml.safe_load((Path(sys.argv[1]) / f"ray.io_{kind.lower()}s.yaml").read_text())
        version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
        document = manifest(kind)
        top = in_use(version["schema"]["openAPIV3Schema"], [document])
        top["properties"]["metadata"] = {"type": "object", "required": ["name"]}
        written[kind] = top
    FILE.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
