"""Register HAT-Net as a backbone of Hugging Face transformers, for ``AutoBackbone``, when imported.

    from hatnet_core.transformers import HATNetConfig
    from transformers import AutoBackbone

    backbone = AutoBackbone.from_config(HATNetConfig(out_features=["stage2", "stage3", "stage4"]))

Needs the extra ``hatnet-core[transformers]``. Names follow transformers: ``stem`` is the paper's stage 1, ``stage1``
to ``stage4`` are its stages 2-5. ``load_checkpoint(backbone.hatnet, path, drop_head=True)`` loads classification
weights. ``HATNetBackbone.from_pretrained`` reads folders of ``save_pretrained``; ``AutoBackbone.from_pretrained`` also
asks the hub, even for a folder.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from hatnet_core import config
from hatnet_core.attention import WindowAttention
from hatnet_core.model import HATNet
from hatnet_core.variants import VARIANTS

HEAD = ("num_classes", "global_pool", "drop_rate")
"""Arguments of :class:`hatnet_core.HATNet` that a backbone does not have."""

_ARGUMENTS = {f.name: f for f in dataclasses.fields(config.HATNetConfig) if f.name not in HEAD}
_SMALL = {name: f.default for name, f in _ARGUMENTS.items()} | VARIANTS["hatnet_small"]
# transformers reads the fields of a configuration from the annotations of dataclasses; made here so that only
# hatnet_core.config declares them.
_Arguments: Any = dataclasses.make_dataclass("_Arguments", [(name, Any, _SMALL[name]) for name in _ARGUMENTS])


class HATNetConfig(BackboneConfigMixin, _Arguments, PreTrainedConfig):  # type: ignore[misc]  # made, not written
    """Arguments of :class:`hatnet_core.HATNet`, except those of its head; the defaults are HAT-Net-Small.

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
        super().__post_init__(**kwargs)

    def hatnet_arguments(self) -> dict[str, Any]:
        """Return the arguments of a :class:`HATNet` without head."""
        return {**{name: getattr(self, name) for name in _ARGUMENTS}, "num_classes": 0}


class HATNetBackbone(BackboneMixin, PreTrainedModel):
    """A :class:`HATNet` without head that returns the maps named in its configuration."""

    config_class = HATNetConfig
    base_model_prefix = "hatnet"
    main_input_name = "pixel_values"
    input_modalities = "image"
    has_attentions = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_context_parallel = False  # the positions of one image attend to each other
    _no_split_modules = {"Block"}  # noqa: RUF012  transformers' interface

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

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.hatnet.set_grad_checkpointing(enable)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
        elif isinstance(module, WindowAttention):
            init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        if isinstance(module, nn.Conv2d | nn.GroupNorm) and module.bias is not None:
            init.zeros_(module.bias)


AutoConfig.register(HATNetConfig.model_type, HATNetConfig)
AutoBackbone.register(HATNetConfig, HATNetBackbone)
