# Mask R-CNN on the drawn shapes, from scratch, small enough for two cores.
_base_ = ["../../src/hatnet_dense/configs/mask-rcnn_hatnet-t_fpn_1x_coco.py", "./_base_coco.py"]
norm_cfg = dict(type="GN", num_groups=32)  # as MMDetection's own configs for training from scratch
model = dict(
    backbone=dict(init_cfg=None, drop_path_rate=0.0),
    neck=dict(out_channels=128, norm_cfg=norm_cfg),
    rpn_head=dict(in_channels=128, feat_channels=128, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=128),
        bbox_head=dict(num_classes=3, in_channels=128, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=128),
        mask_head=dict(num_classes=3, in_channels=128, num_convs=2, conv_out_channels=128, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
train_dataloader = {{_base_.drawn_train_dataloader}}
val_dataloader = {{_base_.drawn_val_dataloader}}
test_dataloader = {{_base_.drawn_val_dataloader}}
val_evaluator = {{_base_.drawn_evaluator}}
test_evaluator = {{_base_.drawn_evaluator}}
default_hooks = {{_base_.drawn_hooks}}
randomness = dict(seed=0)
optim_wrapper = dict(optimizer=dict(lr=4e-4))
train_cfg = dict(max_epochs=11, val_interval=11)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", begin=0, end=11, by_epoch=True, milestones=[8, 10], gamma=0.1),
]
