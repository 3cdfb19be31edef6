# Not in the paper: MMDetection's schedule for its Swin. The backbone trains at a tenth of the learning rate, its norms
# without weight decay.
_base_ = ["mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", "./hatnet.py"]
model = dict(backbone=dict(_delete_=True, type="HATNetBackbone"))
backbone_norm = dict(lr_mult=0.1, decay_mult=0.0)
custom_keys = {"backbone.model.stem.norm": backbone_norm}
custom_keys.update({f"backbone.model.stages.{i}.downsample.norm": backbone_norm for i in range(1, 4)})
custom_keys.update(
    {
        f"backbone.model.stages.{i}.blocks.{j}.{norm}": backbone_norm
        for i in range(4)
        for j in range(27)  # Large has the most
        for norm in ["attn.norm", "attn.grid_norm", "attn.pool_norm", "mlp.norm", "mlp.out_norm"]
    }
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=custom_keys))
