# RetinaNet on the drawn shapes, from scratch, small enough for two cores.
_base_ = ["../../src/hatnet_dense/configs/retinanet_hatnet-t_fpn_1x_coco.py", "./_base_coco.py"]
norm_cfg = dict(type="GN", num_groups=32)  # as MMDetection's own configs for training from scratch
model = dict(
    backbone=dict(init_cfg=None, drop_path_rate=0.0),
    neck=dict(start_level=0, num_outs=4, out_channels=128, norm_cfg=norm_cfg),
    bbox_head=dict(
        num_classes=3,
        in_channels=128,
        feat_channels=128,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        anchor_generator=dict(octave_base_scale=4, strides=[4, 8, 16, 32]),
    ),
)
train_dataloader = {{_base_.drawn_train_dataloader}}
val_dataloader = {{_base_.drawn_val_dataloader}}
test_dataloader = {{_base_.drawn_val_dataloader}}
val_evaluator = {{_base_.drawn_evaluator}}
test_evaluator = {{_base_.drawn_evaluator}}
default_hooks = {{_base_.drawn_hooks}}
randomness = dict(seed=0)
optim_wrapper = dict(optimizer=dict(lr=4e-4))
train_cfg = dict(max_epochs=12, val_interval=12)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[9, 11], gamma=0.1),
]
