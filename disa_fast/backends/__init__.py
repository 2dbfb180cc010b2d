"""Which code runs a head's denoising loop: the one dispatch point.

A backend is one module with

    refuses(spec, dtype, device, rows, batch_invariant) -> str | None      None: it can serve the call; else the reason why not
    about(dtype) -> str                                                    what runs then, for explain
    captures() -> bool                                                     whether it keeps a CUDA graph for each shape of a call
    draws() -> bool                                                        whether step_noise may be a Philox, drawn in its loop
    denoise(head, z, table, cfg, temperature, noise, step_noise, batch_invariant) -> Tensor

and where it serves the transformers of FlowAR and xAR too

    integrate(head, call) -> Tensor                                        the loop along their flow; see heads/flow.py
    transformer_ops(dtype, own) -> Plain                                   how it computes a block's parts (transformer.py), with
                                                                           products in dtype; own: the parameters' dtype

In `denoise`, noise is [n, channels] and step_noise [T, n, channels] or None, n trajectories, in the state's dtype; z is
[n, z_channels], or [2n, z_channels] under guidance (cfg != 1). The result is [n, channels]. A backend runs rows of the table as
they come and knows no solver. batch_invariant: a row's bits may not depend on the rows beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..checks import check_flag
from ..errors import UnsupportedError
from . import cpu, cuda, hoisted, reference, triton

if TYPE_CHECKING:
    from ..heads.cell_transformer import CellTransformerSpec
    from ..heads.flow_transformer import FlowTransformerSpec
    from ..heads.mlp import MLPSpec

    Spec = MLPSpec | FlowTransformerSpec | CellTransformerSpec

BACKENDS = {"cuda": cuda, "triton": triton, "cpu": cpu, "hoisted": hoisted, "reference": reference}


def survey(spec: Spec, dtype: torch.dtype, device: torch.device, rows: int, batch_invariant: bool = False) -> dict[str, str | None]:
    """Each backend's answer to a call like this, the fastest first: None if it can serve it, else why not."""
    names = _fastest_first(spec, dtype, device, rows)
    return {name: _refuses(name, spec, dtype, device, rows, batch_invariant) for name in names}


def _fastest_first(spec: Spec, dtype: torch.dtype, device: torch.device, rows: int) -> list[str]:
    names = list(BACKENDS)
    if device.type == "cpu":
        names = [*names[2:], "triton", "cuda"]  # interpreted there, if at all
        if rows > cpu.fastest_up_to(spec.width, dtype):
            names[:2] = ["hoisted", "cpu"]
    elif rows > cuda.fastest_up_to(spec.width, device):
        names[:2] = ["triton", "cuda"]
    return names


def _refuses(name: str, spec: Spec, dtype: torch.dtype, device: torch.device, rows: int, batch_invariant: bool) -> str | None:
    if not hasattr(BACKENDS[name], spec.loop):
        return "serves MLP heads alone, not transformers"
    return BACKENDS[name].refuses(spec, dtype, device, rows, batch_invariant)


def choose(name: str, spec: Spec, dtype: torch.dtype, device: torch.device, rows: int, batch_invariant: bool = False) -> str:
    """The backend asked for, or under "auto" the fastest that can serve the call: a key of BACKENDS. UnsupportedError if none."""
    check_flag("batch_invariant", batch_invariant)
    known = isinstance(name, str) and name in ("auto", *BACKENDS)
    if known:
        for backend in _fastest_first(spec, dtype, device, rows) if name == "auto" else [name]:
            if _refuses(backend, spec, dtype, device, rows, batch_invariant) is None:
                return backend  # without asking the others, since every call comes by here
    why_not = survey(spec, dtype, device, rows, batch_invariant)
    able = [backend for backend, reason in why_not.items() if reason is None]
    if not known:
        raise UnsupportedError(f"backend: {name!r} is not one that this version has; can serve this call: {['auto', *able]}")
    if name == "auto":
        reasons = "; ".join(f"{backend}: {reason}" for backend, reason in why_not.items())
        raise UnsupportedError(f"backend: none can run {spec} in {dtype} on {device}: {reasons}")
    raise UnsupportedError(f"backend: {name!r} cannot serve this call: {why_not[name]}; can: {['auto', *able]}")
