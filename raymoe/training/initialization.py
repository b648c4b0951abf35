"""A run that starts from stored weights: they become its checkpoint of step 0, which any number of workers restores.

The run then has its own copy of the weights and of the tokenizer; their source may be removed.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from raymoe.config import Config
from raymoe.data.corpus import Corpus
from raymoe.parallel.remap import Membership
from raymoe.storage.artifact_layout import layout
from raymoe.storage.checkpoint import step_folder, write_manifest, write_shard
from raymoe.storage.run_folder import RunFolder
from raymoe.storage.weights import StoredWeights, open_weights
from raymoe.training.resolve import check_model, check_source_name
from raymoe.training.state import DataIdentity, Position


def initial_weights(config: Config) -> StoredWeights | None:
    """Open the weights that `train.init` names; None for a resumed run, and for one that starts from random weights.

    Raises ValueError if they do not fit `config.model`, FileNotFoundError for a wrong name.
    """
    if not config.train.init or config.train.resume:
        return None
    check_source_name(config.run.root, config.train.init)
    weights, skipped = open_weights(config.run.root, config.train.init)
    for reason in skipped:
        print(f"train.init={config.train.init}: skipped {reason}", file=sys.stderr)
    check_model(config.model, weights.config.model, config.train.init)
    model = config.model
    smallest = min((row.count(c) for row in weights.assignment for c in range(model.n_clusters)), default=0)
    if model.has_members and model.experts_per_token > smallest:
        raise ValueError(
            f"model.experts_per_token={model.experts_per_token} is not allowed: a cluster of train.init="
            f"{config.train.init} has {smallest} experts; choose at most that"
        )
    return weights


def with_files_of(config: Config, weights: StoredWeights | None) -> Config:
    """Return `config` with the tokenizer of the weights and, for conversations, their chat template if they have one.

    Raises ValueError if `data.tokenizer` is another tokenizer.
    """
    if weights is None:
        return config
    check_tokenizer(config, weights)
    data = replace(config.data, tokenizer=str(weights.tokenizer))
    if data.format == "chat" and not data.chat_template and weights.chat_template:
        data = replace(data, chat_template=str(weights.chat_template))
    return replace(config, data=data)


def check_tokenizer(config: Config, weights: StoredWeights) -> None:
    """Raise ValueError if `data.tokenizer` is given and is not the tokenizer of the weights."""
    from raymoe.data.prepare import given_tokenizer
    from raymoe.data.tokens import load_tokenizer

    if given := given_tokenizer(config.data):
        size = config.model.vocabulary
        own = load_tokenizer(weights.tokenizer.read_bytes(), str(weights.tokenizer), size)
        if load_tokenizer(given, config.data.tokenizer, size).to_str() != own.to_str():
            raise ValueError(
                f"data.tokenizer={config.data.tokenizer} is not the tokenizer of train.init={config.train.init}, whose "
                "weights depend on its token ids: leave out data.tokenizer"
            )


def copy_initial_files(config: Config, weights: StoredWeights, run: Path, corpus: Corpus) -> Config:
    """Write the checkpoint of step 0, the tokenizer and the chat template into the run's folder; return `config` with them.

    One file of the source is in memory at a time. The checkpoint has no moments. Raises ValueError or OSError.
    """
    folder = RunFolder(run)
    position = Position(membership=Membership(weights.assignment, ({},) * config.model.layers))
    expected = {place.key: place.shape for place in layout(config.model, weights.assignment)}
    found = {place.key: place.shape for place in weights.places}
    assert found == expected, "a field of the model in FREE changes the weights"
    shutil.copyfile(weights.tokenizer, folder.tokenizer)
    config = replace(config, data=replace(config.data, tokenizer=str(folder.tokenizer)))
    if weights.chat_template:
        shutil.copyfile(weights.chat_template, folder.chat_template)
        if config.data.format == "chat" and not config.data.chat_template:
            config = replace(config, data=replace(config.data, chat_template=str(folder.chat_template)))
    target, parts = step_folder(folder.checkpoints, 0), weights.parts()
    for i, places in enumerate(parts):
        write_shard(target, i, len(parts), weights.read(places))
    meta = position.meta(config) | {"data": DataIdentity.of(corpus).meta(), "init": weights.about()}
    write_manifest(target, step=0, world=len(parts), meta=meta)
    return config
