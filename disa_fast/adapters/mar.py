"""MAR- and Harmon-shaped objects: those whose `diffloss`, which a Harmon has in its `mar`, has a `net` with MAR's parameter names
and a `sample` method.

Written against MAR (LTH14/mar at fe470ac), Harmon (wusize/Harmon at 4eb6087), and MAR_DiSA and Harmon_DiSA (DiSA repository at
283fa59). Shadowed are `diffloss.sample` and, where that is not told the autoregressive step, the method that calls it in a loop.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import backends, profiling
from ..errors import UnsupportedError
from ..heads import MLPHead
from ..heads.mlp import draw_noise, draws_of
from ..schedule import Constant, Cosine, Linear, Schedule, TwoStage, as_schedule, steps_at
from ..solvers import DEFAULT_CLIP, Solver, StepTable, default_clip, is_default, resolve
from ..solvers.ddim import ddim_timesteps
from ..solvers.diffusion import Diffusion, cosine, respace
from ..untraced import untraced
from ..watch import of_temperature
from . import check as check_
from . import check_mlp
from .accelerated import HANDLE, SKIPPED, Accelerated, Settings
from .calls import Loop, Loops, arguments_of, is_default_of, required, signature_of, with_signature
from .check_mlp import Own
from .diffusion import SERVED, Chain, process_of, read_chain, table_of

DEFAULT_SCHEDULE = "linear:50-5"
OF_SAMPLE = ("z", "temperature", "cfg")
TOLD = ("step", "ar_num_iter")
_SOLVER_OF_SAMPLER = {"DiSA": "ddpm", "DDIM": "ddim", "DPM_Solver": "dpm_solver", "DPM_Solver++": "dpm_solver++"}
_PLAIN_VALUES = (bool, int, float, str, type(None), torch.device, torch.dtype)


class AcceleratedMAR(Accelerated):
    system: ClassVar[str] = "MAR"
    diffloss_at: ClassVar[str] = "diffloss"
    loop_name: ClassVar[str] = "sample_tokens"
    head: MLPHead

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        at, loop_name = self.diffloss_at, self.loop_name
        diffloss: Any = functools.reduce(lambda owner, name: getattr(owner, name, None), at.split("."), model)
        if not isinstance(getattr(diffloss, "net", None), nn.Module) or not callable(getattr(diffloss, "sample", None)):
            raise UnsupportedError(
                f"model: expected a {self.system}-shaped object, with {at}.net and {at}.sample; {type(model).__name__} has not"
            )
        if HANDLE in vars(diffloss):
            raise UnsupportedError(
                f"model: its {at} is also that of another model, which is accelerated now; restore that one first, or accelerate a "
                "copy.deepcopy of this one"
            )
        self._diffloss = diffloss
        self._sample_signature = signature_of(diffloss.sample)
        accepted = self._sample_signature.parameters
        if not set(OF_SAMPLE) <= accepted.keys():
            raise UnsupportedError(
                f"model: expected {at}.sample(z, temperature, cfg[, step, ar_num_iter]), got parameters {list(accepted)}"
            )
        unknown = [name for name in required(self._sample_signature) if name not in OF_SAMPLE + TOLD]
        if unknown:
            raise UnsupportedError(
                f"model: {at}.sample requires {', '.join(unknown)}, of which nothing is known here; served are z, temperature, "
                "cfg, step, ar_num_iter, and others at their defaults"
            )
        self._told_the_step = set(TOLD) <= accepted.keys()
        self._loop_signature = None
        if not self._told_the_step:
            loop = getattr(model, loop_name, None)
            self._loop_signature = signature_of(loop) if callable(loop) else None
            if self._loop_signature is None or "num_iter" not in self._loop_signature.parameters:
                raise UnsupportedError(
                    f"model: {at}.sample is not told the autoregressive step, and there is no {loop_name}(..., num_iter, ...) "
                    f"on {type(model).__name__} to count it in"
                )
        self.head = self._head_of(diffloss.net)
        self._original_loop: Any = None
        self._original_orders: Any = None
        self._reset()

    def _reset(self) -> None:
        self._loops = Loops()
        self._outside = 0
        self._harmless: set[str] = set()

    def _head_of(self, net: nn.Module) -> MLPHead:
        """The head of diffloss.net as it is now. Raises UnsupportedError if it is none."""
        at = f"{self.diffloss_at}.net"
        if hasattr(net, "_orig_mod"):
            raise UnsupportedError(f"model: {at} is compiled; set {at} = {at}._orig_mod before it is accelerated")
        try:
            head = MLPHead.from_module(net)
        except ValueError as error:
            raise UnsupportedError(f"model: {at} is not a MAR diffusion head: {error}") from error
        if head.device.type == "meta":
            raise UnsupportedError(f"model: the parameters of {at} are on meta, without data; load or move them first")
        return head

    # Settings ----------------------------------------------------------------------------------------------------------

    def _resolved(
        self,
        schedule: Schedule | str | None,
        solver: str | Solver | None,
        clip: int | str | None,
        backend: str,
        dtype: torch.dtype | None,
        check: bool,
    ) -> tuple[Settings, Mapping[str, object] | str]:
        head = self._head_now()
        given = None if schedule is None else as_schedule(schedule)
        if solver is not None:
            resolve(solver, clip)
        backends.choose(backend, head.spec, head.dtype if dtype is None else dtype, head.device, rows=2)
        try:
            own, annealed = own_settings(self._diffloss, self._told_the_step)
        except UnsupportedError:
            if check or given is None:
                raise
            own = annealed = None
        if not check:
            self._say_of_weights(head._net)
        structure = self._structure_now()
        found = self._checked(structure, own, backend, dtype) if check else SKIPPED
        own_schedule, own_solver, own_clip = annealed or (as_schedule(DEFAULT_SCHEDULE), None, DEFAULT_CLIP)
        is_own_solver = solver is None
        if is_own_solver:
            solver = own_solver or (found["solver"] if isinstance(found, Mapping) else "ddpm")
            clip = own_clip if is_default(clip) and given is None else clip
        settings = Settings(
            schedule=own_schedule if given is None else given,
            schedule_from="argument" if given is not None else "model" if annealed else "default",
            solver=solver,
            is_own_solver=is_own_solver,
            clip=clip,
            backend=backend,
            dtype=dtype,
        )
        tables = Tables(settings.solver, settings.clip, own)
        if isinstance(settings.schedule, Constant):
            tables(settings.schedule.steps)  # what no table can be made of shows here
            self._say_of_clip(settings, own)
        self._own, self._structure = own, structure
        return settings, found

    def _say_of_clip(self, settings: Settings, own: Own | None) -> None:
        """Warn where constant steps are not those that the object would take by itself, for the clip alone."""
        if settings.schedule_from != "argument" or settings.solver not in ("ddpm", "ddim") or not is_default(settings.clip):
            return
        if own is None or self._told_the_step or isinstance(own.chains[0], int):
            return
        steps, base = settings.schedule.steps, own.chains[0].base_steps
        clip = default_clip(settings.solver, base)
        if int(own.chains[0].timesteps[-1]) > clip:
            warnings.warn(
                f"schedule: constant:{steps} is clipped at timestep {clip} of {base} (DiSA's time offset), where the model's own "
                f"sampling starts at {int(own.chains[0].timesteps[-1])}; pass clip=None for the model's own tokens",
                stacklevel=5,
            )

    def _adopt(self) -> None:
        self._table_for = Tables(self.solver, self.clip, self._own)
        self._is_unguided = self._settings.is_own_solver and str(self.solver).startswith("dpm")

    def _checked(
        self,
        structure: bytes,
        own: Own,
        backend: str,
        dtype: torch.dtype | None,
        others: Mapping[str, object] | None = None,
    ) -> Mapping[str, object]:
        dtype = self.head.dtype if dtype is None else dtype
        described = (own.solver, own.is_told, repr(own.schedule), backend, dtype, others)
        key = check_.structure_of(structure, described)
        with check_.LOCK:
            found = check_.proven(self._model, key)
            if found is None:
                self._say_of_weights(self._diffloss.net)
                found = self._proven(own, backend, dtype, others)
                check_.remember(self._model, key, found)
                self._say_of_hooks()
        return found

    def _say_of_hooks(self) -> None:
        hooked = check_.hooked(self._diffloss.net)
        if hooked:
            self._say_once(
                f"model: hooks and replaced methods of {self.diffloss_at}.net ({', '.join(hooked[:4])}) are not called while it is "
                "accelerated; they do not change its output"
            )

    def _proven(self, own: Own, backend: str, dtype: torch.dtype, others: Mapping[str, object] | None) -> Mapping[str, object]:
        """The check, on a stand-in of the diffloss, which other threads do not see; on itself where it cannot be copied, or its
        copy does not do what it does."""
        try:
            stand_in = check_.stand_in(self._diffloss, self._shadowed)
            with check_.as_it_was(stand_in):
                return check_mlp.prove(stand_in, stand_in.net, own, backend, dtype, others)
        except Exception:  # copying somebody's object may fail in any way
            with self._as_original(), check_.as_it_was(self._diffloss):
                return check_mlp.prove(self._diffloss, self._diffloss.net, own, backend, dtype, others)

    def _structure_now(self) -> bytes:
        """What decides the diffloss' function, but for the values of its network's parameters."""
        diffloss = self._diffloss
        return check_.structure_of(diffloss, apart_from=diffloss.net, shadowed=self._shadowed)

    # Following the object ------------------------------------------------------------------------------------------------

    def _head_now(self) -> MLPHead:
        """The head of diffloss.net, which somebody may have set anew."""
        if self._diffloss.net is not self.head._net:
            self.head = self._head_of(self._diffloss.net)
        return self.head

    def _follow(self) -> None:
        """At the first step of an image: notice other weights, another network, another function."""
        self._head_now().follow()
        dropping = [name for name, module in self._diffloss.net.named_modules() if check_.drops(module)]
        if dropping:
            raise UnsupportedError(
                f"model: it is in training mode, where {', '.join(dropping[:4])} of {self.diffloss_at}.net drop values, which ours "
                "does not; call model.eval()"
            )
        if self._check == SKIPPED:
            return
        structure = self._structure_now()
        if structure == self._structure:
            return
        self.head.check_structure()
        own, _ = own_settings(self._diffloss, self._told_the_step)
        if not own.is_same(self._own):
            raise UnsupportedError(
                f"model: what {self.diffloss_at} samples with changed since it was accelerated; call accelerate again"
            )
        self._check = self._checked(structure, own, self.backend, self.dtype)
        self._structure = structure

    def _shadow_all(self) -> None:
        self._shadow(self._diffloss, HANDLE, self)
        self._shadow(self._diffloss, "sample", with_signature(self._sample, self._sample_signature))
        owner: Any = functools.reduce(getattr, self.diffloss_at.split(".")[:-1], self._model)
        self._original_orders = getattr(owner, "sample_orders", None)
        if callable(self._original_orders):
            self._shadow(owner, "sample_orders", with_signature(self._orders, signature_of(self._original_orders)))
        if not self._told_the_step:
            self._original_loop = getattr(self._model, self.loop_name)
            self._shadow(self._model, self.loop_name, with_signature(self._counted_loop, self._loop_signature))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_loops", "_table_for")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()
        if self._settings is not None:
            self._adopt()

    # What shadows the model's own methods -----------------------------------------------------------------------------

    @untraced
    def _orders(self, *args: Any, **kwargs: Any) -> Any:
        """The object's own, of NumPy's generator, where torch.compile would take one of PyTorch's."""
        return self._original_orders(*args, **kwargs)

    @untraced
    def _sample(self, *args: Any, **kwargs: Any) -> Tensor:
        given = arguments_of(self._sample_signature, args, kwargs)
        k, K = self._position(given)
        if k == 0:
            self._end_of_image()
            self._follow()
        self._refuse_others(given)
        table = self._table_for(steps_at(self.schedule, k, K))
        z, head = given["z"], self._head_now()
        self._steps[len(table)] += 1
        self._say_once(of_temperature(table, given["temperature"]))
        if z.requires_grad and torch.is_grad_enabled():
            self._say_once(f"{self.diffloss_at}.sample: no gradients flow through it while the model is accelerated")
        with profiling.range(profiling.AR_STEP_OF_ANOTHER_LOOP, k, K, len(table), len(z)):
            tokens = self._denoised(head, z, table, given)
        self._tokens.add(k, K, tokens)
        if k == K - 1 and self._loops.innermost() is None:
            self._end_of_image()
        return tokens

    def _end_of_image(self) -> None:
        self._say_once(self._tokens.said(), about="tokens")

    def _denoised(self, head: MLPHead, z: Tensor, table: StepTable, given: Mapping[str, Any]) -> Tensor:
        cfg, options = given["cfg"], {"backend": self.backend, "dtype": self._product_dtype()}
        if self._is_unguided and float(cfg) != 1.0:  # as the published DPM-Solver: both halves go their own ways from one start
            start, _ = draw_noise(table, len(z), head.spec.in_channels, True, *draws_of(None, z.device), torch.float32)
            return head.denoise(z, table, noise=torch.cat([start, start]), **options)
        return head.denoise(z, table, cfg=cfg, temperature=given["temperature"], **options)

    def _position(self, given: Mapping[str, Any]) -> tuple[int, int]:
        """(k, K): which autoregressive step of how many this is."""
        if self._told_the_step:
            return given["step"], given["ar_num_iter"]
        loop = self._loops.innermost()
        if loop is None:  # called on its own: as a first step
            self._outside += 1
            if self._outside > 1 and not isinstance(self.schedule, Constant):
                self._say_once(
                    f"{self.diffloss_at}.sample is called outside of {self.loop_name}, or in one that was bound before accelerate: "
                    f"each call runs as a first AR step, in T(0) = {steps_at(self.schedule, 0, 1)} steps, and nothing is annealed"
                )
            return 0, 1
        self._outside = 0
        k, K = loop.k, 1 if loop.K is None else loop.K
        loop.k += 1
        if k >= K and loop.K is not None:
            if not isinstance(self.schedule, Constant):
                self._say_once(
                    f"{self.diffloss_at}.sample is called more often than the num_iter = {K} times of {self.loop_name}: steps are "
                    f"counted by call, so that annealing ends early, and calls beyond run as the last step"
                )
            k = K - 1
        return min(k, K - 1), K

    def _refuse_others(self, given: Mapping[str, Any]) -> None:
        """Raise UnsupportedError for an argument of `sample` that is unknown here and makes a difference."""
        parameters = self._sample_signature.parameters
        others = {
            name: value
            for name, value in given.items()
            if name not in OF_SAMPLE + TOLD
            and not (name in parameters and is_default_of(parameters[name], value))
            and not (name == "device" and torch.device(value) == given["z"].device)
        }
        text = ", ".join(f"{name} = {value!r}" for name, value in sorted(others.items()) if isinstance(value, _PLAIN_VALUES))
        if not others or (text in self._harmless and all(isinstance(value, _PLAIN_VALUES) for value in others.values())):
            return
        for name, value in others.items():
            if not isinstance(value, _PLAIN_VALUES):
                raise UnsupportedError(
                    f"{name}: {self.diffloss_at}.sample is served with this argument at its default, got {type(value).__name__}"
                )
        if self._check != SKIPPED:
            self._checked(self._structure, self._own, self.backend, self.dtype, others)  # raises where it makes a difference
        self._harmless.add(text)

    @untraced(recursive=False)
    def _counted_loop(self, *args: Any, **kwargs: Any) -> Any:
        num_iter = arguments_of(self._loop_signature, args, kwargs).get("num_iter")
        num_iter = int(num_iter) if isinstance(num_iter, Tensor) else num_iter
        if num_iter is None and not isinstance(self.schedule, Constant):
            raise UnsupportedError(
                f"num_iter: expected a number, since {self.schedule} depends on it, got None; or accelerate with "
                "schedule='constant:N'"
            )
        outermost = self._loops.innermost() is None
        result = self._loops.run(Loop(num_iter), self._original_loop, args, kwargs)
        if outermost:
            self._end_of_image()
        return result


class AcceleratedHarmon(AcceleratedMAR):
    system, diffloss_at, loop_name = "Harmon", "mar.diffloss", "sample"


class Tables:
    """steps -> StepTable of a solver over the object's own diffusion; where the count is the object's
    own and there is no clip, over the very timesteps that it visits."""

    def __init__(self, solver: str | Solver, clip: int | str | None, own: Own | None) -> None:
        process = own.process if own is not None else None
        self._resolved = resolve(solver, clip, None if process is None or process is cosine() else process)
        self._process, self._own_table = process, None
        if own is not None and len(own.chains) == 1 and solver in ("ddpm", "ddim") and clip is None:
            self._own_table = table_of(own.chains[0], process, solver)

    def __call__(self, steps: int) -> StepTable:
        if self._own_table is not None and steps == len(self._own_table):
            return self._own_table
        if self._process is not None and np.isnan(self._process.alphas_cumprod).any():
            known = int(np.isfinite(self._process.alphas_cumprod).sum())
            raise UnsupportedError(
                f"schedule: the model shows its betas at the {known} timesteps of its own sampling alone, so that nothing is known "
                f"of {steps} steps; served is schedule='constant:{known}' with clip=None"
            )
        return self._resolved(steps)


# What an object does by itself ------------------------------------------------------------------------------------------

Annealed = tuple[Schedule, str, int | str | None]


def own_settings(diffloss: Any, is_told: bool) -> tuple[Own, Annealed | None]:
    """What the object does, and (schedule, solver, clip) of its annealing, None if it has none.

    Raises UnsupportedError where its diffusion cannot be read, or is none that tables express.
    """
    strategy = getattr(diffloss, "diff_annealing_strategy", None)
    sampler = str(getattr(diffloss, "sampler", "DiSA"))  # Harmon's has no choice of sampler
    trained_with = read_chain(getattr(diffloss, "train_diffusion", None))
    entries = getattr(diffloss, "gen_diffusion", None)
    if strategy is None or sampler == "default":
        chain = read_chain(entries)
        if chain is None:
            raise UnsupportedError(
                "model: expected a diffusion with timestep_map or betas in diffloss.gen_diffusion, got "
                f"{type(entries).__name__}; {SERVED}"
            )
        return Own("ddpm", [chain], process_of(chain, trained_with), None, is_told), None
    makers: dict[str, Callable[[int, int], Schedule]] = {
        "linear": Linear,
        "cosine": Cosine,
        "two-stage": TwoStage,
        "constant": lambda early, late: Constant(late),
    }
    if str(strategy) not in makers or sampler not in _SOLVER_OF_SAMPLER:
        raise UnsupportedError(
            f"model: unknown annealing {strategy!r} or sampler {sampler!r}; pass schedule=, solver= and check=False"
        )
    solver = _SOLVER_OF_SAMPLER[sampler]
    read = _annealed_counts(entries, solver, trained_with)
    if read is None:
        raise UnsupportedError(
            "model: it anneals, but its step counts cannot be read from diffloss.gen_diffusion; pass schedule= and check=False"
        )
    early, late, clip, chains, process = read
    schedule = makers[str(strategy)](early, late)
    return Own(solver, chains, process, schedule, is_told), (schedule, solver, clip)


def _annealed_counts(
    entries: object, solver: str, trained_with: Chain | None
) -> tuple[int, int, int | str | None, list[Any], Diffusion | None] | None:
    """(early, late, clip, chains, process) of a gen_diffusion with an entry for each count from late to early: the count itself, or
    a respaced diffusion, whose timesteps must be exactly those of our own grid. None if it has no such entries."""
    if not isinstance(entries, list) or not entries:
        return None
    if all(isinstance(entry, int) for entry in entries):
        return entries[-1], entries[0], DEFAULT_CLIP, list(entries), None
    chains = [read_chain(entry) if hasattr(entry, "timestep_map") else None for entry in entries]
    if any(chain is None for chain in chains):
        return None
    base = chains[0].base_steps
    if any(chain.base_steps != base for chain in chains):
        return None
    grids = [chain.timesteps for chain in chains]
    highest = max(int(grid[-1]) for grid in grids)
    make = ddim_timesteps if solver == "ddim" else respace
    for clip in (default_clip(solver, base), None if highest == base - 1 else highest):
        for late in range(len(grids[0]), base - len(grids) + 2):
            if all(np.array_equal(make(late + i, clip, base), grid) for i, grid in enumerate(grids)):
                return late + len(grids) - 1, late, clip, chains, process_of(max(chains, key=len), trained_with)
    return None
