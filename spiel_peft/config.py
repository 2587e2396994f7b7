"""`SpIELConfig`: the settings of a SpIEL adapter and their checks. Nothing here needs a tensor or a model."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig

from . import checks as check
from .checks import LORA_ONLY_FIELDS
from .growth import get_growth_criterion
from .registration import spiel_type

DEFAULT_R = 8

_BUDGETS = ("r", "density", "num_deltas")
_SCHEDULES = ("linear", "cosine", "constant")
_BIASES = ("none", "all", "spiel_only")
_DELTA_DTYPES = (None, "float32", "bfloat16", "float16")

_R_REMEDY = "Take the rank LoRA would use here, such as 8 or 64."
_DENSITY_REMEDY = "It is the trained share of each weight: 0.01 trains 1%."
_COUNT_REMEDY = "It counts trainable values: pass a positive integer, or a dict from full module names to such counts."
_REGEX_REMEDY = "Escape special characters, or pass a list of module names."


class RefusesLoraFields:
    """Mixin of configs that refuses unknown keyword arguments, and says what to use instead.

    Those of LoraConfig are a ValueError. Others are a TypeError as by the generated `__init__`: it becomes PEFT's
    warning about a file of a later version. The check is in `__new__` so that `__init__` stays as it is: PEFT reads the
    fields from its signature.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        own = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        errors = [
            f"`{name}` is a field of LoraConfig that {cls.__name__} must not be given, got {check.short(value)}. "
            f"{LORA_ONLY_FIELDS[name]}"
            for name, value in kwargs.items()
            if name in LORA_ONLY_FIELDS and name not in own
        ]
        if errors:
            raise ValueError("\n".join(errors))
        unknown = [name for name in kwargs if name not in own]
        similar = {name: check.nearest(name, own) for name in unknown}
        if unknown and _is_of_file(kwargs.get("peft_type"), kwargs.get("peft_version")):
            for name in filter(similar.get, unknown):
                warnings.warn(
                    f"adapter_config.json has the unknown field `{check.short(name)}`, which is ignored."
                    f"{similar[name]}",
                    stacklevel=2,
                )
        if unknown:
            raise TypeError(
                f"{cls.__name__}.__init__() got an unexpected keyword argument {check.short(unknown[0])}."
                f"{similar[unknown[0]]}"
            )
        return super().__new__(cls)


def _is_of_file(peft_type: Any, peft_version: Any) -> bool:
    """Whether a config with these fields was read from a file.

    `PeftConfig.from_pretrained` passes the contents of a file to the constructor without saying so. Only a file has
    both keys, and only in a file is the type a plain string.
    """
    return type(peft_type) is str and peft_version is not None


@dataclass
class SpIELConfig(RefusesLoraFields, PeftConfig):
    """Configuration of a SpIEL adapter: sparse deltas to the pretrained weights, whose positions move while training.

    Give one budget at most: `r`, `density` or `num_deltas`. A wrong value raises a ValueError that names the field.

    Args:
        r (`int`, *optional*): As many trainable values per module as LoRA of this rank would have there,
            `r * (in + out)`. 8 when no budget is given.
        density (`float`, *optional*): Trained share of each targeted weight, above 0 and at most 1.
        num_deltas (`int` or `dict[str, int]`, *optional*): An int is the total number of trainable values,
            split over the modules in proportion to their size. A dict maps full module names to counts and
            selects the targets too.
        rank_pattern (`dict[str, int]`): Regex or suffix of module names to an `r` that overrides the budget
            there.
        density_pattern (`dict[str, float]`): Regex or suffix of module names to a `density` that overrides
            the budget there.
        growth (`str`): Criterion that chooses the positions to grow: "accumulated_gradient" (SpIEL-AG),
            "momentum" (SpIEL-MA), "random", "none", or one registered with `register_growth_criterion`.
        regrow_every (`int`): Optimizer steps between two closes of a cycle.
        accumulation_steps (`int`): Optimizer steps over which candidates' gradients are summed before a
            close, and for every criterion the step of the first close. At most `regrow_every` if the
            criterion gathers.
        candidates (`float`, *optional*): Positions whose gradients a window collects, for each delta that its close
            can grow; at least 1, never more in all than there are deltas. None: as many as deltas, or what the
            criterion says. A candidate takes 16 bytes while the window is open.
        initial_regrow_rate (`float`): Share of the deltas replaced at a close, at the start of the schedule.
        regrow_schedule (`str`): How that share falls over `total_steps`: "linear", "cosine" or "constant".
        total_steps (`int`, *optional*): Optimizer steps of the whole run. None: taken from the trainer where
            it is known, else the share follows the learning rate.
        stop_regrowing_at (`float`): Fraction of `total_steps` after which closes are skipped.
        seed (`int`): Seed of the random choices, mixed with module name and cycle number.
        target_modules (`list[str]` or `str`, *optional*): Modules to adapt: names or name suffixes, a regex,
            or "all-linear". None: the modules PEFT's LoRA targets by default in this architecture.
        exclude_modules (`list[str]` or `str`, *optional*): Names, name suffixes or regex of modules to leave
            alone.
        target_parameters (`list[str]`, *optional*): Bare parameters to adapt, by full name or name suffix, such as
            "experts.gate_up_proj" and "experts.down_proj", the fused experts of a mixture. All that match are
            adapted; `exclude_modules` and `layers_to_transform` are about modules only.
        layers_to_transform (`list[int]` or `int`, *optional*): Indices of the layers to adapt.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the list of layers, such as "layers" or
            "h"; only with `layers_to_transform`.
        modules_to_save (`list[str]`, *optional*): Further modules to train in full and save with the adapter.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*): Rows of the input
            embedding, or of the embeddings named, to train in full.
        ensure_weight_tying (`bool`): Adapt weights that are tied to each other through one delta.
        bias (`str`): Which biases to train: "none", "all" or "spiel_only" (those of adapted modules).
        fan_in_fan_out (`bool`): The adapted layers store their weight as (in, out), as transformers' Conv1D
            does.
        init_weights (`bool`): True: deltas start at zero. False: at random values, for tests.
        delta_dtype (`str`, *optional*): Data type of the deltas: "float32", "bfloat16" or "float16". None:
            PEFT's rule, float32 under `autocast_adapter_dtype=True`, else the weight's.
    """

    r: int | None = field(
        default=None,
        metadata={
            "help": "Budget: as many trainable values per module as LoRA of this rank, r * (in + out). "
            f"{DEFAULT_R} when no budget is given."
        },
    )
    density: float | None = field(
        default=None,
        metadata={"help": "Budget: trained share of each targeted weight, above 0 and at most 1."},
    )
    num_deltas: int | dict[str, int] | None = field(
        default=None,
        metadata={
            "help": "Budget: total number of trainable values, split in proportion to size; or a dict from "
            "full module names to counts, which also selects the targets."
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Regex or suffix of module names to an `r` that overrides the budget there."},
    )
    density_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Regex or suffix of module names to a `density` that overrides the budget there."},
    )
    growth: str = field(
        default="accumulated_gradient",
        metadata={
            "help": "Criterion that chooses the positions to grow: 'accumulated_gradient' (SpIEL-AG), "
            "'momentum' (SpIEL-MA), 'random', 'none', or one registered with `register_growth_criterion`."
        },
    )
    regrow_every: int = field(default=20, metadata={"help": "Optimizer steps between two closes of a cycle."})
    accumulation_steps: int = field(
        default=5,
        metadata={
            "help": "Optimizer steps over which candidates' gradients are summed before a close; also the "
            "step of the first close. At most `regrow_every` if the criterion gathers gradients."
        },
    )
    candidates: float | None = field(
        default=None,
        metadata={
            "help": "Positions whose gradients a window collects, for each delta that its close can grow: a number of "
            "at least 1. None: as many as there are deltas, or what the growth criterion says."
        },
    )
    initial_regrow_rate: float = field(
        default=0.2,
        metadata={"help": "Share of the deltas replaced at a close, at the start of the schedule."},
    )
    regrow_schedule: Literal["linear", "cosine", "constant"] = field(
        default="linear",
        metadata={"help": "How that share falls over `total_steps`: 'linear', 'cosine' or 'constant'."},
    )
    total_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps of the whole run. None: asked of the trainer where it is known."},
    )
    stop_regrowing_at: float = field(
        default=1.0, metadata={"help": "Fraction of `total_steps` after which closes are skipped."}
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the random choices, mixed with module name and cycle number."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt: list of names or name suffixes, a regex, or 'all-linear'. None: the "
            "modules PEFT's LoRA targets by default in this architecture."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone: list of names or name suffixes, or a regex."}
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Bare parameters to adapt, by full name or name suffix, such as 'experts.gate_up_proj': the fused "
            "experts of a mixture, which are no modules."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the layers to adapt. Only works when `target_modules` is a list of names."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of layers, such as 'layers' or 'h'. Only with `layers_to_transform`."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Further modules to train in full and save with the adapter, such as a new classifier."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Rows of the input embedding to train in full, or a dict from embedding names to rows."},
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Adapt weights that are tied to each other through one delta."}
    )
    bias: Literal["none", "all", "spiel_only"] = field(
        default="none", metadata={"help": "Which biases to train: 'none', 'all' or 'spiel_only'."}
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata={"help": "The adapted layers store their weight as (in, out), as transformers' Conv1D does."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: deltas start at zero. False: at random values, for tests."}
    )
    delta_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={"help": "Type of the deltas. None: float32 under `autocast_adapter_dtype=True`, else the base's."},
    )

    # True on configs that were read from a file. Without an annotation it is no field, and is not saved.
    _from_checkpoint = False

    def __post_init__(self) -> None:
        if _is_of_file(self.peft_type, self.peft_version):
            self._from_checkpoint = True
        self._check_common()
        super().__post_init__()
        self.peft_type = spiel_type()
        # PEFT's tuners store the names of tied modules in these two. They are no fields, and are not saved.
        self.modules_to_tie = None
        self.target_modules_to_tie = None
        self._check_budget()
        self._check_patterns()
        self._check_cycle()
        self._check_targets()
        self._check_layers()
        self._check_extras()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SpIELConfig:
        """PEFT's `from_pretrained`; the result remembers that it comes from a file."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config._from_checkpoint = True
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """PEFT's `from_json_file`; a file that is too large, too deep or damaged is a ValueError that names it."""
        check.config_object(Path(path_json_file))
        return super().from_json_file(path_json_file, **kwargs)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise a ValueError that names the field if its regular expressions take for ever on these module names."""
        patterns = [(name, getattr(self, name)) for name in ("target_modules", "exclude_modules")]
        patterns = [(name, value) for name, value in patterns if isinstance(value, str)]
        patterns += [("rank_pattern", rf"(.*\.)?({key})$") for key in self.rank_pattern]
        patterns += [("density_pattern", rf"(.*\.)?({key})$") for key in self.density_pattern]
        layers = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        patterns += [("layers_pattern", rf"(?:^|.*?\.){key}\.(\d+)\.") for key in layers if _has_choice(key)]
        saved = self.modules_to_save or []
        patterns += [("modules_to_save", rf"(^|.*\.){key}($|\..*)") for key in saved if _has_choice(key)]
        check.patterns_in_time(patterns, names)

    def _check_common(self) -> None:
        """Check the fields of every PEFT config, which PEFT takes as they are."""
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
            elif value is not None and not isinstance(value, str):
                check.refuse(name, "must be a string or None", value, "Leave it out.")
        check.boolean("inference_mode", self.inference_mode, "Pass a plain bool.")
        if not isinstance(self.task_type, (str, type(None))):
            check.refuse("task_type", "must be a string or None", self.task_type, "CAUSAL_LM is one.")
        if self.auto_mapping is not None:
            check.mapping("auto_mapping", self.auto_mapping, "Leave it out.")

    def _check_budget(self) -> None:
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            values = " and ".join(f"`{name}={check.short(getattr(self, name))}`" for name in given)
            raise ValueError(
                f"`r`, `density` and `num_deltas` are three ways to say one thing: give exactly one of them, "
                f"got {values}. Drop one of them; where `r` came from the default, pass `r=None`."
            )
        if not given:
            self.r = DEFAULT_R
        if self.r is not None:
            self.r = check.integer("r", self.r, 1, _R_REMEDY)
        if self.density is not None:
            self.density = check.density("density", self.density, _DENSITY_REMEDY)
        if isinstance(self.num_deltas, dict):
            self.num_deltas = check.counts("num_deltas", self.num_deltas, _COUNT_REMEDY)
        elif self.num_deltas is not None:
            self.num_deltas = check.integer("num_deltas", self.num_deltas, 1, _COUNT_REMEDY)

    def _check_patterns(self) -> None:
        remedy = "Map a regex or suffix of module names to a value, as in {'q_proj': VALUE}, or leave it out."
        for name in ("rank_pattern", "density_pattern"):
            value = getattr(self, name)
            pattern = {} if value is None else check.mapping(name, value, remedy)
            check.regexes(name, pattern, "Escape special characters, or use the module's name.")
            setattr(self, name, pattern)
        for key, value in self.rank_pattern.items():
            self.rank_pattern[key] = check.integer(f"rank_pattern[{key!r}]", value, 1, _R_REMEDY)
        for key, value in self.density_pattern.items():
            self.density_pattern[key] = check.density(f"density_pattern[{key!r}]", value, _DENSITY_REMEDY)
        both = self.rank_pattern.keys() & self.density_pattern.keys()
        if both:
            remedy = "Keep each pattern in one of the two."
            check.refuse("rank_pattern", "must not share a key with `density_pattern`", sorted(both), remedy)

    def _check_cycle(self) -> None:
        criterion = get_growth_criterion(self.growth)
        steps = "Count optimizer steps, not micro-batches."
        self.regrow_every = check.integer("regrow_every", self.regrow_every, 1, steps)
        self.accumulation_steps = check.integer("accumulation_steps", self.accumulation_steps, 1, steps)
        if self.total_steps is not None:
            remedy = f"{steps} None leaves it to the trainer."
            self.total_steps = check.integer("total_steps", self.total_steps, 1, remedy)
        if criterion.gathers and self.accumulation_steps > self.regrow_every:
            check.refuse(
                "accumulation_steps",
                f"must be at most `regrow_every` ({self.regrow_every}) with growth {self.growth!r}, which "
                "gathers gradients in windows that must not overlap",
                self.accumulation_steps,
                "Lower `accumulation_steps` or raise `regrow_every`.",
            )
        if self.candidates is not None:
            remedy = "It counts candidates per delta that can grow: 2 is a start, None takes as many as deltas."
            self.candidates = check.multiple("candidates", self.candidates, remedy)
            if not criterion.gathers:
                rule = f"works only with a growth criterion that gathers gradients, not with {self.growth!r}"
                check.refuse("candidates", rule, self.candidates, "Drop `candidates`: no window is opened.")
        remedy = "It is a share of the deltas: 0.2 replaces 20% at the first scheduled close, 0 none."
        self.initial_regrow_rate = check.fraction("initial_regrow_rate", self.initial_regrow_rate, remedy)
        remedy = "It is a fraction of `total_steps`: 1.0 regrows to the end."
        self.stop_regrowing_at = check.fraction("stop_regrowing_at", self.stop_regrowing_at, remedy)
        check.choice("regrow_schedule", self.regrow_schedule, _SCHEDULES, "'linear' is the default.")
        self.seed = check.integer("seed", self.seed, 0, "Any non-negative integer will do, such as 0.")

    def _check_targets(self) -> None:
        remedy = "Pass a list of names or a regex, or None for the default."
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                if not value:
                    check.refuse(name, "must not be an empty string", value, remedy)
                check.regex(name, value, _REGEX_REMEDY)
            elif value is not None:
                setattr(self, name, set(check.names(name, value, remedy)))
        # Where `target_modules` is None, PEFT tests `name in target_parameters`, which fails if that is None too.
        remedy = "Pass a list of parameter names such as ['experts.gate_up_proj', 'experts.down_proj'], or None."
        wanted = self.target_parameters if self.target_parameters is not None else []
        self.target_parameters = sorted(set(check.names("target_parameters", wanted, remedy)))
        if isinstance(self.num_deltas, dict):
            modules = {name: k for name, k in self.num_deltas.items() if not self.names_parameter(name)}
            # A set although the annotation says list: as in LoraConfig, and as PEFT expects it.
            self.target_modules = check.targets_of_counts(modules, self.target_modules)  # type: ignore

    def names_parameter(self, name: str) -> bool:
        """Whether an entry of `target_parameters` names the parameter with this full name."""
        return any(names_module(target, name) for target in self.target_parameters or ())

    def _check_layers(self) -> None:
        remedy = "Pass the indices of the layers to adapt, such as [0, 1], or None for all."
        if isinstance(self.layers_to_transform, (list, tuple, set, frozenset, range)):
            self.layers_to_transform = check.integers("layers_to_transform", self.layers_to_transform, remedy)
        elif self.layers_to_transform is not None:
            self.layers_to_transform = check.integer("layers_to_transform", self.layers_to_transform, 0, remedy)
        remedy = "Pass the name of the model's list of layers, such as 'layers' or 'h'."
        if self.layers_pattern is not None and not isinstance(self.layers_pattern, str):
            self.layers_pattern = check.names("layers_pattern", self.layers_pattern, remedy)
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        check.regexes("layers_pattern", patterns, remedy)
        for name in ("layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(self.target_modules, str):
                remedy = f"Drop `{name}`, or give `target_modules` as a list of names."
                check.refuse(name, "cannot be used when `target_modules` is a str", value, remedy)
            if isinstance(self.num_deltas, dict):
                remedy = f"Drop `{name}`: the dict names every module."
                check.refuse(name, "cannot be used when `num_deltas` is a dict", value, remedy)
        if self.layers_pattern and self.layers_to_transform is None:
            remedy = "Add `layers_to_transform` or drop `layers_pattern`."
            check.refuse("layers_pattern", "works only with `layers_to_transform`", self.layers_pattern, remedy)

    def _check_extras(self) -> None:
        if self.modules_to_save is not None:
            remedy = "Pass a list such as ['classifier'], or None."
            self.modules_to_save = check.names("modules_to_save", self.modules_to_save, remedy)
            remedy = "PEFT takes each as a regex: escape special characters."
            check.regexes("modules_to_save", self.modules_to_save, remedy)
        if self.trainable_token_indices is not None:
            rows = check.token_indices("trainable_token_indices", self.trainable_token_indices)
            self.trainable_token_indices = rows
        remedy = 'Use "spiel_only" for the biases of adapted modules.'
        check.choice("bias", self.bias, _BIASES, remedy)
        remedy = "Pass the name as a string, or None for PEFT's rule."
        check.choice("delta_dtype", self.delta_dtype, _DELTA_DTYPES, remedy)
        for name in ("ensure_weight_tying", "fan_in_fan_out", "init_weights"):
            check.boolean(name, getattr(self, name), "Pass a plain bool.")


def _has_choice(pattern: str) -> bool:
    """Whether a name that PEFT takes as a regular expression is more than a name."""
    return any(sign in pattern for sign in "*+?{|")


def names_module(target: str, key: str) -> bool:
    """Whether `target`, a full name or a suffix of one, names the module or parameter with the full name `key`."""
    return key == target or key.endswith("." + target)
