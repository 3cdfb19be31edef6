# Not in the paper: its schedule for Mask R-CNN, with the cascade head.
_base_ = [
    "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
    "./_base_/hatnet.py",
]
checkpoint = "https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_Tiny.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="HATNetBackbone",
        variant="hatnet_tiny",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[48, 96, 240, 384]),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4))
