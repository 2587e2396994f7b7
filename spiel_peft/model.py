"""`SpIELModel`: every hook of PEFT's tuners, for injection, merging, saving, loading and combining."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype, find_parameter_name_by_module
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from .budget import allocate_deltas
from .compose.combine import add_combination
from .compose.overlap import OverlapReport
from .compose.rules import Combination
from .config import SpIELConfig, names_module
from .cycle.window import WindowCollector
from .delta import AdapterRun
from .files.loading import ModelStructure, refuse_more_than_file
from .layers import SpIELConv, SpIELEmbedding, SpIELLayer, SpIELLinear
from .layers.merging import check_finite, report_merge_loss, used_by_others
from .saving import AdapterLoading, check_live_state_dict, saved_entries
from .targets import (
    BYPASSED,
    BareParameter,
    bypassed_by,
    check_unmerged,
    find_target_parameters,
    modules_of,
    name_listed_parameters,
    part_of,
    refuse_missing_rows,
    shared_weights,
    untie_weights,
    warn_about_fused_experts,
)
from .weights.base_weight import CONV, EMBEDDING, SUPPORTED, BaseInfo, inspect_base

_LAYER_CLASSES = {EMBEDDING: SpIELEmbedding, CONV: SpIELConv}
# Stands for the config of an adapter for which PEFT checks a target by name.
_LORA = SimpleNamespace(peft_type="LORA")


class _Injection:
    """The targets of one call of `inject_adapter` and their numbers of deltas.

    Attributes:
        run: the run of the new adapter.
        module_names: the modules in the state dict that the adapter is injected from; None without a state dict.
        file_counts: numbers of deltas in that state dict, by module.
        infos: the targeted modules and the descriptions of their base layers.
        parameters: the targeted bare parameters with their descriptions.
        counts: number of deltas of each target; None before the targets have been checked.
        shared: the targets whose weight is tied, with the names of the modules that it is tied to.
    """

    def __init__(self, run: AdapterRun, module_names: set[str] | None, counts: dict[str, int]) -> None:
        self.run = run
        self.module_names = module_names
        self.file_counts = counts
        self.infos: dict[str, BaseInfo] = {}
        self.parameters: dict[str, tuple[BareParameter, BaseInfo]] = {}
        self.counts: dict[str, int] | None = None
        self.shared: dict[str, tuple[str, ...]] = {}


class SpIELModel(BaseTuner):
    """A model with SpIEL layers in place of its targeted modules.

    PEFT builds it in `get_peft_model`, `inject_adapter_in_model` and others. The arguments are those of
    `peft.tuners.tuners_utils.BaseTuner`.
    """

    prefix = "spiel_"
    tuner_layer_cls = SpIELLayer
    target_module_mapping = dict(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    # Injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter, as PEFT's `inject_adapter` does. On any error the model is left as it was.

        Raises:
            ValueError: a target is not supported or a budget is impossible, or an adapter is merged.
        """
        check_unmerged(model, adapter_name, "added")
        config = self.peft_config[adapter_name]
        if config._from_checkpoint:
            config.check_patterns(name for name, _ in model.named_modules())
        refuse_missing_rows(model, config)
        name_listed_parameters(config, model)
        self._injection = _Injection(AdapterRun(config, adapter_name), *modules_of(state_dict))
        before = ModelStructure(model)
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        except BaseException:
            before.restore()
            # PEFT has already replaced the config of an adapter with the same name.
            replaced = [run.config for run in before.runs if run.adapter_name == adapter_name]
            self.peft_config.pop(adapter_name, None)
            self.peft_config.update({adapter_name: replaced[0]} if replaced else {})
            raise
        finally:
            del self._injection
        if isinstance(config.num_deltas, dict):
            # PEFT may have shortened the names to suffixes. A saved config must name the modules that have counts.
            config.target_modules = {name for name in config.num_deltas if not config.names_parameter(name)}
        # PEFT casts adapters in `PeftModel` only. An adapter that is injected without it gets the same precision here.
        self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not config.target_parameters:
            warn_about_fused_experts(model)

    def _create_and_replace(
        self,
        peft_config: SpIELConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        injection = self._injection
        if injection.counts is None:
            # At the first target nothing has been changed yet, so all targets are checked now.
            self._plan(injection, peft_config)
        if isinstance(target, SpIELLayer):
            layer = target
        else:
            info = injection.infos[current_key]
            layer = _LAYER_CLASSES.get(info.kind, SpIELLinear)(target, info, current_key)
            layer.set_adapter(self.active_adapters)
            layer.train(target.training)
        layer.shared_with = injection.shared.get(current_key, layer.shared_with)
        source = self._tied_source(peft_config, current_key)
        if source is not None:
            layer.share_delta(adapter_name, peft_config, source)
        else:
            self._add_delta(layer, adapter_name, current_key)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _check_target_module_compatiblity(self, peft_config: SpIELConfig, model: nn.Module, target_name: str) -> None:
        # PEFT knows modules of Mamba-like models that compute with weights without calling the module, but checks them
        # for LoRA only.
        try:
            super()._check_target_module_compatiblity(_LORA, model, target_name)
        except ValueError as error:
            raise ValueError(str(error).replace("[PEFT:LORA]", "[PEFT:SPIEL]")) from None

    def _add_delta(self, layer: SpIELLayer, adapter_name: str, name: str) -> None:
        injection = self._injection
        layer.update_layer(adapter_name, injection.run.config, injection.run, injection.counts[name])
        layer.spiel_delta[adapter_name].collector = WindowCollector()

    def _prepare_adapter_config(self, peft_config: SpIELConfig, model_config: dict[str, Any]) -> SpIELConfig:
        # The config of a model that is not of transformers may be any mapping, or None.
        model_config = {"model_type": None, **(model_config or {})}
        known = model_config["model_type"] in self.target_module_mapping
        if peft_config.target_modules is None and peft_config.target_parameters and not known:
            return peft_config  # parameters alone
        return super()._prepare_adapter_config(peft_config, model_config)

    def _inject_parameters(
        self, peft_config: SpIELConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        # PEFT's version names parameters after nested wrappers, and in files these names do not tell parameters apart.
        injection = self._injection
        if injection.counts is None:
            self._plan(injection, peft_config)
        for name, (parameter, info) in injection.parameters.items():
            part = part_of(model, parameter, info)
            fresh = not part.spiel_delta
            if fresh:
                part.set_adapter(self.active_adapters)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._add_delta(part, adapter_name, name)
            if fresh and adapter_name not in self.active_adapters:
                part.requires_grad_(False)
        return list(injection.parameters)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version also assigns the child's weight to the new module. That fails for trained tokens, and is not
        # needed here: one of the two modules contains the other.
        setattr(parent, child_name, new_module)

    def _plan(self, injection: _Injection, config: SpIELConfig) -> None:
        """Check every target and count its deltas, before the first layer is created."""
        problems = []
        kwargs = get_quantization_kwargs(self.model)
        targets: dict[str, BaseInfo] = {}
        for name, module in self._targets(injection, config):
            base = module.get_base_layer() if isinstance(module, SpIELLayer) else module
            info = inspect_base(base, kwargs)
            if bypassed_by(self.model.get_submodule(name.rpartition(".")[0])):
                info = BYPASSED
            if isinstance(info, str):
                problems.append(f"{name} ({type(base).__module__}.{type(base).__qualname__}) {info}")
                continue
            injection.infos[name] = info
            if not self._check_tied_module_exists(config, name):
                targets[name] = info
        injection.parameters, more = find_target_parameters(self.model, config, set(injection.infos))
        problems += more
        targets.update({name: info for name, (_, info) in injection.parameters.items()})
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise ValueError(
                f"Targets that SpIEL cannot adapt: {shown}. Supported are {SUPPORTED}. Narrow target_modules "
                "(target_parameters) or name modules in exclude_modules."
            )
        injection.shared = shared_weights(self.model, set(injection.infos))
        counts = allocate_deltas(config, targets)
        counts.update({name: k for name, k in injection.file_counts.items() if name in counts})
        refuse_more_than_file(config, counts.values())
        injection.counts = counts
        if config.fan_in_fan_out and all(info.kind != "transposed" for info in targets.values()):
            warnings.warn(
                "fan_in_fan_out=True has no effect: no targeted module stores its weight transposed. SpIEL reads the "
                "layout off the layer, drop the setting.",
                stacklevel=2,
            )

    def _targets(self, injection: _Injection, config: SpIELConfig) -> Iterator[tuple[str, nn.Module]]:
        """The modules that PEFT will pass to `_create_and_replace`, in the same order."""
        inside: list[str] = []
        for name, module in self.model.named_modules():
            if not name or any(name.startswith(prefix) for prefix in inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside.append(name + ".")
            if injection.module_names is not None:
                matched = name.removeprefix("_orig_mod.") in injection.module_names
            else:
                matched = bool(self._check_target_module_exists(config, name))
                matched = matched or bool(self._check_tied_module_exists(config, name))
            if matched:
                yield name, module

    # Tied weights (`ensure_weight_tying`): the input embedding is adapted, and the modules tied to it share its delta.

    def _tied_source(self, config: SpIELConfig, key: str) -> SpIELLayer | None:
        """The adapted input embedding if the module is tied to it and is to share its delta, else None."""
        if not self._check_tied_module_exists(config, key):
            return None
        source = self.model.get_input_embeddings()
        if not isinstance(source, SpIELLayer):
            raise ValueError(f"ensure_weight_tying: the input embedding that {key!r} is tied to is not adapted")
        return source

    def _add_targets_to_tie(self, peft_config: SpIELConfig, tied_weight_keys: list[str]) -> None:
        # The first adapter has wrapped the tied modules that a second one finds.
        tied_weight_keys = [key.removesuffix(".base_layer") for key in tied_weight_keys]
        peft_config.target_modules_to_tie = set(tied_weight_keys)
        embedding = find_parameter_name_by_module(self.model, self.model.get_input_embeddings())
        targets = peft_config.target_modules
        if isinstance(targets, str):
            peft_config.target_modules = rf"(?:{targets}|{re.escape(embedding)})"
            return
        kept = {t for t in targets or () if not any(names_module(t, key) for key in tied_weight_keys)}
        peft_config.target_modules = kept | {embedding}

    def _add_modules_to_save_to_tie(self, peft_config: SpIELConfig, tied_weight_keys: list[str]) -> None:
        peft_config.modules_to_tie = set(tied_weight_keys)
        embedding = find_parameter_name_by_module(self.model, self.model.get_input_embeddings())
        saved = peft_config.modules_to_save or []
        kept = [m for m in saved if not any(names_module(m, key) for key in tied_weight_keys)]
        peft_config.modules_to_save = kept if embedding in kept else [*kept, embedding]

    # Precision

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for module in self.model.modules():
            if isinstance(module, SpIELLayer):
                module.cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            elif isinstance(module, BaseTunerLayer):
                cast_adapter_dtype(module, adapter_name, autocast_adapter_dtype)

    # Forward

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names (mixed batches) is not supported by SpIEL; use set_adapter")
        yield

    # Inspection

    def cycle_log(self, adapter_name: str | None = None) -> list[Any]:
        """The reports (`CycleReport`) of all closes of an adapter's cycle so far, oldest first.

        Args:
            adapter_name: name of the adapter; None: the first active one.

        Raises:
            ValueError: no layer has an adapter of this name.
        """
        name = adapter_name if adapter_name is not None else self.active_adapters[0]
        for layer in self._spiel_layers():
            if name in layer.spiel_delta:
                return list(layer.spiel_delta[name].run.log)
        raise ValueError(f"Adapter {name!r} does not exist; there are {sorted(self.peft_config)}")

    # Merging

    def _spiel_layers(self) -> list[SpIELLayer]:
        return [m for m in self.model.modules() if isinstance(m, SpIELLayer)]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights of all layers. On an error no layer is changed.

        Args:
            adapter_names: adapters to merge; None: the active ones.
            safe_merge: refuse results that are not finite.

        Raises:
            ValueError: an adapter is unknown, or with `safe_merge` a result is not finite.
        """
        self._check_before_merge(adapter_names, safe_merge)
        with self._merged_whole_or_not():
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        report_merge_loss(self._spiel_layers())

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_before_merge(adapter_names, safe_merge)
        else:
            for layer in self._spiel_layers():
                layer.undo_interrupted()
                if layer.merged:
                    layer.unmerge()
        layers = self._spiel_layers()
        tied = self.get_model_config(self.model).get("tie_word_embeddings")
        structure = ModelStructure(self.model)
        try:
            with self._merged_whole_or_not():
                model = super()._unload_and_optionally_merge(
                    merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
                )
        except BaseException:
            structure.restore()  # the layers that were taken out
            raise
        if merge:
            report_merge_loss(layers)
            for layer in layers:
                layer.merging.forget_originals()
            if tied:
                untie_weights(model)
        return model

    @contextmanager
    def _merged_whole_or_not(self) -> Iterator[None]:
        """Undo all merges of the block if it is left by an exception, Ctrl-C too."""
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        before = [(layer, list(layer.merged_adapters)) for layer in layers if hasattr(layer, "merged_adapters")]
        try:
            yield
        except BaseException:
            for layer, names in before:
                if layer.merged_adapters == names:
                    continue
                if isinstance(layer, SpIELLayer):
                    layer.merging.reset(layer, names)
                elif not names:  # trained tokens, LoRA
                    layer.unmerge()
            raise

    def _check_before_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        layers = self._spiel_layers()
        shared = used_by_others([layer for layer in layers if not layer.merged], self.model)
        for layer in layers:
            if not layer.merged:
                layer.merging.used_by_others = layer in shared
        names = self.active_adapters if adapter_names is None else adapter_names
        if isinstance(names, str):
            return  # PEFT raises its own TypeError
        unknown = sorted(set(names) - set(self.peft_config))
        if unknown:
            raise ValueError(f"Adapters {unknown} do not exist; there are {sorted(self.peft_config)}")
        if not safe_merge:
            return
        for layer in self._spiel_layers():
            if not layer.merged:
                check_finite(layer, list(names))

    # Saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SpIELConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return saved_entries(model, config, adapter_name, state_dict, found)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SpIELConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        loading = AdapterLoading(model, config, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, loading.tensors)
        return loading.named(remapped)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # PyTorch calls this method of the model before that of any layer.
        check_live_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Combining

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        seed: int = 0,
        drop_zeros: bool = False,
    ) -> OverlapReport:
        """Add an adapter whose deltas are a weighted combination of those of other adapters.

        The new adapter is frozen and inactive until `set_adapter`, and is saved with its number of deltas per module.
        The active adapters and the trainable parameters stay the same. Modules that one of the adapters saves in full
        and its trained tokens are copied without a weight.

        Args:
            adapters: names of SpIEL adapters, all different.
            weights: one number for each adapter; it may be negative.
            adapter_name: name of the new adapter.
            combination_type, density, majority_sign_method, seed, drop_zeros: see `Combination`.

        Returns:
            How far the positions of the adapters overlap.

        Raises:
            ValueError: an adapter does not exist, the adapters do not fit together, the name is taken, an adapter is
                merged, or the result is not finite or empty. The model is unchanged then.
        """
        how = Combination(tuple(weights), combination_type, density, majority_sign_method, seed, drop_zeros)
        return add_combination(self, adapters, adapter_name, how)
