"""Register HAT-Net with Hugging Face transformers when imported, as a classifier and as a backbone.

    import hatnet_core.transformers
    from transformers import AutoBackbone, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained("folder")  # of hatnet-export --to huggingface
    backbone = AutoBackbone.from_config(HATNetConfig(out_features=["stage2", "stage3", "stage4"]))

Needs the extra ``hatnet-core[transformers]``. Names follow transformers: ``stem`` is the paper's stage 1, ``stage1``
to ``stage4`` are its stages 2-5. ``load_checkpoint(backbone.hatnet, path, drop_head=True)`` loads classification
weights. ``HATNetBackbone.from_pretrained`` reads folders of ``save_pretrained``; ``AutoBackbone.from_pretrained`` also
asks the hub, even for a folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hatnet_core import config
from hatnet_core.attention import WindowAttention
from hatnet_core.model import Block, HATNet
from hatnet_core.variants import VARIANTS

HEAD = ("num_classes", "global_pool", "drop_rate")
"""Arguments of :class:`hatnet_core.HATNet` that a backbone does not have."""

TIMM_LABELS = ("num_classes", "label_names")
"""Keys of timm in ``config.json`` for the labels."""

# num_classes is num_labels in transformers, and a model without pooling is a backbone
_ARGUMENTS = {f.name: f for f in dataclasses.fields(config.HATNetConfig) if f.name not in HEAD[:2]}
_SMALL = {name: f.default for name, f in _ARGUMENTS.items()} | VARIANTS["hatnet_small"]
# transformers reads the fields of a configuration from the annotations of dataclasses; made here so that only
# hatnet_core.config declares them.
_Arguments: Any = dataclasses.make_dataclass("_Arguments", [(name, Any, _SMALL[name]) for name in _ARGUMENTS])


class HATNetConfig(BackboneConfigMixin, _Arguments, PreTrainedConfig):  # type: ignore[misc]  # made, not written
    """Arguments of :class:`hatnet_core.HATNet`; the defaults are HAT-Net-Small, ``num_labels`` is its ``num_classes``.

    Args:
        out_features: names of the returned maps, out of ``stem`` and ``stage1`` to ``stage4``.
        out_indices: the same by number, 0 for ``stem``; by default the last stage.
    """

    model_type = "hatnet"
    attribute_map = {"num_channels": "in_chans", "hidden_sizes": "embed_dims"}  # noqa: RUF012  transformers' interface

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Choose the returned maps, after transformers has set the fields."""
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, 5))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        for name in TIMM_LABELS:  # written for timm; here they are num_labels and id2label
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` contains; of an exported folder also the present labels under timm's keys."""
        output = super().to_dict()
        if "architecture" in output:
            output |= dict(zip(TIMM_LABELS, (self.num_labels, list((self.id2label or {}).values())), strict=True))
        return output

    def hatnet_arguments(self) -> dict[str, Any]:
        """Return the arguments of a :class:`HATNet` without head."""
        return {**{name: getattr(self, name) for name in _ARGUMENTS if name not in HEAD}, "num_classes": 0}

    def classifier_arguments(self) -> dict[str, Any]:
        """Return the arguments of a :class:`HATNet` with one output per label."""
        return {**{name: getattr(self, name) for name in _ARGUMENTS}, "num_classes": self.num_labels}


class HATNetPreTrainedModel(PreTrainedModel):
    """A :class:`HATNet` in ``self.hatnet``, with the methods of ``PreTrainedModel``."""

    hatnet: HATNet
    config_class = HATNetConfig
    base_model_prefix = "hatnet"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_context_parallel = False  # the positions of one image attend to each other
    _no_split_modules = {"Block"}  # noqa: RUF012  transformers' interface

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.hatnet.set_grad_checkpointing(enable)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
        elif isinstance(module, WindowAttention):
            init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm) and module.bias is not None:
            init.zeros_(module.bias)


class HATNetForImageClassification(HATNetPreTrainedModel):
    """A :class:`HATNet` that classifies; its files have the parameter names of :class:`HATNet`."""

    def __init__(self, config: HATNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.hatnet = HATNet(**config.classifier_arguments())
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Images [B, in_chans, H, W] → logits [B, num_labels].

        Args:
            pixel_values: the images.
            labels: [B], classes to compute the loss with; of another dtype or shape, as ``problem_type`` says.
            output_hidden_states: return the maps of the stem and every stage as well.
            output_attentions: return the weights of every block, as its ``attention_weights()`` gives them:
                :class:`hatnet_core.attention.AttentionWeights` in stages 2-4, a tensor in stage 5.
            return_dict: return an ``ImageClassifierOutput`` instead of a tuple.
            **kwargs: passed to the loss, such as ``num_items_in_batch`` of the trainer.

        Raises:
            ValueError: if ``pixel_values`` has another shape, is not floating, or H or W is below 32, or if weights
                of window attention are requested.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        with _recorded(self.hatnet) if output_attentions else nullcontext(()) as weights:
            maps = self.hatnet.forward_maps(pixel_values, last=3)
        logits = self.hatnet.forward_head(maps[-1])
        output = ImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config, **kwargs),
            logits=logits,
            hidden_states=tuple(maps) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def save_pretrained(  # type: ignore[override]  # the other arguments are passed on by name
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save as ``PreTrainedModel``, under the parameter names of :class:`HATNet`, which timm and others load."""
        state = self.state_dict() if state_dict is None else state_dict
        prefix = f"{self.base_model_prefix}."
        plain = {name.removeprefix(prefix): t for name, t in state.items()}
        return super().save_pretrained(save_directory, is_main_process, plain, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights under the names of :class:`HATNet` or of this model; the trainer resumes with the former."""
        prefix = f"{self.base_model_prefix}."
        full = {name if name.startswith(prefix) else prefix + name: t for name, t in state_dict.items()}
        return super().load_state_dict(full, *args, **kwargs)


class HATNetBackbone(BackboneMixin, HATNetPreTrainedModel):
    """A :class:`HATNet` without head that returns the maps named in its configuration."""

    has_attentions = False

    def __init__(self, config: HATNetConfig) -> None:
        super().__init__(config)
        self.num_features = [config.embed_dims[0], *config.embed_dims]
        self.hatnet = HATNet(**config.hatnet_arguments())
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple[Any, ...]:
        """Images [B, in_chans, H, W] → feature maps [B, C, ⌈H/r⌉, ⌈W/r⌉], r = 4 for the stem, then 4, 8, 16, 32.

        Args:
            pixel_values: the images.
            output_hidden_states: return the maps of the stem and every stage as well.
            output_attentions: ignored; fused attention returns no weights.
            return_dict: return a ``BackboneOutput`` instead of a tuple.

        Raises:
            ValueError: if ``pixel_values`` has another shape, is not floating, or H or W is below 32.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        last = (
            len(self.stage_names) - 1 if output_hidden_states else max(map(self.stage_names.index, self.out_features))
        )
        maps = self.hatnet.forward_maps(pixel_values, last - 1)
        wanted: Any = tuple(m for m, name in zip(maps, self.stage_names, strict=False) if name in self.out_features)
        output = BackboneOutput(feature_maps=wanted, hidden_states=tuple(maps) if output_hidden_states else None)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


@contextmanager
def _recorded(model: HATNet) -> Iterator[list[Any]]:
    """Collect the attention weights of every block while the model runs."""
    layers = [block.attn for block in model.modules() if isinstance(block, Block)]
    if any(isinstance(layer, WindowAttention) for layer in layers):
        raise ValueError(f"output_attentions must be False with window attention, got {model.config.attention!r}")
    weights: list[Any] = []

    def record(layer: Any, inputs: tuple[Tensor]) -> None:
        weights.append(layer.attention_weights(*inputs))

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


AutoConfig.register(HATNetConfig.model_type, HATNetConfig)
AutoBackbone.register(HATNetConfig, HATNetBackbone)
AutoModelForImageClassification.register(HATNetConfig, HATNetForImageClassification)
# pipeline() looks its models up here, and logs an error for one that is registered only
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[HATNetConfig.model_type] = HATNetForImageClassification.__name__
