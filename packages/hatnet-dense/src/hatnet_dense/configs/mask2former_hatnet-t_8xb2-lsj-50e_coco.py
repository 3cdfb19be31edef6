# Not in the paper: the settings of MMDetection's Swin, in front of instance segmentation by Mask2Former.
_base_ = ["mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", "./_base_/hatnet.py"]
checkpoint = "https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_Tiny.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="HATNetBackbone",
        variant="hatnet_tiny",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    panoptic_head=dict(in_channels=[48, 96, 240, 384]),
)
