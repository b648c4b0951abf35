"""raymoe from Python, for example in a notebook: `raymoe.train` and `raymoe.load`.

    import raymoe

    run = raymoe.train("tiny", "train.steps=100", "run.name=first")
    run.export()
    model = raymoe.load("first")
    print(model.generate("This license", max_tokens=32))

jobs/examples.ipynb has more examples. Imports of torch and Ray are inside the functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe.config import Config, default_root, parse_yaml, preset
from raymoe.storage.run_folder import RunFolder, find_artifact, read_records

if TYPE_CHECKING:
    from raymoe.serving.local_model import LocalModel


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    config: Config
    folder: Path
    stopped_by: int = 0
    """Number of the signal that stopped the run early. 0: it completed all steps."""

    @property
    def name(self) -> str:
        return self.config.run.name

    def records(self, kind: str = "") -> list[dict[str, Any]]:
        """Return the records of `metrics.jsonl`, or those of one kind: `train`, `validation` or `event`."""
        records = read_records(RunFolder(self.folder).metrics)
        return [record for record in records if not kind or record["kind"] == kind]

    def export(self, **options: Any) -> Path:
        """Export the run and return the folder of the artifact. options: see `raymoe.export.export.export`.

        Raises ValueError, FileExistsError or OSError.
        """
        from raymoe.export.export import export

        return export(self.config.run.root, self.name, **options).target


def train(config: str | Config = "small", *overrides: str) -> Run:
    """Train a model and return the run. Joins the Ray cluster of this machine or RAY_ADDRESS, else starts one.

    config: the name of a preset, or a Config. overrides: `section.field=value`, as for the command `raymoe train`;
    `train.resume=NAME` resumes a run, and `train.init=NAME` starts from the weights of another model. A Config then
    changes the fields of that model in which it differs from its preset.
    Raises ValueError or OSError before the start, and TooManyFailures if the run fails repeatedly.
    """
    from raymoe.data.sources import check_source
    from raymoe.training.resolve import resolve

    if isinstance(config, Config):
        name, fields = parse_yaml(config.to_yaml())
        if config.train.init or any(item.startswith("train.init=") for item in overrides):
            defaults = parse_yaml(preset(name).to_yaml())[1]
            fields = [item for item in fields if not (item.startswith("model.") and item in defaults)]
        resolved = resolve(preset(name), [*fields, *overrides])
    else:
        resolved = resolve(preset(config), list(overrides))
    if not resolved.train.resume:
        check_source(resolved.data)
    from raymoe.training.launch import launch

    folder, stopped_by = launch(resolved)
    return Run(resolved, folder, stopped_by)


def load(name: str, root: str = "", precision: str = "float32") -> LocalModel:
    """Load an artifact into this process, for `generate`.

    name: an exported run, the folder of an artifact, or `newest`. root: folder of runs and exports (default:
    `$RAYMOE_HOME`, else `~/raymoe`). precision: float32 or bfloat16.
    Raises FileNotFoundError, CorruptArtifact or ValueError.
    """
    from raymoe.serving.local_model import LocalModel
    from raymoe.storage.artifact import Artifact

    return LocalModel(Artifact.open(find_artifact(root or default_root(), name)), precision)
