"""Native kernels: compile `native.c` at first use, load it into this process, and lay out weights for it.

Without a C compiler, or with `RAYMOE_NATIVE=0`, `library` returns None and the callers use torch's operators.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from ctypes import CDLL, POINTER, Structure, byref, c_float, c_int, c_size_t, c_void_p, pointer
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.config import ModelSection

log = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.c", "kernels.h"))
FLAGS = ("-O2", "-march=native", "-std=gnu11", "-fPIC", "-shared")
LANES = 16
"""Columns per panel."""
GATES = {"softmax": 1, "biased": 2, "sigmoid": 3}
"""Weights of stage 1 by `model.gate`, in the numbers of `enum gate` (`kernels.h`)."""


# The library


def library() -> CDLL | None:
    """Return the compiled kernels, or None without them. Called when weights are laid out; the layout is then fixed."""
    return None if os.environ.get("RAYMOE_NATIVE") == "0" else _library(os.environ.get("CC", ""))


def kernel_name() -> str:
    """Return a name for the code that computes rows here. Processes with equal names compute bit-equal outputs.

    It is the hash of the compiled library and the version of the C library, whose `expf` it calls; without a
    library, torch's version and the processor's instruction set. Nodes with different processors have equal names
    with a common target for the compiler: `CC="gcc -march=x86-64-v3"` on all of them.
    """
    found = library()
    if found is None:
        return f"torch-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"
    code = hashlib.sha256(Path(found._name).read_bytes()).hexdigest()[:16]
    return f"native-{code}-{'-'.join(platform.libc_ver())}"


@cache
def _library(compiler: str) -> CDLL | None:
    try:
        return _load(_built(compiler))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home directory
        log.warning("no native kernels (%s): torch's operators are used, which is about 2.5 times slower", error)
        return None


def _load(path: Path) -> CDLL:
    found = CDLL(str(path))
    for name in ("experts", "attend", "head"):
        getattr(found, name).restype = c_int
    found.experts.argtypes = [c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p]
    found.attend.argtypes = [c_void_p, c_void_p, c_int, c_void_p]
    found.add.argtypes, found.add.restype = [c_void_p, c_void_p, c_void_p], None
    found.head.argtypes = [c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_int, c_void_p, c_void_p]
    return found


def _flags(command: Sequence[str]) -> list[str]:
    """Return the flags for a compiler command. A target in the command replaces this machine's."""
    targeted = any(part.startswith(("-march=", "-mcpu=")) for part in command)
    return [flag for flag in FLAGS if not (targeted and flag == "-march=native")]


def _built(compiler: str) -> Path:
    """Return the path of the library for this machine and compiler; build it if it is missing or damaged.

    Raises OSError or SubprocessError if there is no compiler, it fails, or others can write to the folder.
    """
    command = shlex.split(compiler) or [found for found in map(shutil.which, ("cc", "gcc", "clang")) if found][:1]
    if not command:
        raise OSError("no C compiler found: install cc, gcc or clang")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "raymoe")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"others can write to {folder}: chmod go-w {folder}")
    source = [path.read_bytes() for path in SOURCES]
    key = hashlib.sha256(repr((source, command, FLAGS, _machine())).encode()).hexdigest()[:32]
    target = folder / f"{key}.so"
    if _is_whole(target):
        return target
    handle, partial = tempfile.mkstemp(dir=folder, suffix=".partial")
    os.close(handle)
    try:
        subprocess.run(
            [*command, *_flags(command), str(SOURCES[0]), "-o", partial, "-lm"],
            check=True, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        with open(partial, "ab") as file:  # the loader ignores it; loading a damaged library would end the process
            file.write(hashlib.sha256(Path(partial).read_bytes()).digest())
        os.replace(partial, target)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]} failed: {(error.stderr.splitlines() or ['no message'])[0]}") from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


def _is_whole(path: Path) -> bool:
    """Whether the file ends in the checksum of its preceding bytes."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _machine() -> tuple[str, ...]:
    """Return the CPU properties that `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine(), platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return tuple(sorted({line for line in lines if line.startswith(wanted)}))


# Weights in the layout of the kernels


def panels(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay out [..., I, J] as [..., ceil(J/16), I, 16], in bfloat16 [..., ceil(J/16), ceil(I/2), 16, 2] (`kernels.h`)."""
    half = dtype == torch.bfloat16
    weight = F.pad(weight.to(dtype), (0, -weight.shape[-1] % LANES, 0, weight.shape[-2] % 2 if half else 0))
    laid = weight.unflatten(-1, (-1, LANES)).movedim(-2, -3)
    return (laid.unflatten(-2, (-1, 2)).transpose(-1, -2) if half else laid).contiguous()


class _Shape(Structure):
    _fields_ = [
        *((name, c_int) for name in ("d", "f", "w", "k", "half", "private", "gate")),
        *((name, c_int) for name in ("heads", "kv_heads", "head_dim", "clusters", "per_token")),
        ("scale", c_float),
    ]  # fmt: skip


def _shape(model: ModelSection, dtype: torch.dtype) -> _Shape:
    private = model.expert_kind == "private"
    width = model.private_width if private else model.residual_width
    return _Shape(
        model.d_model, model.cluster_base_width, width, model.experts_per_token, dtype == torch.bfloat16,
        private, GATES[model.gate], model.heads, model.kv_heads, model.d_model // model.heads, model.n_clusters, model.clusters_per_token,
        model.gate_scale,
    )  # fmt: skip


class _Cluster(Structure):
    _fields_ = [
        ("e", c_int),
        *((name, c_void_p) for name in ("router", "bias", "gate", "up", "down", "first", "gate_out", "up_out", "down_in", "down_out")),
        *((name, c_size_t) for name in ("first_step", "out_step", "down_in_step", "down_out_step")),
    ]  # fmt: skip


class Experts:
    """The weights of one cluster of one layer.

    base: base_gate, base_up [D, F] and base_down [F, D]; empty without a base. members: `member_leaves` of its e
    experts, stacked, with router [e, D] and bias [e]; empty without experts.
    """

    def __init__(
        self, model: ModelSection, base: Mapping[str, Tensor], members: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        found = library()
        assert found is not None
        self.library, self.shape = found, _shape(model, dtype)
        held = {name.removeprefix("base_"): panels(weight, dtype) for name, weight in base.items()}
        steps: dict[str, int] = {}
        e = 0
        if members:
            e = members["router"].shape[0]
            held["router"] = panels(members["router"].float().t(), torch.float32)
            held["bias"] = members["bias"].float().contiguous().clone()
            private = model.expert_kind == "private"
            matrices = _private_panels(members, dtype) if private else _residual_panels(members, dtype)
            of = {"first": "first_step", "gate_out": "out_step", "down_in": "down_in_step", "down_out": "down_out_step"}
            steps = {step: matrices[name].nbytes // e for name, step in of.items() if name in matrices}
            held |= matrices
        self.held = held
        self.at = _Cluster(e, **{name: tensor.data_ptr() for name, tensor in held.items()}, **steps)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.held.values())


def _residual_panels(members: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    laid = {name: panels(members[name], dtype) for name in ("gate_out", "up_out", "down_in", "down_out")}
    return laid | {"first": panels(torch.cat((members["gate_in"], members["up_in"]), -1), dtype)}


def _private_panels(members: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Lay out gate and up [e, D, W] side by side, each from its own panel on, and down [e, W, D]."""
    gate, up = (panels(members[f"private_{name}"].mT, dtype) for name in ("gate", "up"))
    return {"first": torch.cat((gate, up), 1), "down_out": panels(members["private_down"], dtype)}


def compute_clusters(clusters: Sequence[Experts], rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of clusters of one layer for their rows [R, D], in the type of the weights.

    Raises MemoryError.
    """
    first, n, sizes = clusters[0], len(clusters), [part.shape[0] for part in rows]
    rows = [part.contiguous() for part in rows]
    out = rows[0].new_empty(sum(sizes), first.shape.d).split(sizes)
    places = c_void_p * n
    failed = first.library.experts(
        byref(first.shape), n, (POINTER(_Cluster) * n)(*(pointer(c.at) for c in clusters)),
        places(*(part.data_ptr() for part in rows)), (c_int * n)(*sizes), places(*(part.data_ptr() for part in out)),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the intermediate values of the clusters: lower step_tokens")
    return list(out)


class _Layer(Structure):
    _fields_ = [(name, c_void_p) for name in ("attention_norm", "ffn_norm", "router", "bias", "qkv", "output")]


class _Step(Structure):
    _fields_ = [
        *((name, c_int) for name in ("n", "block", "width")),
        *((name, c_void_p) for name in ("position", "owner", "table", "cos", "sin", "keys", "values")),
        ("layer_bytes", c_size_t),
        *((name, c_void_p) for name in ("x", "order", "start", "weight", "rows")),
    ]


class Dense:
    """Weights of the trunk: attention and stage 1 of each layer, and the head.

    tensors: logical tensors of the trunk. cos, sin: [length, head_dim / 2] float32.
    """

    def __init__(
        self, model: ModelSection, tensors: Mapping[str, Tensor], dtype: torch.dtype, cos: Tensor, sin: Tensor
    ) -> None:
        found = library()
        assert found is not None
        self.library, self.shape, self.model, self.dtype = found, _shape(model, dtype), model, dtype
        self.cos, self.sin = cos.contiguous(), sin.contiguous()
        self.head = panels(tensors["embedding" if model.tied_head else "head"].t(), dtype)
        self.final_norm = tensors["final_norm"].clone()
        self.layers = [self._layer(tensors, f"layers.{i}.", dtype) for i in range(model.layers)]
        self._at = [_Layer(**{name: t.data_ptr() for name, t in layer.items()}) for layer in self.layers]

    @staticmethod
    def _layer(tensors: Mapping[str, Tensor], at: str, dtype: torch.dtype) -> dict[str, Tensor]:
        qkv = torch.cat([tensors[f"{at}attention.{name}"] for name in ("query", "key", "value")], 1)
        return {
            "attention_norm": tensors[at + "attention_norm"].clone(),
            "ffn_norm": tensors[at + "ffn_norm"].clone(),
            "router": panels(tensors[at + "router.weight"].t(), torch.float32),
            "bias": tensors[at + "router.bias"].clone(),
            "qkv": panels(qkv, dtype),
            "output": panels(tensors[at + "attention.output"], dtype),
        }


class Step:
    """One step of rows: call `attend` and `add` for each layer in order, then `logits`.

    position [T] int64: place of each row in its request. owner [T] int64: row of `tables` [B, blocks] int64 with its
    blocks in `keys` and `values` [layers, slots, kv_heads, head_dim]. x [T, D] float32: residual stream.
    """

    def __init__(
        self, dense: Dense, x: Tensor, position: Tensor, owner: Tensor, tables: Tensor, block: int, keys: Tensor, values: Tensor
    ) -> None:  # fmt: skip
        self.dense, self.x = dense, x
        pairs, groups = x.shape[0] * dense.model.clusters_per_token, dense.model.n_clusters
        self.rows = torch.empty(pairs, dense.model.d_model, dtype=dense.dtype)
        order, weight = torch.empty(pairs, dtype=torch.int32), torch.empty(pairs)
        self.start = torch.empty(groups + 1, dtype=torch.int32)
        self._held: Any = position, owner, tables, keys, values, order, weight
        places = {
            "position": position, "owner": owner, "table": tables, "cos": dense.cos, "sin": dense.sin, "keys": keys,
            "values": values, "x": x, "order": order, "start": self.start, "weight": weight, "rows": self.rows,
        }  # fmt: skip
        assert all(tensor.is_contiguous() for tensor in places.values())
        self.at = _Step(
            x.shape[0], block, tables.shape[1], layer_bytes=keys[0].nbytes,
            **{name: tensor.data_ptr() for name, tensor in places.items()},
        )  # fmt: skip

    def attend(self, i: int) -> dict[int, Tensor]:
        """Compute attention of layer i. Return the normalized rows [R, D] of each cluster that has rows."""
        dense = self.dense
        if dense.library.attend(byref(dense.shape), byref(dense._at[i]), i, byref(self.at)):
            raise MemoryError("no memory for the intermediate values of attention: lower step_tokens")
        spans = enumerate(pairwise(self.start.tolist()))
        return {c: self.rows[start:stop] for c, (start, stop) in spans if stop > start}

    def add(self, outputs: Mapping[int, Tensor]) -> None:
        """Add the weighted outputs of the clusters to the rows of the last `attend`."""
        dense, kept = self.dense, {c: out.to(self.dense.dtype).contiguous() for c, out in outputs.items()}
        places = [kept[c].data_ptr() if c in kept else None for c in range(dense.model.n_clusters)]
        dense.library.add(byref(dense.shape), byref(self.at), (c_void_p * len(places))(*places))

    def logits(self, wanted: Tensor) -> Tensor:
        """Return float32 logits [n, V] of the rows `wanted` [n] int64."""
        dense, model = self.dense, self.dense.model
        out = torch.empty(wanted.shape[0], model.vocabulary)
        if dense.library.head(
            byref(dense.shape), dense.final_norm.data_ptr(), dense.head.data_ptr(), model.vocabulary,
            self.x.data_ptr(), wanted.shape[0], wanted.contiguous().data_ptr(), out.data_ptr(),
        ):  # fmt: skip
            raise MemoryError("no memory for the intermediate values of the head: lower max_running")
        return out
