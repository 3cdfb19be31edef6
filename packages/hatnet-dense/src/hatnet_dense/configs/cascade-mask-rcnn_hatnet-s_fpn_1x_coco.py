_base_ = "./cascade-mask-rcnn_hatnet-t_fpn_1x_coco.py"
checkpoint = "https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_Small.pth"
model = dict(
    backbone=dict(
        variant="hatnet_small",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
