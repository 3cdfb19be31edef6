_base_ = "./retinanet_hatnet-t_fpn_1x_coco.py"
checkpoint = "https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_Medium.pth"
model = dict(
    backbone=dict(
        variant="hatnet_medium",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
